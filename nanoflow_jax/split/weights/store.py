"""The client's side: a model folder that is put together from parts, each known by its hash.

    DIR/fetched.json                    what is fetched: names and hashes
    DIR/config.json, tokenizer.json     as the gateway has them
    DIR/.HASH.safetensors.partial       the first bytes of a part
    DIR/HASH.safetensors                a part, whole and verified
    DIR/model.safetensors.index.json    which tensor is in which part; written last

Names of files come from hashes, and from our own list of text files; none from the gateway.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from checkpoints import content, files, huggingface, safetensors_file, text_files
from checkpoints.errors import CheckpointError, WritingError
from nanoflow_jax.split import messages

RECORD = "fetched.json"
_VERSION = 1


class DamagedError(Exception):
    """Bytes that are all there do not have the hash that they should have."""


class Store:
    """A folder of one model, held alone; it may be the folder of an interrupted fetch.

    Invariant: what stands under its final name had the right hash when it was put there.
    """

    def __init__(self, path: Path) -> None:
        """Use `opened`."""
        self.path = path

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> Iterator["Store"]:
        """Holds a folder, made if it is not there.

        Raises:
            CheckpointError: It cannot be made, another client fetches into it, or it holds
                something that no fetch left there.
            WritingError: The disk is full, or cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{path}: no folder can be made there ({error}); give another --weights_folder"
            ) from error
        busy = "another client fetches into it; wait for it or give another --weights_folder"
        with files.locked(path, busy=busy):
            store = cls(path)
            others = {one.name for one in path.iterdir()} - {files.partial_path(path / RECORD).name}
            if others and RECORD not in others:
                raise CheckpointError(
                    f"{path}: holds {min(others)!r}, which no fetch left there; give "
                    "--weights_folder a new or empty folder"
                )
            with _writing(path):
                yield store

    def begin(self, blobs: Sequence[messages.Blob]) -> None:
        """Says what is to be fetched, before anything is.

        Raises:
            CheckpointError: The folder holds parts of another model, or the blobs cannot be told
                apart from it.
            WritingError: The disk has too little room.
        """
        record = self._record()
        for blob in blobs:
            known = record.get(blob.name, blob.sha256)
            if known != blob.sha256:
                raise CheckpointError(
                    f"{self.path}: holds {blob.name} with hash {known:.12}, and the gateway has "
                    f"{blob.sha256:.12}: its model is another, or was changed since; the two are "
                    "not mixed: give another --weights_folder, or delete this one"
                )
        left = sum(blob.nbytes - self.num_done(blob) for blob in blobs)
        free = shutil.disk_usage(self.path).free
        if free < left:
            raise WritingError(
                f"{self.path}: {left} bytes are still to be fetched and the disk has {free} free; "
                "make room, or give another --weights_folder"
            )
        record |= {blob.name: blob.sha256 for blob in blobs}
        fields = {"version": _VERSION, "blobs": record}
        files.write_atomic(self.path / RECORD, (json.dumps(fields, indent=1) + "\n").encode())

    def _record(self) -> dict[str, str]:
        path = self.path / RECORD
        if not os.path.lexists(path):
            return {}
        advice = "delete the folder and fetch again"
        fields = files.parse_json_object(files.read_bytes(path, advice=advice), file=path)
        match fields:
            case {"version": 1, "blobs": dict() as blobs}:
                if all(isinstance(found, str) for found in blobs.values()):
                    return blobs
        raise CheckpointError(f"{path}: is no record of what was fetched; {advice}")

    def num_done(self, blob: messages.Blob) -> int:
        """How many of its bytes are here."""
        if self._path(blob).is_file():
            return blob.nbytes
        partial = files.partial_path(self._path(blob))
        return min(partial.stat().st_size, blob.nbytes) if partial.is_file() else 0

    def is_sound(self, blob: messages.Blob) -> bool:
        """Whether it is here, and has its hash; what is damaged is removed.

        Raises:
            DamagedError: It was here, and is removed.
        """
        path = self._path(blob)
        if not path.is_file():
            return False
        if content.file_sha256(path) == blob.sha256:
            return True
        path.unlink()
        raise DamagedError(f"{path} was damaged")

    @contextlib.contextmanager
    def appending(self, blob: messages.Blob) -> Iterator[BinaryIO]:
        """Its first bytes, to which more are written."""
        partial = files.partial_path(self._path(blob))
        if partial.is_file() and partial.stat().st_size > blob.nbytes:
            partial.unlink()
        with open(partial, "ab") as file:
            yield file

    def finish(self, blob: messages.Blob) -> None:
        """Gives what is whole its final name.

        Raises:
            DamagedError: It has another hash, and is removed.
        """
        partial = files.partial_path(self._path(blob))
        found = content.file_sha256(partial)
        if found != blob.sha256:
            partial.unlink()
            raise DamagedError(f"{blob.name} came with hash {found:.12}, not {blob.sha256:.12}")
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, self._path(blob))
        files.sync_folder(self.path)

    def write_index(self, blobs: Sequence[messages.Blob]) -> None:
        """Makes the folder one that can be opened, with these parts and no others.

        Raises:
            CheckpointError: A part is no safetensors file.
        """
        weight_map: dict[str, str] = {}
        for path in (self._path(blob) for blob in blobs if not _is_text(blob)):
            weight_map |= dict.fromkeys(safetensors_file.read_header(path), path.name)
        data = (json.dumps({"weight_map": weight_map}, indent=1) + "\n").encode()
        files.write_atomic(self.path / huggingface.INDEX, data)

    def _path(self, blob: messages.Blob) -> Path:
        """Where it is once it is whole."""
        # Of our own list, or made of a hash, whose form its message checks.
        return self.path / (blob.name if _is_text(blob) else f"{blob.sha256}.safetensors")


def _is_text(blob: messages.Blob) -> bool:
    return blob.name in text_files.NAMES


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = " is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise WritingError(
            f"{path}: the disk{full or ' cannot be written'} ({error}); make room or check "
            "permissions, then run it again: it goes on where it stopped"
        ) from error
