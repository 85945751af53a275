"""The output of a job: complete lines, each of them a finished row, and a lock around it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from checkpoints import files

_SYNC_S = 5.0  # What a power cut may cost; kill -9 costs nothing that was written.


@dataclasses.dataclass(kw_only=True)
class Totals:
    """Counts over finished rows."""

    num_ok: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def num_rows(self) -> int:
        """Finished rows."""
        return self.num_ok + self.num_failed

    def add(self, row: dict[str, Any]) -> None:
        """Counts an output row."""
        if row["error"] is not None:
            self.num_failed += 1
            return
        self.num_ok += 1
        usage = row["response"]["body"]["usage"]
        self.prompt_tokens += usage["prompt_tokens"]
        self.output_tokens += usage["completion_tokens"]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a job alone; the kernel lets go of the lock even after kill -9.

    The file stays: deleting it would let two jobs lock two files of the same name.

    Raises:
        ValueError: Another job holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another job is writing {path.with_suffix('')}; wait for it, or give another "
                "--output"
            ) from error
        yield
    finally:
        os.close(descriptor)


class OutputFile:
    """Appends rows to a file and knows which are there.

    Invariant: `done[i]` if and only if a complete line of the file answers row i.

    Attributes:
        path: The file.
        done: By row number.
        totals: Counts over the rows in it.
    """

    def __init__(
        self,
        path: Path,
        *,
        job: str,
        is_mine: Bool[np.ndarray, "lines"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens the output of a job, new or begun; the caller holds its lock.

        An unterminated last line, which a kill left, is cut.

        Args:
            path: The file.
            job: The job's name.
            is_mine: Rows that this process writes.
            clock: Seconds, for the times of syncs.

        Raises:
            ValueError: A line is not a row of this job.
        """
        self.path = path
        self.done = np.zeros(len(is_mine), bool)
        self.totals = Totals()
        self._job = job
        self._is_mine = is_mine
        self._clock = clock
        self._pattern = re.compile(rf"batch_req_{re.escape(job)}-(0|[1-9][0-9]*)")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            files.sync_folder(path.parent)
            self._recover()
        except BaseException:
            os.close(self._file)
            raise
        self._synced_at = clock()

    def _recover(self) -> None:
        whole = 0
        with open(self.path, "rb") as lines:
            for i, line in enumerate(lines):
                if not line.endswith(b"\n"):
                    break
                self._take(line, i)
                whole += len(line)
        if os.fstat(self._file).st_size > whole:
            os.ftruncate(self._file, whole)

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            found = self._pattern.fullmatch(row["id"])
            if found is None:
                raise ValueError(f"its id is {row['id']!r:.80}")
            row_number = int(found[1])
            if row_number >= len(self.done) or not self._is_mine[row_number]:
                raise ValueError(f"the job has no row {row_number} for this process")
            if self.done[row_number]:
                raise ValueError(f"row {row_number} stands there twice")
            self.totals.add(row)
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise ValueError(
                f"{self.path}: line {number + 1} is not an answer of this job ({error!s:.200}); "
                "somebody else wrote to the file, or the disk damaged it. Restore it, give another "
                "--output, or delete what is there and begin again with --restart"
            ) from error
        self.done[row_number] = True

    def row_id(self, number: int) -> str:
        """The `id` of a row, from which its number can be read again."""
        return f"batch_req_{self._job}-{number}"

    def append(self, number: int, row: dict[str, Any]) -> None:
        """Writes the answer to a row; it is there once this returns.

        Raises:
            OSError: It could not be written, as on a full disk. What is there stays valid.
        """
        assert self._is_mine[number] and not self.done[number], f"row {number} is not to be done"
        data = memoryview(_encode(row))
        while data:  # One call, unless the disk fills up in the middle of it.
            data = data[os.write(self._file, data) :]
        self.done[number] = True
        self.totals.add(row)
        if self._clock() - self._synced_at >= _SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Waits until all rows are on the disk."""
        os.fsync(self._file)
        self._synced_at = self._clock()

    def close(self) -> None:
        """Closes the file, which stays as it is."""
        os.close(self._file)


def _encode(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # A lone surrogate, from the input; escaped it is valid JSON.
        return json.dumps(row, allow_nan=False).encode() + b"\n"
