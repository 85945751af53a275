"""Keeps the process that compiles grammars first, and its limits."""

import dataclasses
import json
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow_jax import line_worker
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
        self._worker: line_worker.LineWorker | None = None

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
        if self._worker is not None and not self._worker.is_alive():
            self._drop()
        if self._worker is None:
            self._worker = _start(self._vocabulary, self._limits)
        try:
            return self._worker.ask(line, seconds=self._limits.wall_seconds)
        except line_worker.WorkerLateError:
            limit = "clock"
        except line_worker.WorkerDiedError:
            # The profiling timer's signal; a Rust program out of memory aborts.
            limit = "clock" if self._worker.wait() == -signal.SIGPROF else "memory"
        self._drop()
        return {"limit": limit}

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _start(vocabulary: vocabulary_lib.Vocabulary, limits: CompileLimits) -> line_worker.LineWorker:
    arguments = [str(limits.memory_bytes), str(limits.cpu_seconds)]
    worker = line_worker.LineWorker(_WORKER, arguments)
    tokens = {"text": vocabulary.text, "vocab_size": vocabulary.size, "eos_ids": vocabulary.eos_ids}
    try:
        ready = worker.ask(json.dumps(tokens).encode() + b"\n", seconds=_START_S)
    except (line_worker.WorkerDiedError, line_worker.WorkerLateError) as error:
        worker.close()
        raise ValueError(
            "the process that compiles grammars does not start (exit code "
            f"{worker.wait()}); see what `{worker.command}` prints"
        ) from error
    if "error" in ready:
        worker.close()
        raise ValueError(f"grammars cannot be used with this model's tokenizer: {ready['error']}")
    return worker
