"""Uploaded files and results of batches, on disk: each is there whole or not at all.

`ID` holds the bytes and `ID.json` what is known of them; a file exists if and only if `ID.json`
does. Ids are drawn here: what a client calls its file is kept as text and never becomes a path.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from checkpoints import files as atomic
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.serve import data_dir

MAX_NAME_LEN = 256
_ID = re.compile(r"file-[0-9a-f]{24}")
_OURS = re.compile(rf"\.?({_ID.pattern})(\.json)?(\.partial)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the store takes.

    Attributes:
        max_file_bytes: Of one upload.
        max_file_lines: Of one upload: a line costs memory while its batch runs.
        max_files: In the store, results of batches not counted.
        max_uploads: At once.
    """

    max_file_bytes: int = 512 << 20
    max_file_lines: int = 1_000_000
    max_files: int = 10_000
    max_uploads: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileInfo:
    """What is known of a file.

    Attributes:
        id: Drawn by the store.
        bytes: Size.
        created_at: Seconds since 1970.
        filename: What the client called it, or what we call a result.
        purpose: `batch` or `batch_output`.
    """

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str


class FileStore:
    """The files of a server. Safe to share between threads; every method may wait for the disk.

    Invariant: `_known` has exactly the files whose `ID.json` is on disk.
    """

    def __init__(
        self, folder: Path, limits: Limits | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Opens a store and removes what uploads left that a kill cut off.

        Args:
            folder: Made if need be; nobody else writes there.
            limits: What it takes.
            clock: Seconds since 1970.

        Raises:
            ValueError: A file of ours is damaged; the message names it.
        """
        self.limits = limits or Limits()
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._holds: Counter[str] = Counter()
        self._num_uploads = 0
        folder.mkdir(mode=0o700, exist_ok=True)
        self._known = {
            info.id: info for info in map(_read_info, sorted(folder.glob("file-*.json")))
        }
        for path in folder.iterdir():
            ours = _OURS.fullmatch(path.name)
            if ours is not None and (path.name.endswith(".partial") or ours[1] not in self._known):
                path.unlink()

    @contextlib.contextmanager
    def upload(self) -> Iterator["Upload"]:
        """A new file to be written; it is dropped unless it was committed.

        Raises:
            ApiError: There are too many files or uploads.
        """
        with self._lock:
            if self._num_uploads >= self.limits.max_uploads:
                raise ApiError(
                    f"{self._num_uploads} uploads are under way; try again when one is done",
                    code="too_many_uploads",
                    status_code=429,
                )
            self._check_room(self._num_uploads)
            self._num_uploads += 1
        try:
            with contextlib.closing(Upload(self, self._folder, new_id("file-"))) as made:
                yield made
        finally:
            with self._lock:
                self._num_uploads -= 1

    def _check_room(self, more: int) -> None:
        count = sum(info.purpose == "batch" for info in self._known.values()) + more
        if count >= self.limits.max_files:
            raise ApiError(
                f"{self.limits.max_files} files are stored, which is the most; delete some",
                code="too_many_files",
                status_code=429,
            )

    def put(self, file_id: str, partial: Path, *, filename: str, purpose: str) -> FileInfo:
        """Makes a file of bytes that lie ready, whole or not at all.

        Done again after a kill it ends up the same.

        Args:
            file_id: Its id.
            partial: On the same disk; it is moved.
            filename: How it is called.
            purpose: What for.

        Raises:
            OSError: The disk refuses; there is no such file then.
        """
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
            num_bytes = os.fstat(file.fileno()).st_size
        place, known = self._folder / file_id, self._folder / f"{file_id}.json"
        info = FileInfo(
            id=file_id,
            bytes=num_bytes,
            created_at=int(self._clock()),
            filename=filename,
            purpose=purpose,
        )
        try:
            os.replace(partial, place)
            atomic.write_atomic(known, json.dumps(dataclasses.asdict(info)).encode())
        except OSError:
            for path in (place, atomic.partial_path(known)):
                path.unlink(missing_ok=True)
            raise
        with self._lock:
            self._known[file_id] = info
        return info

    def has(self, file_id: str) -> bool:
        """Whether there is such a file."""
        with self._lock:
            return file_id in self._known

    def get(self, file_id: str) -> FileInfo:
        """What is known of a file.

        Raises:
            ApiError: There is no such file (404).
        """
        with self._lock:
            return self._get(file_id)

    def _get(self, file_id: str) -> FileInfo:
        info = self._known.get(file_id)
        if info is None:
            raise ApiError(
                f"there is no file {file_id!r:.80}",
                param="file_id",
                code="file_not_found",
                status_code=404,
            )
        return info

    def all(self) -> list[FileInfo]:
        """All files, the newest first."""
        with self._lock:
            known = list(self._known.values())
        return sorted(known, key=lambda info: (info.created_at, info.id), reverse=True)

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are.

        Raises:
            ApiError: There is no such file (404).
        """
        return self._folder / self.get(file_id).id

    def open(self, file_id: str) -> tuple[FileInfo, BinaryIO]:
        """A file's bytes, which stay readable even if it is deleted meanwhile.

        Raises:
            ApiError: There is no such file (404), or it cannot be read.
        """
        with self._lock:
            info = self._get(file_id)
            try:
                return info, open(self._folder / info.id, "rb")
            except OSError as error:
                raise data_dir.storage_error(error) from error

    def hold(self, file_id: str) -> FileInfo:
        """Keeps a file from being deleted until it is released as often.

        Raises:
            ApiError: There is no such file (404).
        """
        with self._lock:
            info = self._get(file_id)
            self._holds[file_id] += 1
            return info

    def release(self, file_id: str) -> None:
        """Undoes one hold."""
        with self._lock:
            assert self._holds[file_id] > 0 or file_id not in self._known, f"{file_id} is not held"
            self._holds[file_id] = max(0, self._holds[file_id] - 1)

    def delete(self, file_id: str) -> None:
        """Deletes a file.

        Raises:
            ApiError: There is no such file (404), or a batch needs it (409).
        """
        with self._lock:
            info = self._get(file_id)
            if self._holds[file_id] > 0:
                raise ApiError(
                    f"a batch still reads {file_id}; cancel the batch, or wait for its end",
                    param="file_id",
                    code="file_in_use",
                    status_code=409,
                )
            del self._known[file_id]
        place, known = self._folder / info.id, self._folder / f"{info.id}.json"
        try:
            # In this order: a kill in between leaves bytes without a name, not the reverse.
            known.unlink()
            atomic.sync_folder(self._folder)
            place.unlink()
        except OSError as error:
            if known.exists():
                with self._lock:
                    self._known[file_id] = info
            raise data_dir.storage_error(error) from error


class Upload:
    """A file while it comes in. A cancelled request may close it while a thread still writes."""

    def __init__(self, store: FileStore, folder: Path, file_id: str) -> None:
        self._store = store
        self._id = file_id
        self._partial = atomic.partial_path(folder / file_id)
        self._num_bytes = self._num_lines = 0
        self._lock = threading.Lock()
        try:
            self._file = open(self._partial, "wb", buffering=0)  # noqa: SIM115 - closed by close
        except OSError as error:
            raise data_dir.storage_error(error) from error

    @property
    def max_bytes(self) -> int:
        """Most bytes that it may get."""
        return self._store.limits.max_file_bytes

    def write(self, data: bytes) -> None:
        """Adds bytes.

        Raises:
            ApiError: The file becomes too big (413) or the disk is full (507).
        """
        limits = self._store.limits
        self._num_bytes += len(data)
        self._num_lines += data.count(b"\n")
        if self._num_bytes > limits.max_file_bytes:
            raise too_large(limits.max_file_bytes)
        if self._num_lines > limits.max_file_lines:
            raise ApiError(
                f"the file has more than {limits.max_file_lines} lines; split it into several",
                param="file",
                code="too_many_lines",
                status_code=413,
            )
        left = memoryview(data)
        with self._lock:
            try:
                while left and not self._file.closed:
                    left = left[os.write(self._file.fileno(), left) :]
            except OSError as error:
                raise data_dir.storage_error(error) from error

    def commit(self, *, filename: str) -> FileInfo:
        """Makes the file visible, for batches.

        Raises:
            ApiError: It is empty, or the disk is full.
        """
        if not self._num_bytes:
            raise ApiError("the file is empty", param="file", code="empty_file")
        with self._lock:
            try:
                return self._store.put(
                    self._id, self._partial, filename=filename[:MAX_NAME_LEN], purpose="batch"
                )
            except OSError as error:
                raise data_dir.storage_error(error) from error

    def close(self) -> None:
        """Drops what was not committed."""
        with self._lock:
            self._file.close()
            self._partial.unlink(missing_ok=True)


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return prefix + secrets.token_hex(12)


def too_large(max_bytes: int) -> ApiError:
    """The answer to a file of more bytes."""
    return ApiError(
        f"the file has more than {max_bytes} bytes; split it into several",
        param="file",
        code="file_too_large",
        status_code=413,
    )


def _read_info(path: Path) -> FileInfo:
    try:
        info = FileInfo(**json.loads(path.read_bytes()))
        if _ID.fullmatch(info.id) is None or path.name != f"{info.id}.json":
            raise ValueError(f"it speaks of {info.id!r:.80}")
        if not path.with_name(info.id).is_file():
            raise ValueError("the file that it describes is not there")
        return info
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); move it out of --data_dir and start again"
        ) from error
