"""The safetensors format: a checked header, memory-mapped tensors, and a writer.

A file is the header's length (8 bytes, little-endian), the header (a JSON object), and the
tensors' bytes, which the header must cover without a gap or an overlap:

    [0, 8) length n    [8, 8 + n) header    [8 + n, end) buffer

Nothing in the header is believed before it is checked against the size of the file.

Source: https://github.com/huggingface/safetensors, "Format" and safetensors/src/tensor.rs.
"""

import hashlib
import json
import mmap
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from checkpoints import files, tensor_types
from checkpoints.errors import CheckpointError
from checkpoints.tensor_types import TensorSpec

_MAX_HEADER_BYTES = 100_000_000  # The limit of the reference implementation.
_ALIGNMENT = 64  # The format asks for 8; 64 is a cache line.
_AGAIN = "the file is truncated or damaged: download it again"


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies in a safetensors file, checked against that file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    start: int  # Byte of the file at which it begins.
    nbytes: int


class SafetensorsFile:
    """One safetensors file, its header checked and its tensors memory-mapped.

    Invariant: every entry of `tensors` lies inside the file as it was when opened.
    """

    def __init__(self, path: Path):
        """Open and check a file.

        Raises:
            CheckpointError: it is not a whole and valid safetensors file.
        """
        self.path = path
        if not os.path.isfile(path):
            raise CheckpointError(
                f"{path}: no such file; download the whole model, with all its *.safetensors files"
            )
        try:
            with open(path, "rb") as file:
                self.file_bytes = os.fstat(file.fileno()).st_size
                header = _read_header_bytes(file, path=path, file_bytes=self.file_bytes)
                self.header_sha256 = hashlib.sha256(header).hexdigest()
                self.tensors, self.metadata = _parse_header(
                    header, path=path, file_bytes=self.file_bytes
                )
                self._mapped = mmap.mmap(file.fileno(), self.file_bytes, access=mmap.ACCESS_READ)
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:  # ValueError: it shrank since its size was read.
            raise CheckpointError(
                f"{path}: cannot be read ({error}); check the file's permissions and the disk"
            ) from error

    def view(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A tensor as a read-only view of the mapped file; nothing is read until it is used.

        Args:
            name: A key of `tensors`.

        Raises:
            CheckpointError: the file has changed its size since it was opened.
        """
        if self._mapped.size() != self.file_bytes:
            raise CheckpointError(
                f"{self.path}: was {self.file_bytes} bytes and is now {self._mapped.size()}; "
                f"it changed while it was in use: start again when nothing writes to it"
            )
        info = self.tensors[name]
        if info.nbytes == 0:
            return np.empty(info.shape, info.dtype)
        flat = np.frombuffer(
            self._mapped, info.dtype, count=info.nbytes // info.dtype.itemsize, offset=info.start
        )
        return flat.reshape(info.shape)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a tensor, not through the mapped file.

        Raises:
            CheckpointError: the file is shorter than when it was opened, or cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                data = os.pread(file.fileno(), stop - start, self.tensors[name].start + start)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}); {_AGAIN}") from error
        if len(data) != stop - start:
            raise CheckpointError(
                f"{self.path}: bytes [{start}, {stop}) of tensor {name!r} are not there any more; "
                f"it changed while it was in use: start again when nothing writes to it"
            )
        return data

    def give_back_memory(self) -> None:
        """Let the kernel drop what was read through views; they stay valid and read it again."""
        self._mapped.madvise(mmap.MADV_DONTNEED)


def read_header(path: Path | str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: it is not a whole and valid safetensors file.
    """
    return dict(SafetensorsFile(Path(path)).tensors)


def write_safetensors(
    path: Path | str,
    tensors: Mapping[str, Shaped[np.ndarray, "..."]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file that after any crash is either whole or not there.

    Args:
        path: Written by rename, replacing what is there.
        tensors: Stored in this order, under these names.
        metadata: Free text kept in the header.

    Raises:
        CheckpointError: a dtype that the format has no name for.
    """
    path = Path(path)
    start = start_bytes(tensors, metadata)
    partial = files.partial_path(path)
    with open(partial, "wb") as file:
        file.write(start)
        for tensor in tensors.values():
            file.write(tensor_types.raw_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    files.sync_folder(path.parent)


def start_bytes(
    tensors: Mapping[str, TensorSpec] | Mapping[str, Shaped[np.ndarray, "..."]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """What a file of some tensors, in this order, has before their bytes.

    Args:
        tensors: By their names; only dtype, shape and size are looked at.
        metadata: Free text kept in the header.

    Raises:
        CheckpointError: a dtype that the format has no name for.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor_types.dtype_code(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _read_header_bytes(file: BinaryIO, *, path: Path, file_bytes: int) -> bytes:
    """The header's JSON text, once its length is known to be possible."""
    if file_bytes < 8:
        raise CheckpointError(
            f"{path}: is {file_bytes} bytes, less than the 8 that every safetensors file begins "
            f"with; {_AGAIN}"
        )
    num_bytes = int.from_bytes(file.read(8), "little")
    if num_bytes > _MAX_HEADER_BYTES or num_bytes > file_bytes - 8:
        raise CheckpointError(
            f"{path}: says its header is {num_bytes} bytes, but the file has {file_bytes - 8} "
            f"after that number and no header is over {_MAX_HEADER_BYTES}; {_AGAIN}"
        )
    header = file.read(num_bytes)
    if len(header) != num_bytes or not header.startswith(b"{"):
        raise CheckpointError(
            f"{path}: the header must be {num_bytes} bytes that begin with '{{', got "
            f"{len(header)} that begin with {header[:8]!r}; {_AGAIN}"
        )
    return header


def _parse_header(
    header: bytes, *, path: Path, file_bytes: int
) -> tuple[Mapping[str, TensorInfo], Mapping[str, str]]:
    """Tensors in the order of their bytes, and the free text, from a header's JSON."""
    entries = files.parse_json_object(header, file=path, what="the header", unique_keys=True)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{path}: __metadata__ must map names to strings, got {reprlib.repr(metadata)}; "
            f"{_AGAIN}"
        )
    buffer = 8 + len(header)
    infos = [_parse_entry(n, e, path=path, buffer=buffer) for n, e in entries.items()]
    infos.sort(key=lambda info: (info.start, info.nbytes))
    covered = buffer
    for info in infos:
        if info.start != covered:
            problem = "leaves a gap after" if info.start > covered else "overlaps"
            raise CheckpointError(
                f"{path}: tensor {info.name!r} begins at byte {info.start - buffer} of the buffer "
                f"and {problem} the one before it, which ends at {covered - buffer}; {_AGAIN}"
            )
        covered += info.nbytes
    if covered != file_bytes:
        raise CheckpointError(
            f"{path}: the header describes a file of {covered} bytes, got {file_bytes}; {_AGAIN}"
        )
    return MappingProxyType({info.name: info for info in infos}), MappingProxyType(metadata)


def _parse_entry(name: str, entry: object, *, path: Path, buffer: int) -> TensorInfo:
    """One tensor of the header; `buffer` is the byte of the file at which the buffer begins."""
    where = f"{path}: tensor {name!r}"
    if not name or not name.isprintable():
        raise CheckpointError(f"{where}: a name must be printable and not empty; {_AGAIN}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: wanted an object with dtype, shape and data_offsets, got "
            f"{reprlib.repr(entry)}; {_AGAIN}"
        )
    dtype = tensor_types.parse_dtype(entry["dtype"], where=where)
    shape = tensor_types.parse_shape(entry["shape"], where=where)
    match entry["data_offsets"]:
        case [begin, end] if all(map(tensor_types.is_count, (begin, end))) and begin <= end:
            pass
        case offsets:
            raise CheckpointError(
                f"{where}: data_offsets must be [begin, end] with 0 <= begin <= end, got "
                f"{reprlib.repr(offsets)}; {_AGAIN}"
            )
    nbytes = tensor_types.spec_bytes(shape, dtype)
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where}: {entry['dtype']} of shape {list(shape)} takes {nbytes} bytes, but "
            f"data_offsets span {end - begin}; {_AGAIN}"
        )
    return TensorInfo(
        name=name, dtype=dtype, shape=shape, file=path, start=buffer + begin, nbytes=nbytes
    )
