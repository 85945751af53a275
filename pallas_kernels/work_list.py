"""Who reads which part of which context in one decode step, planned on the host.

The cached tokens of a request are read in tiles of a few tokens, once for each of its kv heads. A
segment is the row of tiles of one (request, kv head). All segments lie one after another, and each
worker gets a range of that line, so that loads are equal but for one tile:

    segment     0 . . . . . | 1 . . | 2 . . | 3 . . . . . . |
    worker      0 . . . . 1 . . . . 2 . . . . 3 . . . . 4 .

An item is what a worker reads of one segment in one go. Where it is not the whole segment it is a
part: a partial result, merged with the other parts of its segment. Parts are counted along the
line, so that those of a segment follow one another.

Where workers cut a segment depends on all that is in the batch, and so do the last bits of its
result. With a split_len a segment is cut after every split_len tokens instead, and workers' ranges
begin and end where some segment is cut: loads differ by up to a split, but a request's bits are the
same in any batch and for any number of workers.

The size of a plan depends on the numbers of requests, kv heads, workers and parts it has room for,
not on lengths: one compiled program serves any.

Source: Stream-K (Osama et al., arXiv 2301.03598, section 4), here along keys instead of a product's
summed axis; splits of a fixed size: "Defeating nondeterminism in LLM inference" (Thinking Machines
Lab, 2025).
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

# A CTA of the decode kernel has as many warpgroups that compute; each takes a worker at a time.
WORKERS_PER_CTA = 2
# A segment that is cut has at least so many parts: each group of parts has room for them.
PARTS_PER_GROUP = 2
# Tokens of a tile: a part of a page, a page or several pages.
TILE_LEN = 64
# Of a segment that only workers cut: more tiles than one has.
_NO_SPLIT = 1 << 30


class WorkList(NamedTuple):
    """A plan. W is the most workers it has room for, B the most groups of parts.

    Fields are numpy arrays on the host and jax arrays in a program.

    Attributes:
        live: Requests with tokens: (request, first tile, end of tiles, tiles of an item at most),
            [first, end) being what the newest token sees. Rows past the last of them are 0.
        workers: For each worker: (first segment, tiles of it that come before the worker's, tiles
            in all, number of items, number of the first of its items that is a part). Segment s is
            kv head s % K of live request s // K. A worker without work has zeros.
        groups: For each segment that is cut: its [first, end) of parts. Zeros in unused rows.
        row_groups: For each result, request * K + kv head, the group that is merged to it; B where
            there is none.
    """

    live: Int32[Any, "R 4"]
    workers: Int32[Any, "W 5"]
    groups: Int32[Any, "B 2"]
    row_groups: Int32[Any, "RK"]


def plan_decode(
    context_lens: Int32[np.ndarray, "R"],
    *,
    num_kv_heads: int,
    num_ctas: int,
    max_ctas: int | None = None,
    window: int | None = None,
    split_len: int | None = None,
    max_parts: int | None = None,
    tile_len: int = TILE_LEN,
) -> WorkList:
    """Shares the contexts of one step out to workers.

    Args:
        context_lens: Cached tokens that each request sees, its newest included; 0 in unused rows.
        num_kv_heads: K, on this device.
        num_ctas: For which loads are balanced, each with two workers. Fewer or more may run the
            plan, to the same bits.
        max_ctas: For how many to leave room; num_ctas unless given.
        window: Newest tokens that are seen; None for all. Tiles wholly before it are in no item.
        split_len: Tokens after which each context is cut, a multiple of tile_len, so that a
            request's result does not depend on others; None cuts where it balances loads.
        max_parts: For how many parts to leave room, with a split_len only; see `most_parts`. What
            these contexts need unless given.
        tile_len: Tokens in a tile.

    Raises:
        ValueError: A number is out of its range, or there are more parts than room for them.
    """
    max_ctas = num_ctas if max_ctas is None else max_ctas
    lens = np.asarray(context_lens).astype(np.int64)
    _check(lens, num_kv_heads, tile_len, num_ctas=num_ctas, max_ctas=max_ctas, window=window)
    _check_split(split_len, max_parts, tile_len)
    requests = np.flatnonzero(lens)
    end = -(-lens[requests] // tile_len)
    first = np.zeros_like(end)
    if window is not None:
        first = np.maximum(lens[requests] - window, 0) // tile_len
    split = _NO_SPLIT if split_len is None else split_len // tile_len
    line = _Line(end - first, split, num_kv_heads)
    work = line.share_out(WORKERS_PER_CTA * num_ctas)

    max_workers = WORKERS_PER_CTA * max_ctas
    max_groups = max_workers if split_len is None else _max_groups(work, max_parts)
    plan = WorkList(
        live=np.zeros((len(lens), 4), np.int32),
        workers=np.zeros((max_workers, 5), np.int32),
        groups=np.zeros((max_groups, 2), np.int32),
        row_groups=np.full(len(lens) * num_kv_heads, max_groups, np.int32),
    )
    plan.live[: len(requests)] = np.stack([requests, first, end, np.full_like(end, split)], axis=1)
    plan.workers[work.working] = work.rows
    plan.groups[: len(work.groups)] = work.groups
    live, kv_head = work.cut
    plan.row_groups[requests[live] * num_kv_heads + kv_head] = np.arange(len(work.groups))
    return plan


def most_parts(
    *, num_requests: int, num_tokens: int, context_len: int, num_kv_heads: int, split_len: int
) -> int:
    """Parts that a plan with a split_len can need.

    Args:
        num_requests: Most requests of a batch.
        num_tokens: Most cached tokens of all of them; a shared page counts for each that shares it.
        context_len: Most cached tokens of one.
        num_kv_heads: K, on this device.
        split_len: Of the plan, tokens.
    """
    by_length = num_requests * -(-context_len // split_len)
    return num_kv_heads * min(by_length, num_requests + num_tokens // split_len)


class _Shares(NamedTuple):
    """The line as it is shared out.

    Attributes:
        working: Workers that have something to do.
        rows: Their rows of a plan.
        cut: Live request and kv head of the segments that are cut, in order.
        groups: [first, end) of the parts of each.
    """

    working: Any
    rows: Any
    cut: tuple[Any, Any]
    groups: Any


class _Line:
    """Tiles of all segments, one after another.

    Args:
        sizes: Tiles of a segment of each live request.
        split: Tiles after which a segment is cut.
        num_kv_heads: Segments of each.
    """

    def __init__(self, sizes: Any, split: int, num_kv_heads: int) -> None:
        self._sizes, self._split, self._num_kv_heads = sizes, split, num_kv_heads
        self._ends = np.cumsum(sizes * num_kv_heads)  # of each request's tiles in the line
        self._num_items = -(-sizes // split)  # of each segment, as far as splits cut it

    def share_out(self, num_workers: int) -> _Shares:
        """Gives each worker an equal range of the line."""
        if not len(self._sizes):
            none = np.zeros(0, np.int64)
            return _Shares(none, none.reshape(0, 5), (none, none), none.reshape(0, 2))
        cuts = np.arange(num_workers + 1) * self._ends[-1] // num_workers
        has_splits = self._split < _NO_SPLIT
        if has_splits:
            cuts[:-1] -= self._place(cuts[:-1])[1] % self._split
        working = np.flatnonzero(cuts[1:] > cuts[:-1])
        begin, last = self._place(cuts[working]), self._place(cuts[working + 1] - 1)
        parts = self._cut_by_splits(begin) if has_splits else self._cut_by_workers(begin, last)
        first_parts, cut, groups = parts
        sizes = cuts[working + 1] - cuts[working]
        num_items = self._count(self._num_items, *last) - self._count(self._num_items, *begin) + 1
        rows = np.stack([*begin, sizes, num_items, first_parts], axis=1)
        return _Shares(working, rows, cut, groups)

    def _place(self, index: Any) -> tuple[Any, Any]:
        """Segment of some indices of the line, and tiles of that segment before each."""
        live = np.searchsorted(self._ends, index, side="right")
        sizes = self._sizes[live]
        within = index - (self._ends[live] - sizes * self._num_kv_heads)
        head, offset = np.divmod(within, sizes)
        return live * self._num_kv_heads + head, offset

    def _count(self, each: Any, segment: Any, offset: Any) -> Any:
        """Items before some places, of segments that have `each` of them."""
        live, head = np.divmod(segment, self._num_kv_heads)
        before = (np.cumsum(each) - each) * self._num_kv_heads
        return before[live] + head * each[live] + offset // self._split

    def _cut_by_splits(self, begin: Any) -> tuple[Any, tuple[Any, Any], Any]:
        """First part of each worker, segments that are cut, their parts."""
        num_parts = np.where(self._num_items > 1, self._num_items, 0)
        live, heads = np.flatnonzero(num_parts), np.arange(self._num_kv_heads)
        each = num_parts[live]
        ends = np.cumsum(np.repeat(each, self._num_kv_heads))
        groups = np.stack([ends - np.repeat(each, self._num_kv_heads), ends], axis=1)
        cut = np.repeat(live, self._num_kv_heads), np.tile(heads, len(live))
        return self._count(num_parts, *begin), cut, groups

    def _cut_by_workers(self, begin: Any, last: Any) -> tuple[Any, tuple[Any, Any], Any]:
        """The same where only a worker's first and last item can be parts."""
        segments = np.stack([begin[0], last[0]], axis=1)
        is_one = segments[:, 0] == segments[:, 1]
        is_cut_before = begin[1] > 0
        is_cut_after = last[1] + 1 < self._sizes[last[0] // self._num_kv_heads]
        is_part = np.stack(
            [is_cut_before | (is_cut_after & is_one), is_cut_after & ~is_one], axis=1
        )
        counts = is_part.sum(axis=1)
        cut, first, num_parts = np.unique(segments[is_part], return_index=True, return_counts=True)
        groups = np.stack([first, first + num_parts], axis=1)
        return np.cumsum(counts) - counts, np.divmod(cut, self._num_kv_heads), groups


def _max_groups(work: _Shares, max_parts: int | None) -> int:
    num_parts = int(work.groups[-1, 1]) if len(work.groups) else 0
    room = num_parts if max_parts is None else max_parts
    if num_parts > room:
        raise ValueError(
            f"the contexts are cut into {num_parts} parts; there is room for max_parts={room}: "
            "raise it (see most_parts) or split_len"
        )
    return max(1, -(-room // PARTS_PER_GROUP))


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


def _check_split(split_len: int | None, max_parts: int | None, tile_len: int) -> None:
    if split_len is None:
        if max_parts is not None:
            raise ValueError(
                f"max_parts={max_parts} is for a split_len; without one, workers set the parts"
            )
        return
    if split_len < 1 or split_len % tile_len:
        raise ValueError(f"split_len={split_len} is no positive multiple of tile_len={tile_len}")
    if max_parts is not None and max_parts < 0:
        raise ValueError(f"max_parts={max_parts} is not at least 0")
