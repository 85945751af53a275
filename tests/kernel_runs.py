"""Runs Mosaic kernels on a CPU, lowers them for a GPU that is not there, and compares.

A case that is interpreted takes seconds, so there are at most `MOST_INTERPRETED` of them, of a few
tiles each, with inputs from fixed seeds and races looked for. What each is there for, beside
agreeing with the reference, in files of tests/pallas_kernels:

decode_attention_test: NaN in all that no request may read
    small pages                 lengths 0, 1 and around a page; as many kv heads as query heads
    groups of five              groups filled up to eight rows, three kv heads; a page of 128 that
                                requests share; soft-cap; float16; heads of 80
    wide heads                  heads of 256; a window that leaves 60 pages out, one over an end
    a request with NaN          fails alone; more workers than tiles; 16 query heads on one; token
    any number of CTAs          1, fewer than planned, more than tiles; a cut context; the same bits
    with a split                parts merged behind a window; bits alone and in batches

prefill_attention_test: NaN in all that no request has written, pages shuffled
    window of 4                 the window's edge and the diagonal in one step; pages of 16
    16 query heads              heads of 256 on pages of 128, longer than a step
    132 CTAs                    more than tiles; several tiles of one chunk; float16
    cut, in place               parts and a whole tile in place; window and soft-cap; two kv heads
    cut, wide                   parts of two chunks that lie in the same eight tokens
    the same bits               of a token in chunks that begin elsewhere, behind a window
    ragged chunks               of 0, 1, 6 and 40 tokens; shared pages; soft-cap; seven heads; token
    no chunks                   zeros

gemm_test: odd sizes, token
    wide tile                   leaves in slices; fewer CTAs than tiles; residual
    one row                     the tile of 64 rows; a float32 residual and result; more CTAs
    float32                     gate, bias and residual
    float16                     bias; no size a multiple of anything
    float8 by row, by tensor    bias and residual; steps of 128
    float8, two factors         gate, bias and residual; both factors in one array and in two

grouped_gemm_test
    float32                     experts without rows; gated
    larger tiles                two tiles of one expert; float32 results; more CTAs
    float8                      by row and channel, gated; by tensor and expert, on one CTA
    a sparse layer              routed, gated, brought back together; token

on_share_test, side_by_side_test: one executable for all shares, of one kernel, two and three
merge_parts_test: runs of 0 to 9 parts on 1, 2 and 9 CTAs; what is no number stays in its own run

and in tests/nanoflow_jax
    models/kernel_operations    epilogues that XLA makes: a product, a gated one, one of experts
    engine/kernels_in_engine    tokens of the plain path by attention on two halves, by attention
                                and products in one kernel, by products of experts; the same bits
                                of a request alone and among others
    bench/gpu_check, bench/kernels_bench, compat    commands without a GPU; races are told of
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflow_jax import compat

MOST_INTERPRETED = 40

needs_interpreter = pytest.mark.skipif(
    not compat.CAN_INTERPRET_MOSAIC,
    reason=f"jax {jax.__version__} cannot interpret these kernels; jax 0.11, on Python 3.12, can",
)


def interpreted(**options: Any) -> Any:
    """Parameters under which races are found and what was never written reads as NaN."""
    return compat.interpret_gpu_params(
        detect_races=True, out_of_bounds_reads="uninitialized", **options
    )


@contextlib.contextmanager
def interpreting() -> Iterator[Any]:
    """Parameters to run kernels with; afterwards fails if one had a race."""
    try:
        yield interpreted()
        assert not compat.races_found()
    finally:
        compat.reset_interpreter()


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def check_close(found: jax.Array, wanted: jax.Array, *, relative: float) -> None:
    """Raises unless dtypes are the same and values near, in the 2-norm of all."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    one, other = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert np.isfinite(one).all()
    assert np.linalg.norm(one - other) <= relative * max(np.linalg.norm(other), 1e-30)


def lowered(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> str:
    """The program of a function for an H200, as text; the machine needs none."""
    with compat.abstract_gpu("NVIDIA H200", 132):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
