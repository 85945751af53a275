"""Reading JSON that nobody vouches for, and writing files that are whole or absent."""

import collections
import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000


def check_plain_name(name: object, *, file: Path, what: str) -> str:
    """Return `name` if it names a file directly inside a folder.

    Args:
        name: What a file or a caller gave as a name.
        file: The file or folder the name was found in, for the message.
        what: What the name stands for, for the message.

    Raises:
        CheckpointError: it is not a string, is empty, or has a path part.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise CheckpointError(
            f"{file}: {what} must be a plain file name inside the folder, got {name!r}; "
            f"names with folders in them are not followed"
        )
    return name


def read_bytes(path: Path, *, advice: str) -> bytes:
    """All bytes of a small regular file.

    Args:
        path: The file.
        advice: What the user can do if it is not there, for the message.

    Raises:
        CheckpointError: it is missing, not a regular file, too large for JSON, or not readable.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file; {advice}")
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: {num_bytes} bytes, more than the {MAX_JSON_BYTES} allowed; {advice}"
            )
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check its permissions") from error


def parse_json_object(
    text: bytes, *, file: Path, what: str = "the file", unique_keys: bool = False
) -> dict[str, Any]:
    """Parse bytes that should hold one JSON object.

    Args:
        text: UTF-8 JSON.
        file: Where the bytes came from, for messages.
        what: Which part of the file they are, for messages.
        unique_keys: Refuse an object, at any depth, that says a key twice.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, nested too deeply, or a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{file}: {what} has the key {twice!r} twice; {_AGAIN}")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once if unique_keys else None)
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: {what} is not UTF-8 ({error}); {_AGAIN}") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: {what} nests JSON too deeply; {_AGAIN}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: {what} is not JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file}: {what} must be a JSON object, got {type(value).__name__}; {_AGAIN}"
        )
    return value


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that after any crash is either whole or as it was before."""
    partial = partial_path(path)
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def partial_path(path: Path) -> Path:
    """Where `path` is put together before it is renamed into place."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def locked(folder: Path, *, busy: str) -> Iterator[None]:
    """Hold a folder alone; the kernel lets go even after kill -9.

    Args:
        folder: The folder.
        busy: What to say and to do if somebody else holds it, for the message.

    Raises:
        CheckpointError: somebody else holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{folder}: {busy}") from error
        yield
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make the renames done in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_AGAIN = "the file is damaged or not what its name says: get it again"
