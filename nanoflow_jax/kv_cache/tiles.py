"""Work list of prefill attention: prompt chunks cut into query tiles, on the host, without jax."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32


class PrefillTiles(NamedTuple):
    """Query tiles of one step; C, their capacity, is fixed and unused tiles have no tokens.

    Used tiles come first. Fields are numpy arrays on the host and jax arrays in a program.
    """

    starts: Int32[Any, "C"]  # flat index of the tile's first token in the dense batch
    counts: Int32[Any, "C"]  # tokens in the tile; 0 in an unused one
    positions: Int32[Any, "C"]  # position of the first token in its own context
    rows: Int32[Any, "C"]  # row of the page table


class Chunk(NamedTuple):
    """Consecutive tokens of one request in the dense batch."""

    start: int  # flat index of the first token
    length: int  # tokens
    position: int  # position of the first token in its own context
    row: int  # row of the page table


def max_tiles(num_tokens: int, num_rows: int, *, tile_len: int) -> int:
    """Tiles that are enough for any `num_rows` chunks which together have `num_tokens` tokens."""
    # ceil(n / tile_len) <= (n + tile_len - 1) / tile_len, summed over the rows.
    return (num_tokens + min(num_rows, num_tokens) * (tile_len - 1)) // tile_len


def build_prefill_tiles(chunks: Sequence[Chunk], *, tile_len: int, capacity: int) -> PrefillTiles:
    """Cut chunks into tiles of at most `tile_len` tokens.

    A tile never holds tokens of two chunks, so each chunk may end in a part-filled tile.

    Args:
        chunks: Chunks of this step, in any order; they must not overlap.
        tile_len: Most tokens in a tile.
        capacity: C, the number of tiles the program was compiled for; `max_tiles` is enough.

    Returns:
        The tiles, used ones first, as int32 numpy arrays of length C.

    Raises:
        ValueError: If the chunks need more tiles than there are.
    """
    cut = [
        (chunk.start + done, min(tile_len, chunk.length - done), chunk.position + done, chunk.row)
        for chunk in chunks
        for done in range(0, chunk.length, tile_len)
    ]
    if len(cut) > capacity:
        raise ValueError(
            f"{len(chunks)} chunks need {len(cut)} tiles of {tile_len} tokens and there are "
            f"{capacity}; compile the program for more tiles"
        )
    columns = np.zeros((4, capacity), np.int32)
    columns[:, : len(cut)] = np.asarray(cut, np.int32).reshape(-1, 4).T
    return PrefillTiles(*columns)
