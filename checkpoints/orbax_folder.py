"""The weights of a converted folder: Orbax checkpoints, and a manifest of what is in them.

    DIR/config.json, tokenizer.json, ...   copied from the source
    DIR/parts/00000, 00001, ...            Orbax checkpoints; each a flat tree of whole tensors
    DIR/unfinished.json                    which parts are done, while a conversion goes on
    DIR/manifest.json                      every tensor, its part and its hash; written last

Parts are read with TensorStore, which underlies Orbax, because Orbax itself does not read part of
an array into host memory.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Shaped

from checkpoints import files, tensor_types, text_files
from checkpoints.errors import CheckpointError

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
PARTS = "parts"
LAYOUT = "safetensors-in-orbax-parts"
_VERSION = 1
_CACHE_BYTES = 100_000_000  # For the B-tree nodes that say where in a part a tensor lies.
_AGAIN = "the conversion is damaged: delete the folder and convert again"


@dataclass(frozen=True, kw_only=True)
class OrbaxTensor:
    """One tensor of a conversion."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    part: str | None  # Folder under parts/. None: it has no elements, and Orbax stores none such.
    sha256: str  # Of its bytes in row-major order, taken while it was copied.

    @property
    def nbytes(self) -> int:
        """Its size as stored."""
        return tensor_types.spec_bytes(self.shape, self.dtype)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a conversion holds, and of what it is a conversion."""

    source_fingerprint: str
    tensors: Mapping[str, OrbaxTensor]
    text_sha256: Mapping[str, str]  # By name of the copied file.
    layout: str = LAYOUT  # What the folder is, or will be once it is finished.

    def to_json(self) -> bytes:
        """As it is written to a file."""
        tensors = {
            tensor.name: {
                "dtype": tensor_types.dtype_code(tensor.dtype),
                "shape": list(tensor.shape),
                "part": tensor.part,
                "sha256": tensor.sha256,
            }
            for tensor in self.tensors.values()
        }
        fields = {
            "format": self.layout,
            "version": _VERSION,
            "source_fingerprint": self.source_fingerprint,
            "text_sha256": dict(self.text_sha256),
            "tensors": tensors,
        }
        return (json.dumps(fields, indent=1) + "\n").encode()

    @classmethod
    def read(cls, path: Path, *, layout: str = LAYOUT) -> "Manifest":
        """Read and check a manifest.

        Raises:
            CheckpointError: it is not a manifest of this version, or of another layout.
        """
        text = files.read_bytes(path, advice=_AGAIN)
        fields = files.parse_json_object(text, file=path, unique_keys=True)
        if (fields.get("format"), fields.get("version")) != (layout, _VERSION):
            raise CheckpointError(
                f"{path}: wanted format {layout!r} version {_VERSION}, got "
                f"{fields.get('format')!r} version {fields.get('version')!r}; "
                f"convert into a new folder with this version of the program"
            )
        match fields:
            case {
                "source_fingerprint": str() as fingerprint,
                "text_sha256": dict() as text_sha256,
                "tensors": dict() as tensors,
            } if all(map(_is_sha256, [fingerprint, *text_sha256.values()])):
                for name in text_sha256:
                    text_files.check_name(name, file=path)
                return cls(
                    source_fingerprint=fingerprint,
                    tensors=MappingProxyType(
                        {n: _parse_tensor(n, entry, path=path) for n, entry in tensors.items()}
                    ),
                    text_sha256=MappingProxyType(text_sha256),
                    layout=layout,
                )
        raise CheckpointError(
            f"{path}: wanted source_fingerprint, text_sha256 and tensors, got fields that are "
            f"missing or of the wrong kind; {_AGAIN}"
        )


class OrbaxWeights:
    """Every tensor of a finished conversion, read whole or in part."""

    def __init__(self, folder: Path):
        """Open a conversion; reads its manifest and no weights.

        Raises:
            CheckpointError: it is unfinished, damaged, or lacks a part.
        """
        if not os.path.isfile(folder / MANIFEST):
            raise CheckpointError(
                f"{folder}: conversion unfinished (its last file is not there yet): run convert "
                f"again with the same --model and --output, and it goes on where it stopped"
            )
        self.folder = folder
        self.manifest = Manifest.read(folder / MANIFEST)
        self.tensors: Mapping[str, OrbaxTensor] = self.manifest.tensors
        for part in {tensor.part for tensor in self.tensors.values()} - {None}:
            if not os.path.isdir(folder / PARTS / str(part)):
                raise CheckpointError(f"{folder / PARTS / str(part)}: no such folder; {_AGAIN}")
        self._context = tensorstore.Context(
            {"cache_pool#ocdbt": {"total_bytes_limit": _CACHE_BYTES}}
        )

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A whole tensor in a fresh array."""
        return self.read_slice(name, tuple(slice(0, size) for size in self.tensors[name].shape))

    def read_slice(self, name: str, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """Part of a tensor in a fresh array; only the chunks it lies in are read."""
        tensor = self.tensors[name]
        if tensor.part is None:
            return np.empty(tensor.shape, tensor.dtype)[index]
        where = f"{self.folder / PARTS / tensor.part}: tensor {name!r}"
        try:
            stored = tensorstore.open(
                _spec(self.folder / PARTS / tensor.part, name),
                open=True,
                read=True,
                context=self._context,
            ).result()
            if (stored.shape, stored.dtype.numpy_dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(
                    f"{where}: {MANIFEST} says {tensor.dtype}{list(tensor.shape)}, stored is "
                    f"{stored.dtype.name}{list(stored.shape)}; {_AGAIN}"
                )
            return np.asarray(stored[index].read().result())
        except CheckpointError:
            raise
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{where}: cannot be read ({error}); {_AGAIN}") from error

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a tensor in row-major order; whole rows of it are read."""
        tensor = self.tensors[name]
        row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape else tensor.nbytes
        rows = slice(start // row_bytes, -(-stop // row_bytes))
        index = (rows, *(slice(0, size) for size in tensor.shape[1:])) if tensor.shape else ()
        first = rows.start * row_bytes
        return bytes(
            tensor_types.raw_bytes(self.read_slice(name, index))[start - first : stop - first]
        )

    def files(self) -> list[Path]:
        """Every file that tensors lie in, and the manifest."""
        inside = (path for path in (self.folder / PARTS).rglob("*") if path.is_file())
        return [self.folder / MANIFEST, *sorted(inside)]

    def identity(self) -> bytes:
        """Hash of the manifest, which has the hash of every tensor."""
        return hashlib.sha256(self.manifest.to_json()).digest()


def is_conversion(folder: Path) -> bool:
    """Whether a folder is a conversion, finished or not."""
    return any(os.path.lexists(folder / name) for name in (MANIFEST, UNFINISHED))


def _spec(part: Path, name: str) -> dict[str, Any]:
    """Where TensorStore finds a tensor in a part written by Orbax (`state` is Orbax's name)."""
    return {
        "driver": "zarr3",
        "fill_missing_data_reads": False,  # Else lost bytes would read as zeros.
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{part.absolute()}/state/"},
            "path": f"{name}/",
            "cache_pool": "cache_pool#ocdbt",
        },
    }


def _parse_tensor(name: str, entry: object, *, path: Path) -> OrbaxTensor:
    where = f"{path}: tensor {name!r}"
    match entry:
        case {"dtype": dtype, "shape": shape, "part": part, "sha256": str() as sha256}:
            tensor = OrbaxTensor(
                name=name,
                dtype=tensor_types.parse_dtype(dtype, where=where),
                shape=tensor_types.parse_shape(shape, where=where),
                part=part,
                sha256=sha256,
            )
            in_a_part = isinstance(part, str) and re.fullmatch(r"[0-9]{5,9}", part) is not None
            if _is_sha256(sha256) and (in_a_part if tensor.nbytes else part is None):
                return tensor
    raise CheckpointError(
        f"{where}: wanted dtype, shape, part (a number, or null if it has no elements) and sha256, "
        f"got {entry!r:.200}; {_AGAIN}"
    )


def _is_sha256(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None
