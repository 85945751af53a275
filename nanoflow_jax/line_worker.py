"""A script of ours in a process of its own, which answers lines of JSON and may die."""

import json
import selectors
import shlex
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerDiedError(Exception):
    """The process ended instead of answering."""


class WorkerLateError(Exception):
    """The process did not answer in time."""


class LineWorker:
    """One running process; it ends with this object, if not before."""

    def __init__(self, script: Path, arguments: Sequence[str]) -> None:
        """Starts the process.

        Args:
            script: Reads lines from its standard input and writes one for each.
            arguments: Of its command line.
        """
        # -P: the folder of the script, which holds our modules, is not where it imports from.
        command = [sys.executable, "-P", str(script), *arguments]
        self.command = shlex.join(command)
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

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """The exit code of the process, once it has ended."""
        return self._process.wait()

    def ask(self, line: bytes, *, seconds: float) -> Mapping[str, Any]:
        """Sends a line and reads the answer.

        Args:
            line: With its end.
            seconds: To wait for the answer.

        Raises:
            WorkerDiedError: The process ended.
            WorkerLateError: No answer came in time; what comes later would answer the next line.
        """
        assert self._process.stdin is not None
        try:
            # The worker reads a whole line before it writes, so neither waits for the other.
            view = memoryview(line)
            while view:
                view = view[self._process.stdin.write(view) :]
        except BrokenPipeError as error:
            raise WorkerDiedError from error
        return self.read(seconds=seconds)

    def read(self, *, seconds: float) -> Mapping[str, Any]:
        """Reads a line that nobody asked for, such as the first; see `ask`."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + seconds
        chunks: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not chunks or not chunks[-1].endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerLateError
                chunk = stdout.read(1 << 20)
                if not chunk:
                    raise WorkerDiedError
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
