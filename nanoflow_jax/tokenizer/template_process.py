"""Keeps the process that renders chat templates, and its limits."""

import dataclasses
import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow_jax import line_worker

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
        self._worker: line_worker.LineWorker | None = None

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
        if self._worker is not None and not self._worker.is_alive():
            self._drop()
        if self._worker is None:
            self._worker = _start(self._limits)
        try:
            answer = self._worker.ask(line, seconds=self._limits.seconds)
        except line_worker.WorkerDiedError:
            answer = {"error": "died"}
        except line_worker.WorkerLateError:
            answer = {"error": "clock"}
        if answer.get("error") in ("clock", "died", "memory"):
            self._drop()
        return answer

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _start(limits: RenderLimits) -> line_worker.LineWorker:
    alarm_s = math.ceil(limits.seconds) + 1
    worker = line_worker.LineWorker(_WORKER, [str(limits.memory_bytes), str(alarm_s)])
    try:
        worker.read(seconds=_START_S)
    except (line_worker.WorkerDiedError, line_worker.WorkerLateError) as error:
        worker.close()
        raise ValueError(
            "the process that renders chat templates does not start (exit code "
            f"{worker.wait()}); see what `{worker.command}` prints"
        ) from error
    return worker


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
