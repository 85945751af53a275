"""The fused kernel against the two that it is made of, for several splits of one executable."""

import deviceless
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.attention_beside_gemm import attention_beside_gemm
from pallas_kernels.decode_attention import decode_attention_reference, prepare_decode
from pallas_kernels.gemm import GemmTile, gemm_reference, prepare_gemm
from pallas_kernels.work_list import WorkList, plan_decode

_LENS = (65, 0, 150)
_SCALE = 0.2


def _operands():
    """x, w, residual; q, cache, page table, lengths: 2 query heads on one kv head."""
    rng = np.random.default_rng(3)
    table = jnp.asarray(rng.permutation(8)[:6].reshape(3, 2), jnp.int32)
    table = jnp.concatenate([table, table[::-1, :1]], axis=1)
    return (
        kernel_runs.normal(0, 200, 128),
        kernel_runs.normal(1, 136, 128),
        kernel_runs.normal(2, 200, 136),
        kernel_runs.normal(3, 3, 2, 32),
        kernel_runs.normal(4, 8, 2, 1, 64, 32),
        table,
        jnp.asarray(_LENS, jnp.int32),
    )


def _plan(split, num_ctas):
    return plan_decode(_LENS, num_kv_heads=1, num_ctas=num_ctas - split, max_ctas=num_ctas)


def _check_splits(num_ctas, splits, interpret):
    """Runs one executable for all splits."""
    operands = _operands()
    x, w, residual, *attended = operands

    def run(operands, work, split):
        x, w, residual, *attended = operands
        return attention_beside_gemm(
            prepare_gemm(x, w, residual=residual),
            prepare_decode(*attended, work, scale=_SCALE, interpreted=interpret is not None),
            split,
            num_ctas=num_ctas,
            interpret=interpret,
        )

    given = [(_plan(split, num_ctas), jnp.asarray(split, jnp.int32)) for split in splits]
    executable = jax.jit(run).lower(operands, *given[0]).compile()
    found = jax.block_until_ready([executable(operands, *one) for one in given])
    product = gemm_reference(x, w, residual=residual)
    attention = decode_attention_reference(*attended, scale=_SCALE)
    for one, other in found:
        kernel_runs.check_close(one, product, relative=2e-3)
        kernel_runs.check_close(other, attention, relative=1e-2 if interpret is None else 5e-3)


@kernel_runs.needs_interpreter
@pytest.mark.timeout(240)
def test_one_executable_gives_the_results_of_both_kernels_for_every_split():
    with kernel_runs.interpreting() as interpret:
        _check_splits(4, (1, 2, 3), interpret)


@pytest.mark.gpu
def test_one_executable_gives_both_results_on_a_gpu():
    _check_splits(132, (1, 40, 131), None)


def _prepared(x, w, w_up, q, cache, page_table, context_lens, *work, tile):
    return (
        prepare_gemm(x, w, w_up=w_up, tile=tile),
        prepare_decode(q, cache, page_table, context_lens, WorkList(*work), scale=0.1),
    )


def _shapes(num_columns, *, gated):
    """Llama 8b: 512 rows of a product, 256 requests of up to 8 k tokens."""
    work = plan_decode([1] * 256, num_kv_heads=8, num_ctas=132)
    weight = ((num_columns, 4096), jnp.bfloat16)
    arrays = [
        ((512, 4096), jnp.bfloat16),
        weight,
        weight if gated else None,
        ((256, 32, 128), jnp.bfloat16),
        ((4096, 2, 8, 64, 128), jnp.bfloat16),
        ((256, 128), jnp.int32),
        ((256,), jnp.int32),
        *((field.shape, jnp.int32) for field in work),
        ((), jnp.int32),
    ]
    return [jax.ShapeDtypeStruct(*one) for one in arrays if one is not None]


def _fused(*arrays, gated):
    x, w, *rest = arrays
    w_up = rest.pop(0) if gated else None
    tile = GemmTile(columns=128 if gated else 256)
    kernels = _prepared(x, w, w_up, *rest[:-1], tile=tile)
    return attention_beside_gemm(*kernels, rest[-1])


@pytest.mark.parametrize(("num_columns", "gated"), [(6144, False), (14336, True)])
def test_attention_beside_products_of_llama_8b_lowers_for_hopper(num_columns, gated):
    text = kernel_runs.lowered(
        lambda *x: _fused(*x, gated=gated), *_shapes(num_columns, gated=gated)
    )
    assert text.count("mosaic_gpu_v2") == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("num_columns", "gated"), [(6144, False), (14336, True)])
def test_the_fused_kernel_needs_no_more_than_the_larger_of_both(num_columns, gated):
    (kernel,) = deviceless.compiled(
        lambda *x: _fused(*x, gated=gated), *_shapes(num_columns, gated=gated)
    )
    assert kernel.grid == (132, 1, 1)
    assert kernel.spill_bytes == 0
    assert kernel.registers <= 168
    # More than half of an SM's: one CTA on each.
    assert mosaic.SHARED_BYTES // 2 < kernel.shared_bytes <= mosaic.SHARED_BYTES


@pytest.mark.parametrize(
    ("gemm_ctas", "num_ctas", "message"),
    [
        (1, 1, "num_ctas=1 is not at least 2, one for each kernel"),
        (0, 4, r"gemm_ctas=0 is outside \[1, num_ctas=4\)"),
        (4, 4, r"gemm_ctas=4 is outside \[1, num_ctas=4\)"),
        (1, 5, "room for 4 CTAs; the grid has 5: plan with max_ctas=5"),
    ],
)
def test_splits_that_leave_a_kernel_without_ctas_are_refused(gemm_ctas, num_ctas, message):
    x, w, _, *attended = _operands()
    attention = prepare_decode(*attended, _plan(1, 4), scale=_SCALE)
    with pytest.raises(ValueError, match=message):
        attention_beside_gemm(prepare_gemm(x, w), attention, gemm_ctas, num_ctas=num_ctas)
