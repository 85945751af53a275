"""Parts of softmaxes merged: by XLA and by the kernel, against softmaxes over all."""

import itertools

import deviceless
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.merge_parts import merge_parts, merge_runs, merge_runs_reference


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


def _runs(counts, *, rows=2, columns=128):
    """Parts in runs of so many, one part in front and some after that are in none."""
    ends = 1 + np.cumsum(counts)
    groups = np.stack([ends - counts, ends], axis=1).astype(np.int32)
    groups[np.asarray(counts) == 0] = 0
    num_parts = ends[-1] + 2
    parts = kernel_runs.normal(0, num_parts, 8, columns, dtype=jnp.float32)
    weights = 30 * kernel_runs.normal(1, num_parts, 8, dtype=jnp.float32)
    is_in = (np.arange(num_parts) > 0) & (np.arange(num_parts) < ends[-1])
    parts = jnp.where(is_in[:, None, None], parts, jnp.nan)
    # Rows past those that are merged are never written.
    return parts.at[:, rows:].set(jnp.nan), weights.at[:, rows:].set(jnp.nan), jnp.asarray(groups)


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_runs_of_parts_are_merged_to_the_same_bits_by_any_number_of_ctas():
    counts = (2, 0, 9, 4, 3)
    operands = _runs(counts, rows=3, columns=256)
    options = {"num_rows": 3, "dtype": jnp.bfloat16}
    found = []
    for num_ctas in (1, 2, 9):
        with kernel_runs.interpreting() as interpret:
            found.append(merge_runs(*operands, num_ctas=num_ctas, **options, interpret=interpret))
    is_used = np.asarray(counts) > 0
    wanted = merge_runs_reference(*operands, **options)[is_used]
    for one in found:
        kernel_runs.check_close(one[is_used], wanted, relative=4e-3)
        np.testing.assert_array_equal(one[is_used], found[0][is_used])


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_what_is_no_number_stays_in_its_own_run():
    parts, weights, groups = _runs((2, 3, 2))
    parts = parts.at[2, 1, 5].set(jnp.nan)
    weights = weights.at[6, 0].set(jnp.nan).at[7, 0].set(-500.0)
    with kernel_runs.interpreting() as interpret:
        found = merge_runs(
            parts, weights, groups, num_rows=2, dtype=jnp.float32, num_ctas=1, interpret=interpret
        )
    wanted = np.zeros((3, 2, 128), bool)
    wanted[0, 1, 5] = wanted[2, 0] = True
    np.testing.assert_array_equal(np.isnan(found), wanted)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("rows", "columns"), deviceless.cases([(4, 128), (16, 256)]))
def test_the_kernel_that_merges_compiles_for_an_h200_without_spills(rows, columns):
    shapes = [
        jax.ShapeDtypeStruct((528, 16, columns), jnp.float32),
        jax.ShapeDtypeStruct((528, 16), jnp.float32),
        jax.ShapeDtypeStruct((264, 2), jnp.int32),
    ]

    def run(*operands):
        return merge_runs(*operands, num_rows=rows, dtype=jnp.bfloat16, num_ctas=48)

    assert "mosaic_gpu_v2" in kernel_runs.lowered(run, *shapes)
    (kernel,) = deviceless.compiled(run, *shapes)
    assert kernel.grid == (48, 1, 1)
    assert kernel.spill_bytes == 0
    assert kernel.registers <= 168


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": jnp.zeros((4, 8, 64))}, r"parts\(4, 8, 64\) have no multiple of 128 columns"),
        ({"num_rows": 9}, "not num_rows=9 rows"),
        (
            {"parts": jnp.zeros((4, 128))},
            r"parts\(4, 128\), weights\(4, 8\) and groups\(1, 2\) are",
        ),
        ({"weights": jnp.zeros((3, 8))}, r"weights\(3, 8\) .* are not \[C, G, H\], \[C, G\] and"),
        ({"groups": jnp.zeros((2,), jnp.int32)}, r"groups\(2,\) are not .* \[B, 2\]"),
        ({"groups": jnp.zeros((0, 2), jnp.int32)}, r"groups\(0, 2\) must not be empty"),
        ({"groups": jnp.zeros((1, 2))}, "'float32'.*, not float32, float32 and int32"),
        ({"num_ctas": 0}, "num_ctas=0 is not at least 1"),
        ({"num_rows": 0}, "num_rows=0 is not at least 1"),
        ({"dtype": jnp.int32}, "the dtype of a result is int32, not bfloat16 or float16 or"),
        ({"weights": None}, "weights is a NoneType, not an array"),
    ],
)
def test_parts_that_the_kernel_cannot_merge_are_refused(change, message):
    given = {
        "parts": jnp.zeros((4, 8, 128)),
        "weights": jnp.zeros((4, 8)),
        "groups": jnp.zeros((1, 2), jnp.int32),
        "num_rows": 2,
        "dtype": jnp.bfloat16,
    }
    with pytest.raises(ValueError, match=message):
        merge_runs(**{**given, **change})
