"""Parts of a model by the hash of what is in them.

A part is some tensors of a model, taken as the bytes of a safetensors file that has just these:

    [0, n) the file's start, from names, dtypes and shapes    [n, nbytes) the tensors, widest first

So two folders that store the same tensors in other files, or one of them in Orbax, have the same
parts, and a part that is written to a file can be opened as one.
"""

import concurrent.futures
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from checkpoints import conversion, files, safetensors_file
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder

_LOG = logging.getLogger(__name__)
READ_BYTES = 1 << 24  # Most that is in memory of a part; of a tensor in Orbax, or one row of it.
_THREADS = 4
_VERSION = 1
# A file that was changed this lately may be changed again and keep its time.
_SETTLED_NS = 2_000_000_000


class Part:
    """Some tensors of a folder as the bytes of a file.

    Attributes:
        nbytes: How many they are.
    """

    def __init__(self, folder: ModelFolder, names: Iterable[str]) -> None:
        """Reads no weights.

        Raises:
            CheckpointError: The folder lacks one of the tensors.
        """
        self._folder = folder
        specs = [folder.spec(name) for name in names]
        # Wide dtypes first, so that every tensor is aligned.
        self._specs = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
        self._start = safetensors_file.start_bytes({spec.name: spec for spec in self._specs})
        self.nbytes = len(self._start) + sum(spec.nbytes for spec in self._specs)

    @property
    def key(self) -> str:
        """Hex sha256 of names, dtypes and shapes."""
        return hashlib.sha256(self._start).hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), or up to the end.

        Raises:
            CheckpointError: A file changed or broke since the folder was opened.
        """
        found = [self._start[start:stop]]
        begin = len(self._start)
        for spec in self._specs:
            low, high = max(start - begin, 0), min(stop - begin, spec.nbytes)
            if low < high:
                found.append(self._folder.read_range(spec.name, low, high))
            begin += spec.nbytes
        return b"".join(found)

    def chunks(self) -> Iterator[bytes]:
        """All its bytes."""
        for start in range(0, self.nbytes, READ_BYTES):
            yield self.read(start, start + READ_BYTES)


def sha256_of(chunks: Iterable[bytes]) -> str:
    """Hex sha256 of bytes that come in chunks."""
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk)
    return found.hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, which is read in chunks.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        return sha256_of(iter(lambda: file.read(READ_BYTES), b""))


def hashes(
    folder: ModelFolder,
    parts: Mapping[str, Part],
    *,
    cache: Path | None = None,
    progress: conversion.Progress | None = None,
) -> dict[str, str]:
    """Hex sha256 of parts of a folder; reads all of them, unless it did before.

    Args:
        folder: The folder.
        parts: By any names.
        cache: Where hashes of earlier calls are kept, by the files' paths, sizes, inodes and
            times. What is there is believed only whole; a folder that cannot be written is none.
        progress: Called with the bytes hashed so far and in all.

    Raises:
        CheckpointError: A file changed while it was read, or broke.
    """
    stamp = folder.stamp()
    kept = None if cache is None else cache / f"{_sha256(str(folder.path.resolve()))}.json"
    known = {} if kept is None else _read_known(kept, stamp)
    left = {name: part for name, part in parts.items() if part.key not in known}
    total, done = sum(part.nbytes for part in left.values()), 0
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        futures = {
            pool.submit(lambda part: sha256_of(part.chunks()), part): part for part in left.values()
        }
        try:
            for future in concurrent.futures.as_completed(futures):
                part = futures[future]
                known[part.key] = future.result()
                done += part.nbytes
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Else all parts would be read first.
            raise
    if folder.stamp() != stamp:
        raise CheckpointError(
            f"{folder.path}: changed while it was read; start again when nothing writes to it"
        )
    if left and kept is not None and time.time_ns() - folder.changed_ns() > _SETTLED_NS:
        _keep_known(kept, stamp, known)
    return {name: known[part.key] for name, part in parts.items()}


def _read_known(path: Path, stamp: str) -> dict[str, str]:
    """Hashes by keys of parts; none unless they are whole and of the files as they are."""
    try:
        found = json.loads(path.read_bytes())
        fields = found["fields"]
        if found["sha256"] == _sha256(_text(fields)) and fields["version"] == _VERSION:
            return dict(fields["parts"]) if fields["stamp"] == stamp else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # Nothing is kept there, or nothing that can be used: it is computed again.
    return {}


def _keep_known(path: Path, stamp: str, parts: Mapping[str, str]) -> None:
    fields = {"version": _VERSION, "stamp": stamp, "parts": dict(parts)}
    whole = {"fields": fields, "sha256": _sha256(_text(fields))}
    try:
        os.makedirs(path.parent, exist_ok=True)
        files.write_atomic(path, json.dumps(whole).encode())
    except OSError as error:
        _LOG.warning("hashes of weights are not kept (%s); the next start computes them", error)


def _text(fields: object) -> str:
    return json.dumps(fields, sort_keys=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
