"""What the attention kernels for Pallas' Triton backend share: queries against pages of a cache.

One loop over keys with a running softmax. Pages are fetched by `cp.async` (sm_80) some steps ahead
of their use. Triton counts two stages for each of them, one for the page's number and one for the
page: `num_stages` of 5 keep two steps on their way. Sizes that are no power of 2 are masked, and
what is masked is not read.

Source: running softmax: Milakov and Gimelshein, arXiv 1805.02867; the schedule of the loop is
Triton's (Tillet et al., MAPL 2019).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int32, Shaped

from nanoflow_jax import compat
from pallas_kernels.decode_role import DecodeOptions

# Stands for minus infinity where a difference is taken: -inf - -inf would be NaN.
_LOWEST = -1e30
# Rows of the smallest product of tensor cores, and its summed columns.
LEAST_ROWS = 16
DTYPES = ("bfloat16", "float16", "float32")
MOST_HEAD_DIM = 256
# Most tokens of a step, and bytes of its keys and values: two or three steps fit the 99 KiB that a
# CTA may have on the smallest of these GPUs (sm_86, sm_89).
_MOST_STEP_LEN = 64
_STEP_BYTES = 32 << 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How a kernel runs.

    Attributes:
        step_len: Tokens a step of the loop reads: 16, 32 or 64.
        num_warps: Of a CTA.
        num_stages: See above.

    Raises:
        ValueError: step_len is another.
    """

    step_len: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.step_len < LEAST_ROWS or _MOST_STEP_LEN % self.step_len:
            raise ValueError(f"step_len={self.step_len} is none of 16, 32 and 64")


def default_tile(*, head_dim: int, itemsize: int, num_warps: int) -> Tile:
    """What fits the smallest of these GPUs.

    Args:
        head_dim: H.
        itemsize: Bytes of an element of the cache.
        num_warps: Of a CTA.
    """
    token_bytes = 2 * pl.next_power_of_2(head_dim) * itemsize
    step_len = min(max(_STEP_BYTES // token_bytes, LEAST_ROWS), _MOST_STEP_LEN)
    return Tile(step_len=step_len, num_warps=num_warps, num_stages=5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Keys that some queries see.

    Attributes:
        cache: Ref of the cache, [P, 2, K, S, H].
        page_table: Ref, [R, M].
        row: Of the page table.
        head: Of the cache.
        first: First key that anybody sees.
        end: Keys from here on are seen by nobody; at least one is before it.
    """

    cache: Any
    page_table: Any
    row: Any
    head: Any
    first: Any
    end: Any


def attend(
    query: Shaped[Array, "G H"],
    context: Context,
    options: DecodeOptions,
    tile: Tile,
    *,
    sees: Callable[[Int32[Array, "1 C"]], Bool[Array, "#G C"]],
) -> tuple[Float[Array, "G H"], Float[Array, "G"], Float[Array, "G"]]:
    """Mean of values, largest score and sum of exponentials of each query, inside a kernel.

    Args:
        query: G and H padded as `padded` does.
        context: What is there to see.
        options: What a model says of its scores.
        tile: How the kernel runs.
        sees: Which of some keys of [first, end) each query sees; every query that counts sees one.
    """
    M = context.page_table.shape[1]
    S, H = context.cache.shape[3:]
    columns = padded(H)

    def one_step(i: Any, running: Any) -> Any:
        mixed, top, total = running
        position = i * tile.step_len + jnp.arange(tile.step_len, dtype=jnp.int32)
        is_there = (position >= context.first) & (position < context.end)
        page = compat.plt.load(
            context.page_table.at[context.row, jnp.minimum(lax.div(position, S), M - 1)],
            mask=is_there,
            other=0,
        )

        def read(side: int) -> Any:
            offset = lax.rem(position, S)[:, None]
            return compat.plt.load(
                context.cache.at[page[:, None], side, context.head, offset, columns[None]],
                mask=is_there[:, None] & (columns < H)[None],
                other=0,
            )

        scores = options.powers(_product(query, read(0).T))
        scores = jnp.where(is_there[None] & sees(position[None]), scores, _LOWEST)
        new_top = jnp.maximum(top, scores.max(axis=1))
        fade = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - new_top[:, None])
        values = read(1)
        mixed = mixed * fade[:, None] + _product(weights.astype(values.dtype), values)
        return mixed, new_top, total * fade + weights.sum(axis=1)

    num_rows = query.shape[0]
    nothing = (
        jnp.zeros((num_rows, columns.shape[0]), jnp.float32),
        jnp.full((num_rows,), _LOWEST, jnp.float32),
        jnp.zeros((num_rows,), jnp.float32),
    )
    num_steps = lax.div(context.end + tile.step_len - 1, tile.step_len)
    first_step = lax.div(context.first, tile.step_len)
    mixed, top, total = lax.fori_loop(first_step, num_steps, one_step, nothing)
    return mixed / total[:, None], top, total


def padded(size: int) -> Int32[Array, "X"]:
    """Indices up to a power of 2 that tensor cores multiply."""
    return jnp.arange(max(pl.next_power_of_2(size), LEAST_ROWS), dtype=jnp.int32)


def _product(x: Any, y: Any) -> Any:
    return compat.plt.dot(x, y, allow_tf32=False)
