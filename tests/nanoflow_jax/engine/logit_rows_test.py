"""Selections along rows against a stable sort."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from sampling_rows import random_logits

from nanoflow_jax.engine import logit_rows


@hypothesis.given(seed=st.integers(0, 2**31), size=st.sampled_from([70, 1031, 3000]))
def test_top_is_a_stable_sort_cut_short(seed, size):
    x = random_logits(seed, (3, size), bits=seed % 3)
    values, ids = jax.jit(logit_rows.top, static_argnums=1)(jnp.asarray(x), 20)
    order = np.argsort(-x, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=1))
