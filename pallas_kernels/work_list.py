"""Who reads which part of which context in one decode step, planned on the host.

The cached tokens of a request are read in tiles of a few tokens, once for each of its kv heads. A
segment is the row of tiles of one (request, kv head). All segments lie one after another, and each
worker gets an equal range of that line, so that loads differ by one tile at most:

    segment     0 . . . . . | 1 . . | 2 . . | 3 . . . . . . |
    worker      0 . . . . 1 . . . . 2 . . . . 3 . . . . 4 .

An item is what one worker has of one segment. Only a worker's first and last item can be a part of
a segment; those parts are partial results, which meet in a merge. So a plan says where each worker
begins and ends, and which of its (at most two) parts belong together: its size depends on the
numbers of requests and workers, not on heads or lengths, and one compiled program serves any.

Source: Stream-K (Osama et al., arXiv 2301.03598, section 4), here along keys instead of a product's
summed axis.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

# A CTA of the decode kernel has as many warpgroups that compute; each is a worker of its own.
WORKERS_PER_CTA = 2
# Parts of segments that one worker can have.
PARTS_PER_WORKER = 2
# Tokens that the kernel reads at once: a part of a page, a page or several pages.
TILE_LEN = 64


class WorkList(NamedTuple):
    """A plan. W is the most workers a program was compiled for, C = 2 W the parts they can have.

    Fields are numpy arrays on the host and jax arrays in a program.

    Attributes:
        live: Requests with tokens: (request, first tile, end of tiles), [first, end) being what
            the newest token sees. Rows past the last of them are 0.
        workers: For each worker: (first segment, its number of items, first tile of its first
            item, end of tiles of its last item, tiles in all). Segment s is kv head s % K of
            live request s // K. A worker without work has zeros.
        part_groups: For each part that a worker can have, first and last item in turn: which
            group of parts it is merged with; W where that item is no part or is not there.
        group_rows: For each group the row of the result that it makes, request * K + kv head;
            R * K in groups without parts.
    """

    live: Int32[Any, "R 3"]
    workers: Int32[Any, "W 5"]
    part_groups: Int32[Any, "C"]
    group_rows: Int32[Any, "W"]


def plan_decode(
    context_lens: Int32[np.ndarray, "R"],
    *,
    num_kv_heads: int,
    num_ctas: int,
    max_ctas: int | None = None,
    window: int | None = None,
    tile_len: int = TILE_LEN,
) -> WorkList:
    """Shares the contexts of one step out to CTAs.

    Args:
        context_lens: Cached tokens that each request sees, its newest included; 0 in unused rows.
        num_kv_heads: K, on this device.
        num_ctas: That will work, each with two workers.
        max_ctas: For how many to leave room; num_ctas unless given.
        window: Newest tokens that are seen; None for all. Tiles wholly before it are in no item.
        tile_len: Tokens in a tile.

    Raises:
        ValueError: A number is out of its range.
    """
    max_ctas = num_ctas if max_ctas is None else max_ctas
    lens = np.asarray(context_lens).astype(np.int64)
    _check(lens, num_kv_heads, tile_len, num_ctas=num_ctas, max_ctas=max_ctas, window=window)
    num_workers, capacity = WORKERS_PER_CTA * num_ctas, WORKERS_PER_CTA * max_ctas
    num_rows = len(lens) * num_kv_heads
    plan = WorkList(
        live=np.zeros((len(lens), 3), np.int32),
        workers=np.zeros((capacity, 5), np.int32),
        part_groups=np.full(PARTS_PER_WORKER * capacity, capacity, np.int32),
        group_rows=np.full(capacity, num_rows, np.int32),
    )
    requests = np.flatnonzero(lens)
    if not len(requests):
        return plan
    end = -(-lens[requests] // tile_len)
    first = np.zeros_like(end)
    if window is not None:
        first = np.maximum(lens[requests] - window, 0) // tile_len
    plan.live[: len(requests)] = np.stack([requests, first, end], axis=1)

    ends = np.cumsum((end - first) * num_kv_heads)  # of each request's tiles in the line
    cuts = np.arange(num_workers + 1) * ends[-1] // num_workers
    working = np.flatnonzero(cuts[1:] > cuts[:-1])
    line = _Line(first, end, ends, num_kv_heads)
    segment, begin = line.place(cuts[working])
    last_segment, last_tile = line.place(cuts[working + 1] - 1)
    num_items = last_segment - segment + 1
    sizes = cuts[working + 1] - cuts[working]
    plan.workers[working] = np.stack([segment, num_items, begin, last_tile + 1, sizes], axis=1)

    is_cut_before = begin > first[segment // num_kv_heads]
    is_cut_after = last_tile + 1 < end[last_segment // num_kv_heads]
    is_part = np.stack(
        [is_cut_before | (is_cut_after & (num_items == 1)), is_cut_after & (num_items > 1)], axis=1
    )
    segments = np.stack([segment, last_segment], axis=1)[is_part]
    parts = (PARTS_PER_WORKER * working[:, None] + np.arange(PARTS_PER_WORKER))[is_part]
    is_new = np.diff(segments, prepend=-1) != 0
    plan.part_groups[parts] = np.cumsum(is_new) - 1
    segments = segments[is_new]
    rows = requests[segments // num_kv_heads] * num_kv_heads + segments % num_kv_heads
    plan.group_rows[: len(rows)] = rows
    return plan


class _Line(NamedTuple):
    """Tiles of all segments, one after another."""

    first: Any
    end: Any
    ends: Any
    num_kv_heads: int

    def place(self, index: Any) -> tuple[Any, Any]:
        """Segment and tile at some indices of the line."""
        live = np.searchsorted(self.ends, index, side="right")
        sizes = self.end[live] - self.first[live]
        within = index - (self.ends[live] - sizes * self.num_kv_heads)
        head, tile = np.divmod(within, sizes)
        return live * self.num_kv_heads + head, self.first[live] + tile


def _check(
    lens: Any,
    num_kv_heads: int,
    tile_len: int,
    *,
    num_ctas: int,
    max_ctas: int,
    window: int | None,
) -> None:
    if lens.ndim != 1:
        raise ValueError(f"context_lens{lens.shape} is not [R]")
    if (lens < 0).any():
        raise ValueError(f"context_lens has {lens.min()}; lengths are at least 0")
    for name, value in (("num_kv_heads", num_kv_heads), ("tile_len", tile_len)):
        if value < 1:
            raise ValueError(f"{name}={value} is not at least 1")
    if not 1 <= num_ctas <= max_ctas:
        raise ValueError(f"num_ctas={num_ctas} is outside [1, max_ctas={max_ctas}]")
    if window is not None and window < 1:
        raise ValueError(f"window={window} is not at least 1; None sees all tokens")
