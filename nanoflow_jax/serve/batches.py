"""What batches there are and how far each is; survives kill -9 at any moment.

`ID.json` is the record of a batch, replaced as a whole at each change of status. The answers are
in `ID.rows`, the output of a resumable job (`batch.resume`), until the batch ends: then they are
split into the two result files, whose ids the record got before.
"""

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoints import files as atomic
from nanoflow_jax.batch import resume
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.serve import batch_record, data_dir, files
from nanoflow_jax.serve.batch_record import Batch, Problem, Status

MAX_METADATA = 16
MAX_KEY_LEN = 64
MAX_VALUE_LEN = 512
WINDOW = "24h"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the store takes.

    Attributes:
        max_waiting: Batches that are not at their end.
        max_batches: In the store; the oldest that ended are forgotten, their files stay.
    """

    max_waiting: int = 100
    max_batches: int = 10_000


class BatchStore:
    """The batches of a server. Safe to share between threads; methods may wait for the disk.

    Invariant: `_known` holds what the records on disk say, but for counts of rows, which are
    written when a status changes; a batch that has not ended holds its input file.
    """

    def __init__(
        self,
        folder: Path,
        store: files.FileStore,
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens a store and removes what ended batches left behind.

        Args:
            folder: Made if need be; nobody else writes there.
            store: Inputs and results.
            limits: What it takes.
            clock: Seconds since 1970.

        Raises:
            ValueError: A record is damaged; the message names it.
        """
        self.files = store
        self.limits = limits or Limits()
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._on_change: Callable[[], None] = lambda: None
        folder.mkdir(mode=0o700, exist_ok=True)
        self._known = {b.id: b for b in map(batch_record.read, sorted(folder.glob("batch_*.json")))}
        for path in folder.glob(".batch_*.json.partial"):
            path.unlink()
        for batch in self._known.values():
            if batch.status.is_ended:
                self.clean(batch.id)
                continue
            completed, failed = _count_rows(self.rows_path(batch.id))
            self.count(batch.id, total=batch.total, completed=completed, failed=failed)
            if store.has(batch.input_file_id):
                store.hold(batch.input_file_id)

    def on_change(self, call: Callable[[], None]) -> None:
        """Sets what is called, from any thread, when there is something new to do."""
        self._on_change = call

    def create(self, endpoint: Endpoint, input_file_id: str, metadata: Mapping[str, str]) -> Batch:
        """A new batch, which waits for its turn.

        Raises:
            ApiError: There is no such file, too many batches wait, or the disk is full.
        """
        with self._lock:
            waiting = sum(not batch.status.is_ended for batch in self._known.values())
            if waiting >= self.limits.max_waiting:
                raise ApiError(
                    f"{waiting} batches wait or run, which is the most; try again when one is done",
                    code="too_many_batches",
                    status_code=429,
                )
            self._check_purpose(self.files.hold(input_file_id))
            batch = Batch(
                id=files.new_id("batch_"),
                endpoint=endpoint,
                input_file_id=input_file_id,
                metadata=dict(metadata),
                status=Status.VALIDATING,
                times={Status.VALIDATING: int(self._clock())},
            )
            try:
                self._write(batch)
                self._forget_old()
            except OSError as error:
                self.files.release(input_file_id)
                raise data_dir.storage_error(error) from error
        self._on_change()
        return batch

    def _check_purpose(self, info: files.FileInfo) -> None:
        if info.purpose != "batch":
            self.files.release(info.id)
            raise ApiError(
                f"{info.id} is a result and no input; upload the rows with purpose 'batch'",
                param="input_file_id",
                code="invalid_purpose",
            )

    def get(self, batch_id: str) -> Batch:
        """A batch.

        Raises:
            ApiError: There is no such batch (404).
        """
        with self._lock:
            return self._get(batch_id)

    def _get(self, batch_id: str) -> Batch:
        batch = self._known.get(batch_id)
        if batch is None:
            raise ApiError(
                f"there is no batch {batch_id!r:.80}",
                param="batch_id",
                code="batch_not_found",
                status_code=404,
            )
        return batch

    def all(self) -> list[Batch]:
        """All batches, the newest first."""
        with self._lock:
            known = list(self._known.values())
        return sorted(known, key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def unended(self) -> list[Batch]:
        """Batches that are not at their end, the oldest first."""
        return [batch for batch in reversed(self.all()) if not batch.status.is_ended]

    def cancel(self, batch_id: str) -> Batch:
        """Asks for the end of a batch; its finished rows are kept.

        Raises:
            ApiError: There is no such batch (404), it is at its end (409), or the disk is full.
        """
        with self._lock:
            batch = self._get(batch_id)
            if batch.status is Status.CANCELLING:
                return batch
            if batch.status not in (Status.VALIDATING, Status.IN_PROGRESS):
                raise ApiError(
                    f"the batch is {batch.status} and cannot be cancelled",
                    param="batch_id",
                    code="batch_ended",
                    status_code=409,
                )
            try:
                changed = self._move(batch, Status.CANCELLING)
            except OSError as error:
                raise data_dir.storage_error(error) from error
        self._on_change()
        return changed

    def begin(self, batch_id: str, *, total: int) -> Batch:
        """Notes that the input was read; a batch that is being cancelled stays so."""
        with self._lock:
            batch = self._get(batch_id)
            if batch.status is Status.VALIDATING:
                return self._move(batch, Status.IN_PROGRESS, total=total)
            return batch

    def count(self, batch_id: str, *, total: int, completed: int, failed: int) -> None:
        """Shows how far a batch is; on disk the rows themselves say it."""
        with self._lock:
            self._known[batch_id] = dataclasses.replace(
                self._known[batch_id], total=total, completed=completed, failed=failed
            )

    def finalize(
        self, batch_id: str, ending: Status, *, problems: tuple[Problem, ...] = ()
    ) -> Batch:
        """Decides how a batch ends and what its result files will be called.

        Done again it changes nothing.
        """
        with self._lock:
            batch = self._get(batch_id)
            if batch.ending is not None or batch.status.is_ended:
                return batch
            if batch.status is Status.CANCELLING:
                ending, problems = Status.CANCELLED, ()
            completed, failed = _count_rows(self.rows_path(batch_id))
            return self._move(
                batch,
                batch.status if batch.status is Status.CANCELLING else Status.FINALIZING,
                ending=ending,
                problems=problems,
                total=max(batch.total, completed + failed),
                completed=completed,
                failed=failed,
                output_file_id=files.new_id("file-") if completed else None,
                error_file_id=files.new_id("file-") if failed else None,
            )

    def end(self, batch_id: str) -> Batch:
        """Makes the result files and ends the batch; done again after a kill, the same."""
        batch = self.get(batch_id)
        if batch.status.is_ended:
            return batch
        assert batch.ending is not None, f"{batch_id} was not finalized"
        self._split(batch)
        with self._lock:
            ended = self._move(self._get(batch_id), batch.ending)
        self.clean(batch_id)
        self.files.release(batch.input_file_id)
        return ended

    def _split(self, batch: Batch) -> None:
        rows = self.rows_path(batch.id)
        places = {
            False: (batch.output_file_id, f"{batch.id}_output.jsonl"),
            True: (batch.error_file_id, f"{batch.id}_error.jsonl"),
        }
        for is_error, (file_id, filename) in places.items():
            if file_id is None or self.files.has(file_id):
                continue
            partial = self._folder / f"{batch.id}.split"
            with open(partial, "wb") as made:
                for line, found in _read_rows(rows):
                    if found is is_error:
                        made.write(line)
            self.files.put(file_id, partial, filename=filename, purpose="batch_output")

    def rows_path(self, batch_id: str) -> Path:
        """The output of the batch's job, while it runs."""
        return self._folder / f"{batch_id}.rows"

    def clean(self, batch_id: str) -> None:
        """Removes the files of the job of a batch that ended."""
        rows = self.rows_path(batch_id)
        partial = atomic.partial_path(resume.beside(rows, ".job"))
        ours = [resume.beside(rows, ending) for ending in ("", ".job", ".lock")]
        for path in (*ours, partial, self._folder / f"{batch_id}.split"):
            path.unlink(missing_ok=True)

    def _move(self, batch: Batch, status: Status, **changes: Any) -> Batch:
        times = {**batch.times}
        times.setdefault(status, int(self._clock()))
        moved = dataclasses.replace(batch, status=status, times=times, **changes)
        self._write(moved)
        return moved

    def _write(self, batch: Batch) -> None:
        atomic.write_atomic(self._folder / f"{batch.id}.json", batch.encode())
        self._known[batch.id] = batch

    def _forget_old(self) -> None:
        """Drops the oldest batches that ended, above the most that are kept."""
        excess = len(self._known) - self.limits.max_batches
        ended = sorted(
            (batch for batch in self._known.values() if batch.status.is_ended),
            key=lambda batch: batch.created_at,
        )
        for batch in ended[: max(0, excess)]:
            (self._folder / f"{batch.id}.json").unlink()
            del self._known[batch.id]


def _read_rows(path: Path) -> Iterator[tuple[bytes, bool]]:
    """The complete lines of a job's output, each with whether it is an error.

    A line that a kill cut short is none; nor is one that the disk damaged, for which the job was
    refused and the batch says so.
    """
    if not path.exists():
        return
    with open(path, "rb") as lines:
        for line in lines:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if isinstance(row, dict) and "error" in row:
                yield line, row["error"] is not None


def _count_rows(path: Path) -> tuple[int, int]:
    found = [is_error for _, is_error in _read_rows(path)]
    return found.count(False), found.count(True)
