"""How hidden states are written into frames: float32, bfloat16, or int8 with outliers aside.

Rows of residual streams have a few channels hundreds of times larger than the others. One int8
scale for a whole row would leave nothing of the others, so the eight largest values of each row
travel beside it, in bfloat16.
"""

import enum

import ml_dtypes
import numpy as np
from jaxtyping import Float

NUM_OUTLIERS = 8
_MAX_WIDTH = 1 << 16  # indices of outliers are 16 bits
_LEVELS = 127.0
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HIDDEN_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": _BFLOAT16}


class Codec(enum.StrEnum):
    """How a row of hidden states becomes bytes.

    F32 loses nothing of a float32. BF16 is within 2**-8 of a value, relatively. INT8_OUTLIERS is
    within 1/254 of the row's ninth largest magnitude, and as BF16 for the eight above it.
    """

    F32 = "f32"
    BF16 = "bf16"
    INT8_OUTLIERS = "int8o"


class CodecError(ValueError):
    """Hidden states that cannot be written or read."""


def payload_bytes(codec: Codec, num_rows: int, width: int) -> int:
    """Bytes of so many rows of `width` values."""
    if codec is Codec.F32:
        return 4 * num_rows * width
    if codec is Codec.BF16:
        return 2 * num_rows * width
    return num_rows * (4 + 4 * min(NUM_OUTLIERS, width) + width)


def encode(rows: Float[np.ndarray, "n D"], codec: Codec) -> bytes:
    """The bytes of rows, little-endian.

    Args:
        rows: float32 or bfloat16.
        codec: How to write them.

    Raises:
        CodecError: They have another shape or dtype, or a value that is not finite or too large
            for bfloat16 where that is asked for.
    """
    if rows.ndim != 2 or rows.dtype not in HIDDEN_DTYPES.values():
        raise CodecError(
            f"hidden states of shape {rows.shape} and dtype {rows.dtype} came; "
            "rows of float32 or bfloat16 are wanted"
        )
    values = rows.astype(np.float32)
    _check_finite(values)
    if codec is Codec.F32:
        return values.astype("<f4").tobytes()
    if codec is Codec.BF16:
        return _bfloat16_bytes(values)
    return _encode_int8(values)


def decode(
    data: bytes, codec: Codec, *, num_rows: int, width: int, dtype: str
) -> Float[np.ndarray, "n D"]:
    """Rows from their bytes.

    Args:
        data: What `encode` made.
        codec: How they were written.
        num_rows: How many there must be.
        width: Values in each.
        dtype: Of the result, a key of `HIDDEN_DTYPES`.

    Raises:
        CodecError: The bytes are not so many, or a value is not finite.
    """
    wanted = payload_bytes(codec, num_rows, width)
    if len(data) != wanted:
        raise CodecError(
            f"{num_rows} rows of {width} values in {codec} are {wanted} bytes; {len(data)} came"
        )
    if codec is Codec.F32:
        values = np.frombuffer(data, "<f4").reshape(num_rows, width)
    elif codec is Codec.BF16:
        values = _from_bfloat16(np.frombuffer(data, "<u2")).reshape(num_rows, width)
    else:
        values = _decode_int8(data, num_rows, width)
    _check_finite(values)
    return values.astype(HIDDEN_DTYPES[dtype])


def _check_finite(values: Float[np.ndarray, "n D"]) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise CodecError(f"row {int(bad[0])} of hidden states has a value that is not finite")


def _bfloat16_bytes(values: Float[np.ndarray, "n D"]) -> bytes:
    narrow = values.astype(_BFLOAT16)
    if not np.isfinite(narrow.astype(np.float32)).all():
        raise CodecError("hidden states have a value too large for bfloat16; use the f32 codec")
    # ml_dtypes' arrays have no buffer of their own.
    return narrow.view(np.uint16).astype("<u2").tobytes()


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(_BFLOAT16).astype(np.float32)


def _encode_int8(values: Float[np.ndarray, "n D"]) -> bytes:
    width = values.shape[1]
    if width > _MAX_WIDTH:
        raise CodecError(f"rows of {width} values are too wide for int8o: {_MAX_WIDTH} at most")
    aside = min(NUM_OUTLIERS, width)
    order = np.argpartition(np.abs(values), width - aside, axis=1)
    index = np.sort(order[:, width - aside :], axis=1)  # [n, aside]
    outliers = np.take_along_axis(values, index, axis=1)
    rest = values.copy()
    np.put_along_axis(rest, index, np.float32(0), axis=1)
    scale = np.abs(rest).max(axis=1, initial=0.0) / np.float32(_LEVELS)
    divisor = np.where(scale > 0, scale, np.float32(1))
    small = np.rint(rest / divisor[:, None]).clip(-_LEVELS, _LEVELS).astype(np.int8)
    return b"".join(
        (
            scale.astype("<f4").tobytes(),
            index.astype("<u2").tobytes(),
            _bfloat16_bytes(outliers),
            small.tobytes(),
        )
    )


def _decode_int8(data: bytes, num_rows: int, width: int) -> Float[np.ndarray, "n D"]:
    aside = min(NUM_OUTLIERS, width)
    bytes_ = np.frombuffer(data, np.uint8)
    ends = np.cumsum([4 * num_rows, 2 * num_rows * aside, 2 * num_rows * aside])
    scale, index, outliers, small = np.split(bytes_, ends)
    places = index.view("<u2").reshape(num_rows, aside)
    if places.size and int(places.max()) >= width:
        raise CodecError(f"an outlier stands at {int(places.max())} in a row of {width} values")
    scales = scale.view("<f4").reshape(num_rows, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        values = small.view(np.int8).reshape(num_rows, width) * scales.astype(np.float32)
    np.put_along_axis(
        values,
        places.astype(np.int64),
        _from_bfloat16(outliers.view("<u2")).reshape(places.shape),
        1,
    )
    return values
