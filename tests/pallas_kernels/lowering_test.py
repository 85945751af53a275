"""Every kernel is lowered for Hopper with each dtype and epilogue, at sizes of Llama-3-8B.

No GPU and no plugin are needed, so that this holds on every version of jax that we run on.
"""

import jax
import jax.numpy as jnp
import kernel_runs
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.gemm import gemm
from pallas_kernels.grouped_gemm import grouped_gemm, permute, plan_groups
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prefill_tiles import PrefillTiles, build_prefill_tiles
from pallas_kernels.work_list import WorkList, plan_decode

_T, _D, _F = 2048, 4096, 14336
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn)
_TOKEN = jax.ShapeDtypeStruct((3,), jnp.float32)


def _check_lowers(function, shapes, *, num_kernels=1):
    text = kernel_runs.lowered(function, shapes, _TOKEN)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == num_kernels


def _shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _scales(names, *sizes):
    return {name: _shape(jnp.float32, *sizes) for name in names}


def _epilogues(dtype, result):
    """Operands beside x and w, by name."""
    gate = {"w_up": _shape(dtype, _F, _D)}
    added = {"bias": _shape(result, _F), "residual": _shape(result, _T, _F)}
    found = {"plain": {}, "bias and residual": added, "gate, bias and residual": gate | added}
    if dtype == jnp.float8_e4m3fn:
        rows, columns = _scales(("x_scale",), _T), _scales(("w_scale",), _F)
        found["scales"] = _scales(("x_scale", "w_scale"))
        found["scales of rows and columns"] = rows | columns
        found["gate and scales"] = gate | rows | columns | _scales(("w_up_scale",), _F)
    return found


def _products():
    for dtype in _DTYPES:
        own = jnp.bfloat16 if dtype == jnp.float8_e4m3fn else dtype
        for result in dict.fromkeys((jnp.dtype(own), jnp.dtype(jnp.float32))):
            for name, operands in _epilogues(dtype, result).items():
                label = f"{jnp.dtype(dtype)} to {result}, {name}"
                yield pytest.param(dtype, result, operands, id=label)


@pytest.mark.parametrize(("dtype", "out_dtype", "operands"), list(_products()))
def test_products_of_every_dtype_and_epilogue_lower_for_hopper(dtype, out_dtype, operands):
    def run(operands, token):
        return gemm(**operands, num_ctas=100, out_dtype=out_dtype, token=token)

    _check_lowers(run, operands | {"x": _shape(dtype, _T, _D), "w": _shape(dtype, _F, _D)})


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", _DTYPES)
def test_grouped_products_of_every_dtype_lower_for_hopper(dtype, gated):
    scaled = dtype == jnp.float8_e4m3fn
    scales = _scales(("x_scale", "w_scale")) if scaled else {}

    def run(operands, token):
        x, w, experts, scales = operands
        groups = plan_groups(experts, num_experts=8)
        return grouped_gemm(
            permute(x, groups), w, groups, gated=gated, **scales, num_ctas=100, token=token
        )

    shapes = _shape(dtype, _T, _D), _shape(dtype, 8, 2 * _F, _D), _shape(jnp.int32, _T, 2)
    _check_lowers(run, (*shapes, scales))


_CHANGES = {"plain": {}, "window and soft-cap": {"window": 4096, "softcap": 50.0}}
_HALVES = (jnp.bfloat16, jnp.float16)
# Queries [R, N, H] or [T, N, H], pages [P, 2, K, S, H], page table [R, M].
_PAGES = (4096, 2, 8, 64, 128)


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("dtype", _HALVES)
def test_decode_attention_of_every_dtype_lowers_for_hopper(dtype, change):
    work = plan_decode([1] * 256, num_kv_heads=8, num_ctas=48)

    def run(operands, token):
        *arrays, work = operands
        return decode_attention(*arrays, work, scale=0.1, token=token, **_CHANGES[change])

    shapes = (
        _shape(dtype, 256, 32, 128),
        _shape(dtype, *_PAGES),
        _shape(jnp.int32, 256, 128),
        _shape(jnp.int32, 256),
        WorkList(*(_shape(jnp.int32, *field.shape) for field in work)),
    )
    _check_lowers(run, shapes, num_kernels=2)  # the second merges parts


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("dtype", _HALVES)
def test_prefill_attention_of_every_dtype_lowers_for_hopper(dtype, change):
    tiles = build_prefill_tiles([], group=4, capacity=128, num_tokens=_T)

    def run(operands, token):
        return prefill_attention(
            *operands, scale=0.1, num_ctas=100, token=token, **_CHANGES[change]
        )

    shapes = (
        _shape(dtype, _T, 32, 128),
        _shape(dtype, *_PAGES),
        _shape(jnp.int32, 256, 128),
        PrefillTiles(*(_shape(jnp.int32, *field.shape) for field in tiles)),
    )
    _check_lowers(run, shapes)
