"""Scores to the base 2, with and without a soft-cap, and that no GPU's own tanh is in them."""

import deviceless
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prefill_tiles import PrefillTiles, build_prefill_tiles
from pallas_kernels.scores import powers


@pytest.mark.parametrize("softcap", [None, 0.5, 30.0, 50.0, 1e4])
def test_scores_are_capped_by_the_hyperbolic_tangent(softcap):
    products = np.concatenate([-np.logspace(-6, 30, 200), [0.0], np.logspace(-6, 30, 200)])
    found = powers(jnp.asarray(products, jnp.float32), scale=0.25, softcap=softcap)
    scores = 0.25 * products.astype(np.float32).astype(np.float64)
    wanted = scores if softcap is None else softcap * np.tanh(scores / softcap)
    atol = 0.0 if softcap is None else 2.0**-21 * softcap
    np.testing.assert_allclose(found * np.log(2.0, dtype=np.float32), wanted, rtol=1e-6, atol=atol)


@pytest.mark.timeout(120)
def test_prefill_with_a_soft_cap_compiles_without_the_tanh_of_eleven_bits_and_without_spills():
    tiles = build_prefill_tiles([], group=2, capacity=64, num_tokens=512)

    def run(q, cache, page_table, *fields):
        return prefill_attention(
            q, cache, page_table, PrefillTiles(*fields), scale=0.06, softcap=50.0
        )

    shapes = [((512, 16, 256), jnp.bfloat16), ((1024, 2, 8, 64, 256), jnp.bfloat16)]
    shapes += [((64, 128), jnp.int32), *((field.shape, jnp.int32) for field in tiles)]
    (kernel,) = deviceless.compiled(run, *(jax.ShapeDtypeStruct(*one) for one in shapes))
    assert "tanh" not in kernel.ptx
    assert "ex2.approx" in kernel.ptx
    assert kernel.spill_bytes == 0
