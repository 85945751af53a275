"""Decode attention against its reference, and compiled at the sizes that are served."""

import itertools

import decode_runs
import deviceless
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.kv_cache import attention
from nanoflow_jax.kv_cache.layout import CacheShape, PageMajorLayout
from pallas_kernels import mosaic
from pallas_kernels.decode_attention import (
    decode_attention,
    decode_attention_reference,
    merge_parts,
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
def test_a_request_with_nan_fails_alone_and_room_for_more_ctas_is_left_empty():
    case = decode_runs.Case(lens=(64, 300, 70), num_ctas=1)
    q, cache, table, lens = case.operands()
    broken = cache.at[table[1, 2], 1, 0, 5].set(jnp.nan)
    with kernel_runs.interpreting() as interpret:
        found = decode_attention(
            q,
            broken,
            table,
            lens,
            case.plan(max_ctas=3),
            **case.all_options,
            token=jnp.full((3,), jnp.nan),
            interpret=interpret,
        )
    wanted = decode_attention_reference(q, cache, table, lens, **case.all_options)
    assert np.isnan(np.asarray(found[1], np.float32)).all()
    kernel_runs.check_close(found[::2], wanted[::2], relative=_RELATIVE)


@pytest.mark.parametrize(
    "name", ["lengths around a page", "a window inside pages", "soft-cap", "shared pages"]
)
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


@given(
    cuts=st.lists(st.integers(1, 39), max_size=6),
    scale=st.sampled_from([1.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_parts_merge_to_the_softmax_over_all(cuts, scale, seed):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((3, 40)) * scale  # [G, tokens], to the base 2
    values = rng.standard_normal((40, 5))
    bounds = sorted({0, 40, *cuts})
    num_parts = 9  # those left over, and the first, belong to no group and are garbage
    parts = np.full((num_parts, 3, 5), np.nan, np.float32)
    weights = np.full((num_parts, 3), np.nan, np.float32)
    groups = np.full(num_parts, 4, np.int32)
    for i, (a, b) in enumerate(itertools.pairwise(bounds), start=1):
        exponentials = np.exp2(scores[:, a:b])
        parts[i] = exponentials @ values[a:b] / exponentials.sum(axis=1, keepdims=True)
        weights[i] = np.log2(exponentials.sum(axis=1))
        groups[i] = 2
    exponentials = np.exp2(scores)
    wanted = exponentials @ values / exponentials.sum(axis=1, keepdims=True)
    found = merge_parts(*map(jnp.asarray, (parts, weights, groups)), num_groups=4)
    np.testing.assert_allclose(found[2], wanted, rtol=2e-5, atol=1e-6)
    assert not np.asarray(found)[[0, 1, 3]].any()


def test_what_is_no_number_comes_through_in_its_own_group_alone():
    parts = jnp.ones((5, 2, 3)).at[1, 0, 1].set(jnp.nan).at[3, 1].set(jnp.inf)
    weights = jnp.zeros((5, 2)).at[1].set(-500.0).at[4, 0].set(jnp.nan)
    found = np.asarray(merge_parts(parts, weights, jnp.asarray([0, 0, 1, 2, 3]), num_groups=4))
    wanted = np.ones((4, 2, 3))
    wanted[0, 0, 1] = wanted[2, 1] = wanted[3, 0] = np.nan
    np.testing.assert_array_equal(found, wanted)


def _run(q, cache, page_table, context_lens, *work, **options):
    return decode_attention(
        q, cache, page_table, context_lens, WorkList(*work), scale=0.1, **options
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
        _run, *decode_runs.shapes(**_SERVED.get(name, {"H": 256, "num_ctas": 132}))
    )
    assert "mosaic_gpu_v2" in text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["llama 8b", "16 query heads, pages of 16", "heads of 192"])
def test_decode_attention_compiles_for_an_h200_without_spills(name):
    options = {"window": 4096, "softcap": 30.0} if name == "llama 8b" else {}
    (kernel,) = deviceless.compiled(
        lambda *x: _run(*x, **options), *decode_runs.shapes(**_SERVED[name])
    )
    assert kernel.grid == (48, 1, 1)
    assert kernel.spill_bytes == 0
    assert kernel.registers <= 168
    # More than half of an SM's, so that CTAs have SMs to themselves.
    assert mosaic.SHARED_BYTES // 2 < kernel.shared_bytes <= mosaic.SHARED_BYTES
    assert "wgmma.mma_async" in kernel.ptx
    assert "cp.async.bulk.tensor" in kernel.ptx


_GOOD = {
    "q": jnp.zeros((3, 4, 32), jnp.bfloat16),
    "cache": jnp.zeros((5, 2, 2, 16, 32), jnp.bfloat16),
    "page_table": jnp.zeros((3, 2), jnp.int32),
    "context_lens": jnp.zeros((3,), jnp.int32),
    "work": plan_decode([1, 2, 3], num_kv_heads=2, num_ctas=1),
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
        (
            {"q": _cache(3, 4, 272), "cache": _cache(5, 2, 2, 16, 272)},
            "head_dim=272 is no multiple of 16 up to 256",
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
            "work has shapes .* a plan for R=3 requests has",
        ),
        ({"window": 0}, "window=0 is not at least 1"),
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
