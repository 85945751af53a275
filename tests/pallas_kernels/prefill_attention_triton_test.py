"""Prefill attention of GPUs before Hopper against its reference, and compiled for three of them."""

import functools

import deviceless
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import prefill_runs
import pytest

from nanoflow_jax import compat
from pallas_kernels.prefill_attention import prefill_attention_reference
from pallas_kernels.prefill_attention_triton import prefill_attention_triton
from pallas_kernels.prefill_tiles import KeySplit, PrefillTiles

pytestmark = pytest.mark.skipif(
    not compat.HAS_PALLAS_TRITON, reason=f"jax {jax.__version__} has no Triton backend of Pallas"
)
_LEAST_SHARED_BYTES = 101_376  # that a CTA may have on Ada
# Weights rounded to the cache's dtype, and the output.
_RELATIVE = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 2e-6}


def _check(*, num_ctas, token=None, **more):
    operands = prefill_runs.operands(**more)
    form = {name: operands.pop(name) for name in ("scale", "window", "softcap")}
    run = jax.jit(
        functools.partial(
            prefill_attention_triton, **form, num_ctas=num_ctas, token=token, interpret=True
        )
    )
    found = run(**operands)
    wanted = prefill_attention_reference(**operands, **form)
    kernel_runs.check_close(found, wanted, relative=_RELATIVE[str(found.dtype)])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("more", "num_ctas"),
    [
        ({}, 2),
        ({"chunks": [(0, 50, 14, 0)], "page_size": 16, "dtype": jnp.float32}, 132),
        ({"chunks": [(0, 30, 237, 0)], "page_size": 32, "heads": (5, 1), "window": 70}, 1),
        ({"chunks": [(2, 9, 0, 0)], "page_size": 5, "heads": (3, 1), "window": 4}, 2),
        ({"page_size": 128, "head_dim": 80, "heads": (7, 1), "softcap": 3.0}, 2),
        ({"chunks": [(1, 20, 60, 0)], "head_dim": 256, "heads": (6, 2)}, 1),
        ({"chunks": [(0, 140, 0, 0)], "num_tokens": 140, "heads": (1, 1), "dtype": jnp.float16}, 1),
    ],
)
def test_chunks_get_their_reference_on_any_number_of_ctas(more, num_ctas):
    _check(num_ctas=num_ctas, token=jnp.full((3,), jnp.nan), **more)


def test_a_step_without_chunks_gives_zeros():
    operands = prefill_runs.operands([(0, 0, 5, 0)], num_tokens=8, heads=(1, 1))
    found = prefill_attention_triton(**operands, num_ctas=3, interpret=True)
    assert not np.asarray(found).any()


def _shapes(heads, head_dim, page_size, dtype=jnp.bfloat16):
    ints = ((128,),) * 4 + ((1,), (2048,), (128, 3), (0, 2), (0,))
    return [
        jax.ShapeDtypeStruct((2048, heads[0], head_dim), dtype),
        jax.ShapeDtypeStruct((4096, 2, heads[1], page_size, head_dim), dtype),
        jax.ShapeDtypeStruct((256, 512), jnp.int32),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ints),
    ]


def _run(q, cache, page_table, *fields, **more):
    return prefill_attention_triton(
        q, cache, page_table, PrefillTiles(*fields), scale=0.1, num_ctas=100, **more
    )


_SERVED = {
    "llama 8b": ((32, 8), 128, 64),
    "llama 70b, a share of 8": ((8, 1), 128, 16),
    "heads of 64": ((64, 8), 64, 128),
    "heads of 96": ((32, 32), 96, 32),
    "heads of 256": ((16, 8), 256, 32),
    "float32": ((32, 8), 128, 64, jnp.float32),
}


@pytest.mark.parametrize("name", _SERVED)
def test_served_sizes_lower_for_triton(name):
    text = kernel_runs.lowered(
        lambda *x: _run(*x, window=4096, softcap=50.0), *_shapes(*_SERVED[name])
    )
    assert "triton" in text


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "device"),
    [("llama 8b", "A100"), ("heads of 256", "L4"), ("llama 8b", "H200"), ("heads of 256", "A100")],
)
def test_served_sizes_compile_into_products_of_tensor_cores(name, device):
    program = deviceless.program(_run, *_shapes(*_SERVED[name]), device=device)
    kernel = program.kernel("prefill_attention_kernel")
    assert kernel.grid == (100, 1, 1)
    if name == "llama 8b":
        assert kernel.spill_bytes == 0
    assert device == "H200" or kernel.shared_bytes <= _LEAST_SHARED_BYTES
    assert "cp.async.cg.shared.global" in kernel.ptx
    assert ("wgmma.mma_async" if device == "H200" else "mma.sync") in kernel.ptx


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_ctas": 0}, "num_ctas=0 is not at least 1"),
        ({"window": 0}, "window=0 is not at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        prefill_attention_triton(**{**prefill_runs.operands(), **more}, interpret=True)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"dtype": jnp.int32}, "q is int32 and the cache int32; both must be bfloat16 or float16"),
        (
            {"head_dim": 256, "dtype": jnp.float32},
            "a head of 256 x float32 takes more than 512 bytes; use the plain path",
        ),
        (
            {"split": KeySplit(num_kv_heads=1, num_ctas=2, max_parts=2)},
            "the tiles have parts, which this kernel cannot merge; build them unsplit",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_operands_that_do_not_fit_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        prefill_attention_triton(**prefill_runs.operands(**made), interpret=True)


@pytest.mark.gpu
def test_chunks_on_a_gpu_get_their_reference():
    operands = prefill_runs.operands(window=60)
    found = prefill_attention_triton(**operands)
    kernel_runs.check_close(found, prefill_attention_reference(**operands), relative=1e-2)
