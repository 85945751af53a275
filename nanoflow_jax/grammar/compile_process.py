"""Keeps the process that compiles grammars first, and its limits."""

import dataclasses
import json
import selectors
import shlex
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.grammar import vocabulary as vocabulary_lib

_WORKER = Path(__file__).with_name("compile_worker.py")
_START_S = 120.0  # a cold disk, a busy machine and a vocabulary of any size
_MESSAGE_LEN = 400
_NAMES = {
    request_lib.GrammarKind.JSON_SCHEMA: "JSON schema",
    request_lib.GrammarKind.REGEX: "regular expression",
    request_lib.GrammarKind.LARK: "Lark grammar",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileLimits:
    """What compiling one grammar may cost. An honest one takes a few ms and some 100 kB.

    Attributes:
        cpu_seconds: Processor time, so that a busy machine changes no answer.
        wall_seconds: Wall time, for a machine that stands still.
        memory_bytes: Address space of the compiling process, vocabulary included.
        grammar_bytes: What a compiled grammar may keep.
    """

    cpu_seconds: float = 1.0
    wall_seconds: float = 20.0
    memory_bytes: int = 2 << 30
    grammar_bytes: int = 64 << 20


class CompileProcess:
    """One process that compiles grammars, started at the first of them.

    A grammar that passes a limit ends the process, if need be, and the next one starts another.
    Safe to share between threads: compilations take turns.
    """

    def __init__(
        self, vocabulary: vocabulary_lib.Vocabulary, limits: CompileLimits | None = None
    ) -> None:
        self._vocabulary = vocabulary
        self._limits = limits or CompileLimits()
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def check(self, grammar: request_lib.Grammar) -> int:
        """Refuses a grammar that is wrong or costs too much.

        Takes the time of one compilation, at most `cpu_seconds` on an idle machine, and that of
        starting a process after one that passed a limit.

        Args:
            grammar: Of a request.

        Returns:
            Bytes that it keeps when compiled, about.

        Raises:
            ValueError: Why it cannot be used.
        """
        name = _NAMES[grammar.kind]
        try:
            line = json.dumps({"kind": grammar.kind.value, "text": grammar.text}).encode() + b"\n"
            grammar.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the {name} holds a lone surrogate at character {error.start}, which is not "
                "Unicode text"
            ) from error
        with self._lock:
            answer = self._ask(line)
        limits = self._limits
        message = answer.get("error")
        if message is not None:
            raise ValueError(f"the {name} cannot be used: {message.strip():.{_MESSAGE_LEN}}")
        if answer.get("limit") is not None:
            what = {
                "clock": f"it takes more than {limits.cpu_seconds:g} s to compile",
                "memory": "compiling it needs too much memory or is nested too deeply",
            }[answer["limit"]]
            raise ValueError(f"the {name} is too costly: {what}; simplify it")
        if answer["bytes"] > limits.grammar_bytes:
            raise ValueError(
                f"the {name} is too costly: compiled it keeps {answer['bytes']} bytes, more than "
                f"{limits.grammar_bytes}; simplify it"
            )
        return int(answer["bytes"])

    def close(self) -> None:
        """Ends the process; a later check starts another."""
        with self._lock:
            self._drop()

    def _ask(self, line: bytes) -> Mapping[str, Any]:
        if self._child is not None and not self._child.is_alive():
            self._drop()
        if self._child is None:
            self._child = _Child(self._vocabulary, self._limits)
        answer = self._child.ask(line, seconds=self._limits.wall_seconds)
        if "limit" in answer:
            self._drop()
        return answer

    def _drop(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


class _Child:
    """A running worker process."""

    def __init__(self, vocabulary: vocabulary_lib.Vocabulary, limits: CompileLimits) -> None:
        # -P: the folder of the script, which holds our modules, is not where it imports from.
        command = [sys.executable, "-P", str(_WORKER)]
        command += [str(limits.memory_bytes), str(limits.cpu_seconds)]
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
        tokens = {
            "text": vocabulary.text,
            "vocab_size": vocabulary.size,
            "eos_ids": vocabulary.eos_ids,
        }
        ready = self.ask(json.dumps(tokens).encode() + b"\n", seconds=_START_S)
        if "error" in ready:
            self.close()
            raise ValueError(
                f"grammars cannot be used with this model's tokenizer: {ready['error']}"
            )
        if "ready" not in ready:
            self.close()
            raise ValueError(
                "the process that compiles grammars does not start (exit code "
                f"{self._process.returncode}); see what `{shlex.join(command)}` prints"
            )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: bytes, *, seconds: float) -> Mapping[str, Any]:
        """Sends a line and reads one; {"limit": ...} if the process passed one of its limits."""
        assert self._process.stdin is not None
        try:
            # The worker reads a whole line before it writes, so neither waits for the other.
            view = memoryview(line)
            while view:
                view = view[self._process.stdin.write(view) :]
        except BrokenPipeError:
            return self._why_dead()
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
                    return {"limit": "clock"}
                chunk = stdout.read(1 << 20)
                if not chunk:
                    return self._why_dead()
                chunks.append(chunk)
        answer: Mapping[str, Any] = json.loads(b"".join(chunks))
        return answer

    def _why_dead(self) -> Mapping[str, Any]:
        # The profiling timer's signal; a Rust program out of memory aborts.
        code = self._process.wait()
        return {"limit": "clock" if code == -signal.SIGPROF else "memory"}


def _end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.kill()
    process.stdin.close()
    process.stdout.close()
    process.wait()
