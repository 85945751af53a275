"""Random operands of kernels, made on the device."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


class Draw:
    """Draws arrays; the same seed gives the same ones.

    Attributes:
        host: For numbers that the host decides by.
    """

    def __init__(self, seed: int) -> None:
        self._key = jax.random.key(seed)
        self.host = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: Any = jnp.bfloat16) -> Float[Array, "*X"]:
        """Standard normal numbers."""
        self._key, key = jax.random.split(self._key)
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)

    def pages(
        self, lens: Sequence[int], *, heads: int, head_dim: int, page_size: int
    ) -> tuple[Float[Array, "P 2 K S H"], Int32[Array, "R M"]]:
        """A cache and a page table for such contexts: pages shuffled, NaN where nothing is."""
        counts = [-(-length // page_size) for length in lens]
        order = self.host.permutation(sum(counts) + 2)
        table = np.full((len(lens), max([*counts, 1])), order[-1], np.int32)
        written = np.zeros(len(order), np.int32)
        taken = 0
        for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
            own = order[taken : taken + count]
            taken += count
            table[row, :count] = own
            written[own] = np.minimum(length - page_size * np.arange(count), page_size)
        is_there = jnp.arange(page_size, dtype=jnp.int32)[None] < jnp.asarray(written)[:, None]
        values = self.normal(len(order), 2, heads, page_size, head_dim)
        nothing = jnp.asarray(jnp.nan, values.dtype)
        cache = jnp.where(is_there[:, None, None, :, None], values, nothing)
        return cache, jnp.asarray(table)
