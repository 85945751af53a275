"""Reductions and selections along rows of V entries, in the forms that XLA makes fast.

XLA:CPU vectorises a float max or sum along the minor axis; argmax, integer sums, top_k and
cumsum are scalar code. So a row is cut into blocks, the vector code runs over the row, and the
scalar code over one entry a block.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

NARROW = 32  # block width for top: balances its two top_k passes at V from 32k to 128k
WIDE = 128  # block width for all else


def argmax(x: Float[Array, "R V"]) -> tuple[Float[Array, "R"], Int[Array, "R"]]:
    """Largest value and the first index that has it.

    XLA:CPU's argmax over V is scalar code; its max is not, so only one block is searched.
    """
    parts = blocks(x, WIDE)
    maxima = parts.max(axis=2)
    block = jnp.argmax(maxima, axis=1).astype(jnp.int32)
    chosen = jnp.take_along_axis(parts, block[:, None, None], axis=1)[:, 0]
    index = jnp.argmax(chosen, axis=1).astype(jnp.int32)
    # Not maxima.max(): XLA would merge the two reductions into a second pass over x.
    value = jnp.take_along_axis(chosen, index[:, None], axis=1)[:, 0]
    return value, block * parts.shape[2] + index


def top(x: Float[Array, "R V"], k: int) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """lax.top_k, ties included: the k largest lie in the k blocks of largest maxima.

    Keeping those blocks in their order makes equal values come out in order of their index.
    """
    parts = blocks(x, NARROW)
    num_rows, num_blocks, width = parts.shape
    if num_blocks <= k:
        return lax.top_k(x, k)
    chosen = jnp.sort(lax.top_k(parts.max(axis=2), k)[1], axis=1)
    part = jnp.take_along_axis(parts, chosen[:, :, None], axis=1).reshape(num_rows, -1)
    values, places = lax.top_k(part, k)
    block = jnp.take_along_axis(chosen, places // width, axis=1)
    return values, block * width + places % width


def blocks(x: Float[Array, "R V"], width: int) -> Float[Array, "R N X"]:
    """Rows cut into blocks of about `width`; padded, by -inf, only if no near width divides V."""
    num_rows, size = x.shape
    widths = [w for w in range(width, width // 4 - 1, -1) if size % w == 0]
    if not widths:
        widths = [width]
        x = jnp.pad(x, ((0, 0), (0, -size % width)), constant_values=-jnp.inf)
    return x.reshape(num_rows, -1, widths[0])


def ones(keep: Bool[Array, "*X"]) -> Float[Array, "*X"]:
    """Booleans to be counted by a float sum, which XLA:CPU vectorises and an int sum is not."""
    return jnp.where(keep, 1.0, 0.0)


def row_sum(parts: Float[Array, "R N X"]) -> Float[Array, "R"]:
    """Sums of rows given in blocks."""
    return parts.sum(axis=2).sum(axis=1)
