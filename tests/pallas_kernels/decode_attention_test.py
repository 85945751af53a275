"""Decode attention against its reference, and compiled at the sizes that are served."""

import dataclasses

import decode_runs
import deviceless
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest

from nanoflow_jax import compat
from nanoflow_jax.kv_cache import attention
from nanoflow_jax.kv_cache.layout import CacheShape, PageMajorLayout
from pallas_kernels import mosaic
from pallas_kernels.decode_attention import (
    decode_attention,
    decode_attention_reference,
)
from pallas_kernels.work_list import WorkList, plan_decode

# Rounding of weights and of the output to the cache's dtype.
_RELATIVE = 5e-3


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", decode_runs.CASES)
def test_decode_attention_is_its_reference(name):
    case = decode_runs.CASES[name]
    operands = case.operands()
    with kernel_runs.interpreting() as interpret:
        found = decode_attention(*operands, case.plan(), **case.all_options, interpret=interpret)
    wanted = decode_attention_reference(*operands, **case.all_options)
    kernel_runs.check_close(found, wanted, relative=_RELATIVE)
    assert not np.asarray(found)[np.asarray(case.lens) == 0].any()


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_a_request_with_nan_fails_alone_and_more_ctas_than_tiles_do_no_harm():
    case = decode_runs.Case(lens=(64, 300, 33), N=16, S=32, H=128, num_ctas=5)
    q, cache, table, lens = case.operands()
    broken = cache.at[table[1, 2], 1, 0, 5].set(jnp.nan)
    with kernel_runs.interpreting() as interpret:
        found = decode_attention(
            q,
            broken,
            table,
            lens,
            case.plan(max_ctas=7),
            **case.all_options,
            token=jnp.full((3,), jnp.nan),
            interpret=interpret,
        )
    wanted = decode_attention_reference(q, cache, table, lens, **case.all_options)
    assert np.isnan(np.asarray(found[1], np.float32)).all()
    kernel_runs.check_close(found[::2], wanted[::2], relative=_RELATIVE)


@kernel_runs.needs_interpreter
@pytest.mark.timeout(240)
def test_any_number_of_ctas_runs_a_plan_to_the_same_bits():
    case = decode_runs.Case(lens=(0, 1, 63, 64, 65, 200), N=4, K=2, num_ctas=3)
    operands = case.operands()
    found = []
    for num_ctas in (1, 2, 132):
        with kernel_runs.interpreting() as interpret:
            found.append(
                decode_attention(
                    *operands,
                    case.plan(),
                    **case.all_options,
                    num_ctas=num_ctas,
                    interpret=interpret,
                )
            )
    wanted = decode_attention_reference(*operands, **case.all_options)
    for one in found:
        kernel_runs.check_close(one, wanted, relative=_RELATIVE)
        np.testing.assert_array_equal(one, found[0])


@kernel_runs.needs_interpreter
@pytest.mark.timeout(240)
def test_with_a_split_a_request_has_the_same_bits_alone_and_in_any_batch():
    case = decode_runs.Case(lens=(300, 1, 129, 64), N=2, options={"window": 220})
    q, cache, table, lens = case.operands()

    def run(rows, *, planned, num_ctas):
        part = dataclasses.replace(case, lens=tuple(case.lens[row] for row in rows))
        plan = part.plan(num_ctas=planned, split_len=64, max_parts=10)
        rows = jnp.asarray(rows)
        with kernel_runs.interpreting() as interpret:
            return decode_attention(
                q[rows],
                cache,
                table[rows],
                lens[rows],
                plan,
                **case.all_options,
                num_ctas=num_ctas,
                interpret=interpret,
            )

    together = run((0, 1, 2, 3), planned=2, num_ctas=1)
    kernel_runs.check_close(
        together,
        decode_attention_reference(q, cache, table, lens, **case.all_options),
        relative=_RELATIVE,
    )
    others = run((2, 0), planned=1, num_ctas=132)
    np.testing.assert_array_equal(others, together[jnp.asarray([2, 0])])
    np.testing.assert_array_equal(run((0,), planned=3, num_ctas=2), together[:1])


@pytest.mark.parametrize("name", decode_runs.CASES)
def test_the_reference_is_the_attention_of_the_plain_path(name):
    case = decode_runs.CASES[name]
    q, cache, table, lens = case.operands()
    shape = CacheShape(
        num_pages=cache.shape[0],
        page_size=case.S,
        num_kv_heads=case.K,
        head_dim=case.H,
        dtype=cache.dtype,
    )
    plain = attention.decode_attention(
        PageMajorLayout(shape=shape), q, cache, table, lens, **case.all_options
    )
    found = decode_attention_reference(q, cache, table, lens, **case.all_options)
    kernel_runs.check_close(found, plain, relative=4e-3)


def _run(q, cache, page_table, context_lens, *work, **options):
    return decode_attention(
        q, cache, page_table, context_lens, WorkList(*work), scale=0.1, num_ctas=48, **options
    )


_SERVED = {
    "llama 8b": {},
    "llama 70b, a share of 8": {"N": 8, "K": 1},
    "16 query heads, pages of 16": {"N": 128, "S": 16},
    "pages of 32, heads of 64": {"S": 32, "H": 64},
    "pages of 128, heads of 96": {"S": 128, "H": 96},
    "heads of 80": {"N": 8, "H": 80},
    "heads of 192": {"H": 192, "R": 2048},
}


