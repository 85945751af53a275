"""Codecs keep rows within the stated bounds, outlier channels or not."""

import ml_dtypes
import numpy as np
import pytest

from nanoflow_jax.split import codecs
from nanoflow_jax.split.codecs import Codec

_WIDTH = 512


def _rows(num_rows: int, *, outliers: int = 0, width: int = _WIDTH) -> np.ndarray:
    """Rows of a residual stream: some channels are 300 times larger than the others."""
    generator = np.random.default_rng(7)
    rows = generator.standard_normal((num_rows, width)).astype(np.float32)
    rows[:, generator.choice(width, outliers, replace=False)] *= 300
    return rows


def _through(rows: np.ndarray, codec: Codec, dtype: str = "float32") -> np.ndarray:
    data = codecs.encode(rows, codec)
    assert len(data) == codecs.payload_bytes(codec, *rows.shape)
    return codecs.decode(data, codec, num_rows=len(rows), width=rows.shape[1], dtype=dtype)


def test_f32_loses_nothing() -> None:
    rows = _rows(5, outliers=4)
    np.testing.assert_array_equal(_through(rows, Codec.F32), rows)


def test_bf16_loses_nothing_of_bfloat16() -> None:
    rows = _rows(5, outliers=4).astype(ml_dtypes.bfloat16)
    read = _through(rows, Codec.BF16, "bfloat16")
    assert read.dtype == rows.dtype
    np.testing.assert_array_equal(read.view(np.uint16), rows.view(np.uint16))


def test_bf16_is_within_its_unit_roundoff_of_float32() -> None:
    rows = _rows(5, outliers=4)
    assert (np.abs(_through(rows, Codec.BF16) - rows) <= np.abs(rows) * 2.0**-8).all()


@pytest.mark.parametrize("outliers", [0, 4, 8])
@pytest.mark.parametrize("width", [_WIDTH, 9, 8, 3])
def test_int8_is_within_a_level_of_the_rest_of_a_row(outliers: int, width: int) -> None:
    rows = _rows(6, outliers=min(outliers, width), width=width)
    magnitude = np.sort(np.abs(rows), axis=1)
    rest = magnitude[:, -9] if width > 8 else np.zeros(len(rows))
    # Half a level, rounding of the scale and of the product; as bfloat16 for those aside.
    bound = np.where(
        np.abs(rows) > rest[:, None], np.abs(rows) * 2.0**-8, rest[:, None] / 254 * (1 + 1e-5)
    )
    assert (np.abs(_through(rows, Codec.INT8_OUTLIERS) - rows) <= bound).all()


def test_int8_keeps_the_channels_between_outliers() -> None:
    rows = _rows(64, outliers=4)
    small = np.abs(rows) < 10
    error = (_through(rows, Codec.INT8_OUTLIERS) - rows)[small]
    # 0.7 % in the reference; one scale for the whole row would give 84 %.
    assert np.linalg.norm(error) / np.linalg.norm(rows[small]) < 0.01


def test_int8_of_zeros_is_zeros() -> None:
    zeros = np.zeros((2, 32), np.float32)
    np.testing.assert_array_equal(_through(zeros, Codec.INT8_OUTLIERS), zeros)


def test_int8_of_a_row_of_4096_is_4132_bytes() -> None:
    assert codecs.payload_bytes(Codec.INT8_OUTLIERS, 1, 4096) == 4132


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_is_not_written(codec: Codec, value: float) -> None:
    rows = _rows(3)
    rows[1, 5] = value
    with pytest.raises(codecs.CodecError, match="row 1 of hidden states has a value that is not"):
        codecs.encode(rows, codec)


@pytest.mark.parametrize("codec", [Codec.F32, Codec.BF16])
def test_value_that_is_not_finite_is_not_read(codec: Codec) -> None:
    data = bytearray(codecs.encode(_rows(3), codec))
    data[-2:] = b"\xc0\x7f"
    with pytest.raises(codecs.CodecError, match="row 2 of hidden states has a value that is not"):
        codecs.decode(bytes(data), codec, num_rows=3, width=_WIDTH, dtype="float32")


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_int8_with_a_scale_that_is_not_finite_is_not_read(scale: float) -> None:
    data = np.float32(scale).tobytes() + codecs.encode(_rows(1), Codec.INT8_OUTLIERS)[4:]
    with pytest.raises(codecs.CodecError, match="row 0 of hidden states has a value that is not"):
        codecs.decode(data, Codec.INT8_OUTLIERS, num_rows=1, width=_WIDTH, dtype="float32")


def test_outlier_outside_its_row_is_refused() -> None:
    data = bytearray(codecs.encode(_rows(1), Codec.INT8_OUTLIERS))
    data[4:6] = b"\xff\xff"
    with pytest.raises(codecs.CodecError, match="an outlier stands at 65535 in a row of 512"):
        codecs.decode(bytes(data), Codec.INT8_OUTLIERS, num_rows=1, width=_WIDTH, dtype="float32")


@pytest.mark.parametrize("codec", list(Codec))
def test_bytes_of_another_number_of_rows_are_refused(codec: Codec) -> None:
    data = codecs.encode(_rows(3), codec)
    with pytest.raises(codecs.CodecError, match=f"4 rows of 512 values in {codec} are"):
        codecs.decode(data, codec, num_rows=4, width=_WIDTH, dtype="float32")


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 3), np.float64), np.zeros(3, np.float32), np.zeros((2, 3), np.int8)]
)
def test_rows_of_another_shape_or_dtype_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(codecs.CodecError, match="rows of float32 or bfloat16 are wanted"):
        codecs.encode(rows, Codec.BF16)


def test_row_too_wide_for_int8_is_refused() -> None:
    with pytest.raises(codecs.CodecError, match="rows of 65537 values are too wide for int8o"):
        codecs.encode(np.zeros((1, 65537), np.float32), Codec.INT8_OUTLIERS)


def test_value_too_large_for_bfloat16_is_refused() -> None:
    with pytest.raises(codecs.CodecError, match="too large for bfloat16; use the f32 codec"):
        codecs.encode(np.full((1, 4), 3.4e38, np.float32), Codec.BF16)
