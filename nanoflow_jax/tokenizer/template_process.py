"""Keeps the process that renders chat templates, and its limits."""

import dataclasses
import json
import math
import selectors
import shlex
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("template_worker.py")
_START_S = 60.0  # a cold disk and a busy machine, not the template


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderLimits:
    """What one rendering may cost. An honest chat stays far below all of them.

    Attributes:
        fuel: Instructions of the template.
        fuel_per_item: Further instructions for each message and each tool.
        fuel_per_byte: Further instructions for each byte of the request: minijinja counts data
            that filters and concatenations handle, from version 3.1 on.
        max_output_chars: Longest rendered text.
        memory_bytes: Address space of the rendering process.
        seconds: Wall time of one rendering.
    """

    fuel: int = 1_000_000
    fuel_per_item: int = 20_000
    fuel_per_byte: int = 1
    max_output_chars: int = 16_000_000
    memory_bytes: int = 1 << 30
    seconds: float = 10.0


class TemplateProcess:
    """One process that renders templates, started at the first rendering.

    A rendering that passes a limit ends the process, if need be, and the next one starts another.
    Safe to share between threads: renderings take turns.
    """

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def render(self, source: str, *, variables: Mapping[str, Any], now: str, num_items: int) -> str:
        """Render a template within the limits.

        Args:
            source: The template.
            variables: What the template sees; plain JSON values.
            now: Local time in ISO format.
            num_items: Messages and tools, which add fuel as the length of the request does.

        Raises:
            ValueError: The variables are not plain JSON, the template refuses them, fails or
                passes a limit.
        """
        limits = self._limits
        job = {
            "source": source,
            "variables": variables,
            "now": now,
            "max_output_chars": limits.max_output_chars,
        }
        try:
            body = json.dumps(job, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"messages, tools and template kwargs must be plain JSON values: {error}"
            ) from error
        fuel = limits.fuel + limits.fuel_per_item * num_items + limits.fuel_per_byte * len(body)
        line = b'{"fuel": %d, "job": %s}\n' % (fuel, body)
        with self._lock:
            answer = self._ask(line)
        return _text(answer, limits=limits, fuel=fuel)

    def close(self) -> None:
        """End the process; a later rendering starts another."""
        with self._lock:
            self._drop()

    def _ask(self, line: bytes) -> Mapping[str, Any]:
        if self._child is not None and not self._child.is_alive():
            self._drop()
        if self._child is None:
            self._child = _Child(self._limits)
        answer = self._child.ask(line, seconds=self._limits.seconds)
        if answer.get("error") in ("clock", "died", "memory"):
            self._drop()
        return answer

    def _drop(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


class _Child:
    """A running worker process."""

    def __init__(self, limits: RenderLimits) -> None:
        # -P: the folder of the script, which holds our modules, is not where it imports from.
        alarm_s = math.ceil(limits.seconds) + 1
        command = [sys.executable, "-P", str(_WORKER), str(limits.memory_bytes), str(alarm_s)]
        # A session of its own: Ctrl-C is for the engine, which may want to finish its requests.
        self._process = subprocess.Popen(
            command,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self.close = weakref.finalize(self, _end, self._process)
        ready = self._read_line(seconds=_START_S)
        if "ready" not in ready:
            self.close()
            raise ValueError(
                "the process that renders chat templates does not start (exit code "
                f"{self._process.returncode}); see what `{shlex.join(command)}` prints"
            )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: bytes, *, seconds: float) -> Mapping[str, Any]:
        assert self._process.stdin is not None
        try:
            # The worker reads a whole line before it writes, so neither waits for the other.
            view = memoryview(line)
            while view:
                view = view[self._process.stdin.write(view) :]
        except BrokenPipeError:
            return {"error": "died"}
        return self._read_line(seconds=seconds)

    def _read_line(self, *, seconds: float) -> Mapping[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + seconds
        chunks: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not chunks or not chunks[-1].endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return {"error": "clock"}
                chunk = stdout.read(1 << 20)
                if not chunk:
                    return {"error": "died"}
                chunks.append(chunk)
        answer: Mapping[str, Any] = json.loads(b"".join(chunks))
        return answer


def _end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.kill()
    process.stdin.close()
    process.stdout.close()
    process.wait()


def _text(answer: Mapping[str, Any], *, limits: RenderLimits, fuel: int) -> str:
    message = answer.get("message")
    match answer.get("error"):
        case None:
            text: str = answer["text"]
            return text
        case "raised":
            raise ValueError(f"the chat template refuses these messages: {message}")
        case "template":
            raise ValueError(
                f"the chat template fails on these messages: {message}; change the messages, or "
                "correct chat_template.jinja in the model folder"
            )
        case "fuel":
            limit = f"runs for more than {fuel} instructions"
        case "output":
            limit = f"produces {message}, more than {limits.max_output_chars}"
        case "clock":
            limit = f"runs for more than {limits.seconds:g} s"
        case _:
            limit = f"needs more than {limits.memory_bytes} bytes of memory, or crashes"
    raise ValueError(
        f"the chat template {limit}: shorten the conversation, or correct chat_template.jinja in "
        "the model folder"
    )