@pytest.mark.parametrize("name", [*_SERVED, "heads of 256"])
def test_decode_attention_lowers_for_hopper(name):
    text = kernel_runs.lowered(
        _run, *decode_runs.shapes(num_ctas=132, **_SERVED.get(name, {"H": 256}))
    )
    assert "mosaic_gpu_v2" in text


# Wider heads, without spills where they can be read in half tiles.
_WIDE = [
    {"H": 192, "S": 128, "R": 2048},
    {"H": 256, "S": 32, "N": 16},
    {"H": 256, "S": 128, "N": 128},
]
# Of heads and pages each size once, with all that can be asked for.
_COMPILED = [
    {"H": 128, "S": 64},
    {"H": 64, "S": 16, "N": 128},
    {"H": 64, "S": 128},
    {"H": 96, "S": 32, "N": 8, "K": 8},
    {"H": 128, "S": 16, "N": 64},
    {"H": 176, "S": 64},
    *(_WIDE if compat.CAN_LOAD_TRANSPOSED else []),
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("sizes", deviceless.cases([(sizes,) for sizes in _COMPILED]), ids=str)
def test_decode_attention_compiles_for_an_h200_without_spills(sizes):
    program = deviceless.program(
        lambda *x: _run(*x, window=4096, softcap=30.0), *decode_runs.shapes(num_ctas=132, **sizes)
    )
    attention, merge = program.mosaic_kernels
    assert attention.grid == merge.grid == (48, 1, 1)
    assert attention.spill_bytes == merge.spill_bytes == 0
    assert attention.registers <= 168
    assert merge.registers <= 168
    # More than half of an SM's, so that CTAs have SMs to themselves.
    assert mosaic.SHARED_BYTES // 2 < attention.shared_bytes <= mosaic.SHARED_BYTES
    assert "wgmma.mma_async" in attention.ptx
    assert "cp.async.bulk.tensor" in attention.ptx
    # Beside them results are selected, and queries filled up where they are not eight or sixteen.
    is_filled = sizes.get("N", 32) // sizes.get("K", 8) in (8, 16)
    assert len(program.launches) == (3 if is_filled else 4), program.launches


_PLAN = plan_decode([1, 2, 3], num_kv_heads=2, num_ctas=1)
_GOOD = {
    "q": jnp.zeros((3, 4, 32), jnp.bfloat16),
    "cache": jnp.zeros((5, 2, 2, 16, 32), jnp.bfloat16),
    "page_table": jnp.zeros((3, 2), jnp.int32),
    "context_lens": jnp.zeros((3,), jnp.int32),
    "work": _PLAN,
    "scale": 1.0,
}


def _cache(*shape):
    return jnp.zeros(shape, jnp.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": _cache(3, 4, 48)}, r"q\(3, 4, 48\) and cache\(5, 2, 2, 16, 32\) are not"),
        ({"page_table": jnp.zeros((3, 0), jnp.int32)}, "must not be empty"),
        ({"q": jnp.zeros((3, 4, 32))}, "q is float32 and cache bfloat16; both must be"),
        ({"q": _cache(3, 5, 32)}, "N=5 query heads are not 1 to 16 for each of K=2 kv heads"),
        ({"q": _cache(3, 34, 32)}, "N=34 query heads are not 1 to 16 for each of K=2"),
        (
            {"q": _cache(3, 4, 24), "cache": _cache(5, 2, 2, 16, 24)},
            "head_dim=24 is no multiple of 16 up to 256",
        ),
        ({"cache": _cache(5, 2, 2, 24, 32)}, "page_size=24 must be at least 8 and divide 64"),
        ({"cache": _cache(5, 2, 2, 4, 32)}, "page_size=4 must be at least 8 and divide 64"),
        (
            {"page_table": jnp.zeros((2, 2), jnp.int32)},
            r"page_table is int32\(2, 2\), not int32 \[R, M\] with R=3",
        ),
        (
            {"context_lens": jnp.zeros((3,))},
            r"context_lens is float32\(3,\), not int32 \[R\] with R=3",
        ),
        (
            {"work": plan_decode([1, 2], num_kv_heads=2, num_ctas=1)},
            "work has shapes .* a plan for R=3 requests and K=2 kv heads has",
        ),
        (
            {"work": WorkList(*(field.astype(np.float32) for field in _PLAN))},
            "work is .*'float32'.*, not int32; take it from plan_decode",
        ),
        (
            {"work": _PLAN._replace(workers=_PLAN.workers[:0])},
            r"work has shapes \(\(3, 4\), \(0, 5",
        ),
        ({"work": _PLAN._replace(groups=_PLAN.groups[:0])}, "work has shapes .* a plan for R=3"),
        ({"work": _PLAN._replace(workers=np.int32(0))}, "work has shapes .* a plan for R=3"),
        ({"window": 0}, "window=0 is not at least 1"),
        ({"scale": None}, "scale=None is a NoneType, not a finite number"),
        ({"work": _PLAN._replace(live=None)}, "work.live is a NoneType, not an array"),
        ({"context_lens": None}, "context_lens is a NoneType, not an array"),
        ({"num_ctas": 0}, "num_ctas=0 is not at least 1"),
        ({"softcap": 0.0}, "softcap=0.0 is not above 0"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**_GOOD, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("name", decode_runs.CASES)
def test_decode_attention_on_a_gpu_is_its_reference(name):
    case = decode_runs.CASES[name]
    operands = case.operands()
    found = decode_attention(*operands, case.plan(max_ctas=132), **case.all_options)
    wanted = decode_attention_reference(*operands, **case.all_options)
    kernel_runs.check_close(found, wanted, relative=1e-2)
