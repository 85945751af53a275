"""Work list of the prefill kernel: chunks of prompts cut into tiles, on the host, without jax.

A tile is a run of slots in the dense batch whose queries share the keys that are fetched. The
tensor memory access unit moves rows by eights, so a tile starts at a multiple of eight:

    dense batch   ... d d d | a a a a a a b b | b b b ...
    tiles of a              [ a a a a a a . . ]
    tiles of b              [ . . . . . . b b   b b b ...

Slots before a chunk (of another request) are computed and thrown away.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

# Rows of a granule: what one copy moves of one query head.
GRANULE = 8
# Granules of a tile: 128 rows, 64 for each of two warpgroups.
TILE_GRANULES = 16


class PrefillTiles(NamedTuple):
    """Tiles of one step, costliest first; C, their capacity, is fixed.

    Fields are numpy arrays on the host and jax arrays in a program.
    """

    starts: Int32[Any, "C"]  # flat index of the tile's first slot, a multiple of 8
    counts: Int32[Any, "C"]  # slots up to the tile's last token; 0 in an unused tile
    positions: Int32[Any, "C"]  # position of the first slot in its context; below 0 before it
    rows: Int32[Any, "C"]  # row of the page table
    num_tiles: Int32[Any, "1"]  # used tiles
    sources: Int32[
        Any, "T"
    ]  # where a token's result is: tile * tile_len + slot; C * tile_len: none


def tile_len(group: int) -> int:
    """Slots of a tile when so many query heads read one KV head.

    Raises:
        ValueError: A tile does not have room for one granule of each head.
    """
    if not 1 <= group <= TILE_GRANULES:
        raise ValueError(
            f"{group} query heads for each KV head are not in 1..{TILE_GRANULES}; prefill with "
            "the plain path"
        )
    return TILE_GRANULES // group * GRANULE


def max_tiles(num_tokens: int, num_rows: int, *, group: int) -> int:
    """Tiles that are enough for any `num_rows` chunks which together have `num_tokens` tokens."""
    slots = tile_len(group)
    # ceil((skipped + n) / slots) <= (7 + n + slots - 1) / slots, summed over the rows.
    return (num_tokens + min(num_rows, num_tokens) * (slots + GRANULE - 2)) // slots


def build_prefill_tiles(
    chunks: Any,
    *,
    group: int,
    capacity: int,
    num_tokens: int,
    window: int | None = None,
    aligned: bool = False,
) -> PrefillTiles:
    """Cut chunks into tiles.

    Args:
        chunks: [R, 4] integers, or a sequence of four: flat index of a chunk's first token in the
            dense batch, tokens, position of the first in its own context, row of the page table.
            Chunks must not overlap; one without tokens is left out.
        group: G, query heads for each KV head.
        capacity: C, the number of tiles the program was compiled for; `max_tiles` is enough.
        num_tokens: T, tokens of the dense batch.
        window: Newest tokens a query sees; says only which tiles cost most.
        aligned: Whether to insist on chunks that start at multiples of 8, for which the kernel
            needs no copy of its result.

    Returns:
        The tiles, as int32 numpy arrays. The order lets CTAs take tiles in turn, to and fro, and
        end together.

    Raises:
        ValueError: A chunk lies outside the dense batch or does not start where it must, or there
            are more tiles than capacity.
    """
    chunks = np.asarray(chunks, np.int64).reshape(-1, 4)
    chunks = chunks[chunks[:, 1] > 0]
    first, length, position, row = chunks.T
    ends = first + length
    if len(chunks) and (first.min() < 0 or ends.max() > num_tokens):
        raise ValueError(
            f"chunks reach over tokens {first.min()}..{ends.max()} of a batch of {num_tokens}"
        )
    slots = tile_len(group)
    skipped = first % GRANULE
    if aligned and skipped.any():
        raise ValueError(
            f"a chunk starts at token {first[skipped > 0][0]}, which is no multiple of {GRANULE}"
        )
    tiles_each = -(-(skipped + length) // slots)
    used = int(tiles_each.sum())
    if used > capacity:
        raise ValueError(
            f"{len(chunks)} chunks need {used} tiles of {slots} slots and there are {capacity}; "
            "compile the program for more tiles"
        )
    chunk = np.repeat(np.arange(len(chunks)), tiles_each)
    # Slots of its chunk before the tile.
    done = (np.arange(used) - np.repeat(np.cumsum(tiles_each) - tiles_each, tiles_each)) * slots
    starts = (first - skipped)[chunk] + done
    counts = np.minimum(slots, ends[chunk] - starts)
    positions = (position - skipped)[chunk] + done
    seen = positions + counts
    if window is not None:
        seen = np.minimum(seen, counts + window)
    order = np.argsort(-seen, kind="stable")
    columns = np.zeros((4, capacity), np.int32)
    columns[:, :used] = np.stack([starts, counts, positions, row[chunk]])[:, order]
    return PrefillTiles(
        starts=columns[0],
        counts=columns[1],
        positions=columns[2],
        rows=columns[3],
        num_tiles=np.asarray([used], np.int32),
        sources=_sources(columns[:2, :used], first[chunk][order], slots, capacity, num_tokens),
    )


def _sources(
    columns: Int32[np.ndarray, "2 U"],
    first_token: Int32[np.ndarray, "U"],
    slots: int,
    capacity: int,
    num_tokens: int,
) -> Int32[np.ndarray, "T"]:
    starts, counts = columns
    slot = np.arange(slots)
    token = starts[:, None] + slot  # [U, slots]
    is_real = (slot < counts[:, None]) & (token >= first_token[:, None])
    sources = np.full(num_tokens, capacity * slots, np.int32)
    place = np.arange(len(starts))[:, None] * slots + slot
    sources[token[is_real]] = place[is_real]
    return sources
