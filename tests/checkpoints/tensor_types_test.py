import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import tensor_types
from checkpoints.errors import CheckpointError


def test_every_code_names_one_dtype_and_back() -> None:
    codes = [tensor_types.dtype_code(dtype) for dtype in tensor_types.DTYPES.values()]
    assert codes == list(tensor_types.DTYPES)
    assert tensor_types.DTYPES["BF16"] == ml_dtypes.bfloat16
    assert tensor_types.DTYPES["F8_E4M3"] == ml_dtypes.float8_e4m3fn


def test_a_dtype_without_a_code_says_which_have_one() -> None:
    with pytest.raises(CheckpointError, match="complex128 has no safetensors name; cast to one of"):
        tensor_types.dtype_code(np.dtype(np.complex128))


@pytest.mark.parametrize("code", ["F4", "f32", "", None, 5, ["F32"]])
def test_an_unknown_code_is_refused_by_name(code: object) -> None:
    with pytest.raises(CheckpointError, match=r"w: dtype .* is not read here .*F32"):
        tensor_types.parse_dtype(code, where="w")


@pytest.mark.parametrize("shape", [None, 3, "34", [1.0], [-1], [True], ["3"], [[3]], {"a": 1}])
def test_a_shape_that_is_no_list_of_counts_is_refused(shape: object) -> None:
    with pytest.raises(CheckpointError, match="w: shape must be a list of whole numbers from 0 up"):
        tensor_types.parse_shape(shape, where="w")


@pytest.mark.parametrize("shape", [[1] * 33, [2**63], [2**40, 2**40], [0, 2**63], [10**4000]])
def test_a_shape_no_array_can_have_is_refused(shape: list[int]) -> None:
    with pytest.raises(CheckpointError, match="is larger than an array can be"):
        tensor_types.parse_shape(shape, where="w")


@given(st.lists(st.integers(0, 2**70), max_size=5))
def test_an_accepted_shape_without_elements_can_be_made(shape: list[int]) -> None:
    try:
        accepted = tensor_types.parse_shape([0, *shape], where="w")
    except CheckpointError:
        return
    for dtype in tensor_types.DTYPES.values():
        assert np.empty(accepted, dtype).shape == (0, *shape)


def test_raw_bytes_are_in_row_major_order_whatever_the_layout() -> None:
    tensor = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert bytes(tensor_types.raw_bytes(tensor.T)) == bytes([0, 3, 1, 4, 2, 5])
    assert bytes(tensor_types.raw_bytes(np.array(7, np.uint8))) == b"\x07"
    assert bytes(tensor_types.raw_bytes(np.zeros((0, 2), ml_dtypes.bfloat16))) == b""
