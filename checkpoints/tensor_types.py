"""What a stored tensor may be: the safetensors dtype codes and the limits on a shape."""

import hashlib
import math
import reprlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from checkpoints.errors import CheckpointError

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        code: np.dtype(kind)
        for code, kind in {
            "BOOL": np.bool_,
            "U8": np.uint8,
            "I8": np.int8,
            "U16": np.uint16,
            "I16": np.int16,
            "U32": np.uint32,
            "I32": np.int32,
            "U64": np.uint64,
            "I64": np.int64,
            "F16": np.float16,
            "BF16": ml_dtypes.bfloat16,
            "F32": np.float32,
            "F64": np.float64,
            "C64": np.complex64,
            "F8_E4M3": ml_dtypes.float8_e4m3fn,
            "F8_E5M2": ml_dtypes.float8_e5m2,
            "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
            "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
            "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        }.items()
    }
)
_CODES: Mapping[np.dtype[Any], str] = MappingProxyType({v: k for k, v in DTYPES.items()})
_MAX_RANK = 32  # Far above any model, and below what numpy can hold.
_MAX_BYTES = 2**63 - 1


class TensorSpec(Protocol):
    """What every stored tensor says about itself, whatever file it lies in."""

    @property
    def name(self) -> str:
        """Its Hugging Face name."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype it is stored in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its whole shape."""

    @property
    def nbytes(self) -> int:
        """Its size as stored."""


def dtype_code(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a dtype.

    Raises:
        CheckpointError: safetensors has no name for it.
    """
    if dtype not in _CODES:
        raise CheckpointError(f"dtype {dtype} has no safetensors name; cast to one of {_known()}")
    return _CODES[dtype]


def parse_dtype(code: object, *, where: str) -> np.dtype[Any]:
    """The dtype a file names.

    Raises:
        CheckpointError: it is not one of the codes this library reads.
    """
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{where}: dtype {code!r} is not read here (known: {_known()}); "
            f"use a copy of the model in one of these"
        )
    return DTYPES[code]


def parse_shape(shape: object, *, where: str) -> tuple[int, ...]:
    """The shape a file names, if an array of that shape can exist.

    Raises:
        CheckpointError: not a list of non-negative whole numbers, or too many or too large.
    """
    if not isinstance(shape, list) or not all(is_count(size) for size in shape):
        raise CheckpointError(
            f"{where}: shape must be a list of whole numbers from 0 up, got {reprlib.repr(shape)}; "
            f"the file is damaged: get it again"
        )
    if len(shape) > _MAX_RANK or math.prod(max(size, 1) for size in shape) > _MAX_BYTES // 16:
        raise CheckpointError(
            f"{where}: shape {reprlib.repr(shape)} is larger than an array can be; "
            f"the file is damaged: get it again"
        )
    return tuple(shape)


def is_count(value: object) -> bool:
    """Whether a JSON value is a whole number from 0 up (a bool is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def spec_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes an array of this shape and dtype takes."""
    return math.prod(shape) * dtype.itemsize


def _known() -> str:
    return " ".join(DTYPES)


def raw_bytes(tensor: Shaped[np.ndarray, "..."]) -> memoryview:
    """The bytes of a tensor in row-major order; a copy only if they do not lie so already."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def sha256(tensor: Shaped[np.ndarray, "..."]) -> str:
    """Hex sha256 of the bytes of a tensor in row-major order."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()
