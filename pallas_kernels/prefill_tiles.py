"""Work list of the prefill kernel: chunks of prompts cut into tiles, on the host, without jax.

A tile is a run of slots in the dense batch whose queries share the keys that are fetched. The
tensor memory access unit moves rows by eights, so a tile starts at a multiple of eight:

    dense batch   ... d d d | a a a a a a b b | b b b ...
    tiles of a              [ a a a a a a . . ]
    tiles of b              [ . . . . . . b b   b b b ...

Slots before a chunk (of another request) are computed and thrown away.

A CTA takes one tile for one KV head at a time. Where tiles times heads do not keep all CTAs busy
until the end, the keys of the longest ones are cut into parts, each an item of its own: a chunk of
128 tokens behind 32768 is 8 tiles of Llama-3-70B on one of 8 GPUs, for 132 CTAs.

    keys of a tile   0 ............................... position + count
    parts            |    0    |    1    |    2    |    3    |

Parts are partial results, which meet in a merge.

Source: split keys as in Flash-Decoding (Dao et al., 2023).
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

# Rows of a granule: what one copy moves of one query head.
GRANULE = 8
# Granules of a tile: 128 rows, 64 for each of two warpgroups.
TILE_GRANULES = 16


# Keys that the kernel multiplies at a time, at most.
_LONGEST_STEP = 128
_MOST_PARTS_PER_CTA = 3


class PrefillTiles(NamedTuple):
    """Items of one step, costliest first; C, their capacity, is fixed. B is that of parts.

    Fields are numpy arrays on the host and jax arrays in a program.
    """

    starts: Int32[Any, "C"]  # flat index of the tile's first slot, a multiple of 8
    counts: Int32[Any, "C"]  # slots up to the tile's last token; 0 in an unused item
    positions: Int32[Any, "C"]  # position of the first slot in its context; below 0 before it
    rows: Int32[Any, "C"]  # row of the page table
    num_tiles: Int32[Any, "1"]  # used items
    # Where a token's result is: item * tile_len + slot, the first part's if there are parts;
    # C * tile_len: none.
    sources: Int32[Any, "T"]
    # Number of the part in its tile, parts of that, number among all parts; 0 in an unused item.
    cuts: Int32[Any, "C 3"]
    groups: Int32[Any, "B//2 2"]  # [first, end) of the parts of each tile that is cut
    group_items: Int32[Any, "B//2"]  # item that is the first of them; C of none


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeySplit:
    """For whom keys are cut into parts.

    Attributes:
        num_kv_heads: K, on this device.
        num_ctas: That will work. Any others get the same results, later.
        max_parts: B, parts that the program was compiled for, even; `max_parts` is enough.
        least_len: Fewest keys of a part.
        part_cost: What a part costs beside its keys, in keys of the same time. Its queries come and
            its result goes in float32: 96 KiB, as against 512 bytes for a key (head width 128).

    Raises:
        ValueError: A number is out of its range.
    """

    num_kv_heads: int
    num_ctas: int
    max_parts: int
    least_len: int = 512
    part_cost: int = 192

    def __post_init__(self) -> None:
        least = {
            "num_kv_heads": 1,
            "num_ctas": 1,
            "max_parts": 2,
            "least_len": _LONGEST_STEP,
            "part_cost": 0,
        }
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name}={getattr(self, name)} is not at least {number}")
        if self.max_parts % 2:
            raise ValueError(f"max_parts={self.max_parts} is odd; a tile has two or more")


def max_parts(*, num_kv_heads: int, num_ctas: int) -> int:
    """Parts that give every CTA one."""
    return 2 * -(-num_ctas // (2 * num_kv_heads))


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
    """Tiles that are enough for any `num_rows` chunks which together have `num_tokens` tokens.

    Where keys are cut into parts, those need as much room beside.
    """
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
    split: KeySplit | None = None,
) -> PrefillTiles:
    """Cut chunks into tiles, and keys of tiles into parts where CTAs would be idle.

    Args:
        chunks: [R, 4] integers, or a sequence of four: flat index of a chunk's first token in the
            dense batch, tokens, position of the first in its own context, row of the page table.
            Chunks must not overlap; one without tokens is left out.
        group: G, query heads for each KV head.
        capacity: C, the number of items the program was compiled for; `max_tiles` is enough, and
            max_parts more for parts.
        num_tokens: T, tokens of the dense batch.
        window: Newest tokens a query sees; says only which tiles cost most.
        aligned: Whether to insist on chunks that start at multiples of 8, for which the kernel
            needs no copy of its result.
        split: None cuts no keys; the program then has no merge.

    Returns:
        The items, as int32 numpy arrays. The order lets CTAs take them in turn, to and fro, and
        end together.

    Raises:
        ValueError: A chunk has a number below 0, lies outside the dense batch or does not start
            where it must, the window is no number of tokens, or there are more tiles than capacity.
    """
    chunks = np.asarray(chunks, np.int64).reshape(-1, 4)
    if (below := chunks[(chunks < 0).any(axis=1)]).size:
        raise ValueError(
            f"a chunk is (first token, tokens, position, row) {(*below[0].tolist(),)}; none of "
            "them may be below 0"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window} is not at least 1; None sees all tokens")
    chunks = chunks[chunks[:, 1] > 0]
    first, length, position, row = chunks.T
    ends = first + length
    if len(chunks) and ends.max() > num_tokens:
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
    parts = np.ones(used, np.int64) if split is None else _num_parts(seen, capacity, split)
    tile, part = _expanded(parts)
    order = np.argsort(-(seen / parts)[tile], kind="stable")
    tile, part = tile[order], part[order]
    num_items = len(tile)
    columns = np.zeros((4, capacity), np.int32)
    columns[:, :num_items] = np.stack([starts, counts, positions, row[chunk]])[:, tile]
    cuts, groups, group_items = _cuts(
        tile, part, parts, capacity=capacity, room=0 if split is None else split.max_parts
    )
    # A token's result is in the first part.
    sourced = np.where(part == 0, columns[1, :num_items], 0)
    return PrefillTiles(
        starts=columns[0],
        counts=columns[1],
        positions=columns[2],
        rows=columns[3],
        num_tiles=np.asarray([num_items], np.int32),
        sources=_sources(
            np.stack([columns[0, :num_items], sourced]),
            first[chunk][tile],
            slots,
            capacity,
            num_tokens,
        ),
        cuts=cuts,
        groups=groups,
        group_items=group_items,
    )


def _num_parts(
    seen: Int32[np.ndarray, "U"], capacity: int, split: KeySplit
) -> Int32[np.ndarray, "U"]:
    """Parts of each tile: of some ways to cut, the one whose last CTA ends first."""
    best = np.ones(len(seen), np.int64)
    if not len(seen):
        return best
    soonest = _end(seen, best, split)
    per_cta = seen.sum() * split.num_kv_heads / split.num_ctas
    for parts_per_cta in range(1, _MOST_PARTS_PER_CTA + 1):
        # Not more than asked for: one part too many is a round more.
        parts = np.minimum(seen * parts_per_cta // per_cta, seen // split.least_len)
        parts = np.maximum(parts, 1).astype(np.int64)
        fits = parts[parts > 1].sum() <= split.max_parts and parts.sum() <= capacity
        if fits and (end := _end(seen, parts, split)) < soonest:
            best, soonest = parts, end
    return best


def _end(seen: Int32[np.ndarray, "U"], parts: Int32[np.ndarray, "U"], split: KeySplit) -> float:
    """When the last CTA ends if items are dealt as the kernel deals them, in keys."""
    cost = np.where(parts > 1, seen / parts + split.part_cost, seen)
    items = np.repeat(np.sort(np.repeat(cost, parts))[::-1], split.num_kv_heads)
    rounds = np.zeros((-(-len(items) // split.num_ctas), split.num_ctas))
    rounds.reshape(-1)[: len(items)] = items
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return float(rounds.sum(axis=0).max())


def _expanded(
    parts: Int32[np.ndarray, "U"],
) -> tuple[Int32[np.ndarray, "I"], Int32[np.ndarray, "I"]]:
    """Tile of each item, and its number among the parts of that."""
    tile = np.repeat(np.arange(len(parts)), parts)
    return tile, np.arange(len(tile)) - np.repeat(np.cumsum(parts) - parts, parts)


def _cuts(
    tile: Int32[np.ndarray, "I"],
    part: Int32[np.ndarray, "I"],
    parts: Int32[np.ndarray, "U"],
    *,
    capacity: int,
    room: int,
) -> tuple[Int32[np.ndarray, "C 3"], Int32[np.ndarray, "W 2"], Int32[np.ndarray, "W"]]:
    """What an item is of its tile; which parts belong together, and where their result goes."""
    cuts = np.zeros((capacity, 3), np.int32)
    groups = np.zeros((room // 2, 2), np.int32)
    group_items = np.full(room // 2, capacity, np.int32)
    is_cut = parts > 1
    ends = np.cumsum(parts * is_cut)
    cuts[: len(tile)] = np.stack([part, parts[tile], np.where(is_cut, ends - parts, 0)[tile]], 1)
    cuts[: len(tile), 2] += np.where(is_cut[tile], part, 0)
    num_groups = is_cut.sum()
    groups[:num_groups] = np.stack([ends - parts, ends], axis=1)[is_cut]
    # The first part of each tile that is cut, in the order of tiles.
    firsts = np.flatnonzero(is_cut[tile] & (part == 0))
    group_items[:num_groups] = firsts[np.argsort(tile[firsts])]
    return cuts, groups, group_items


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
