"""Inputs that no kernel takes are refused by its public function, in words of the caller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import checks, mosaic
from pallas_kernels.decode_attention_triton import decode_attention_triton
from pallas_kernels.gemm import gemm, prepare_gemm
from pallas_kernels.prefill_attention_triton import prefill_attention_triton
from pallas_kernels.prefill_tiles import build_prefill_tiles
from pallas_kernels.side_by_side import on_share, side_by_side
from pallas_kernels.work_list import plan_decode


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "num_ctas=0 is not at least 1"),
        (1.5, "num_ctas=1.5 is a float, not an int"),
        (True, "num_ctas=True is a bool, not an int"),
        (np.int64(4), "num_ctas=4 is a int64, not an int"),
        (None, "num_ctas=None is a NoneType, not an int"),
    ],
)
def test_what_is_no_count_is_refused(value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        checks.check_count("num_ctas", value)


def test_a_count_that_a_program_computes_is_refused():
    with pytest.raises(ValueError, match=r"^num_ctas=.* is a .*Tracer, not an int"):
        jax.jit(lambda n: checks.check_count("num_ctas", n))(4)


_KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, "x is a NoneType, not an array"),
        ([1.0], "x is a list, not an array"),
        (_KEY, r"x is key<fry>\(\), not an array of numbers; jax.random.key_data makes one of"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        checks.check_arrays(x=array)
    checks.check_arrays(x=jnp.zeros(2), **checks.given(y=None, z=np.zeros((), np.int32)))


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (jnp.int32, "int32"),
        (np.float64, "float64"),
        (jnp.bool_, "bool"),
        (jnp.float8_e4m3fn, "float8_e4m3fn"),
        ("nonsense", "nonsense"),
        (3, "3"),
    ],
)
def test_a_result_is_of_a_dtype_that_kernels_round_to(dtype, said):
    message = f"^the dtype of a result is {said}, not bfloat16 or float16 or float32$"
    with pytest.raises(ValueError, match=message):
        checks.check_out_dtype(dtype)
    assert checks.check_out_dtype("bfloat16") == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": float("nan")}, "scale=nan is a float, not a finite number"),
        ({"scale": None}, "scale=None is a NoneType, not a finite number"),
        ({"window": 0}, "window=0 is not at least 1; None sees all tokens"),
        ({"window": 1.5}, "window=1.5 is a float, not an int; None sees all tokens"),
        ({"softcap": 0.0}, "softcap=0.0 is not above 0; None leaves scores alone"),
        ({"softcap": float("inf")}, "softcap=inf is a float, not a finite number"),
    ],
)
def test_numbers_that_make_no_scores_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        checks.check_scores(**{"scale": 1, "window": None, "softcap": None, **change})


def _attention(call, plan):
    """Of three tokens, by a kernel for pages."""
    arrays = (jnp.zeros((3, 4, 64)), jnp.zeros((5, 2, 2, 16, 64)), jnp.zeros((3, 2), jnp.int32))
    return lambda **how: call(*arrays, *plan, scale=1.0, **how)


_X = jnp.zeros((16, 64), jnp.bfloat16)
_CALLS = {
    "gemm": lambda **how: gemm(_X, _X, **how),
    "on_share": lambda **how: on_share(prepare_gemm(_X, _X), 1, **how),
    "side_by_side": lambda **how: side_by_side([prepare_gemm(_X, _X)] * 2, [1], **how),
    "decode_triton": _attention(
        decode_attention_triton,
        (jnp.zeros(3, jnp.int32), plan_decode([1, 2, 3], num_kv_heads=2, num_ctas=1)),
    ),
    "prefill_triton": _attention(
        prefill_attention_triton,
        (build_prefill_tiles([], group=2, capacity=2, num_tokens=3),),
    ),
}


@pytest.mark.parametrize("name", _CALLS)
def test_a_token_of_keys_and_a_fraction_of_a_cta_are_refused(name):
    with pytest.raises(ValueError, match=r"token is key<fry>\(\), not an array of numbers"):
        _CALLS[name](num_ctas=4, token=_KEY)
    with pytest.raises(ValueError, match=r"num_ctas=1\.5 is a float, not an int"):
        _CALLS[name](num_ctas=1.5)


def test_rows_that_are_no_multiple_of_32_bytes_cannot_be_swizzled():
    with pytest.raises(ValueError, match="8 x 2 bytes is no multiple of 32 bytes; take a wider"):
        mosaic.swizzled_columns(8, jnp.bfloat16)
