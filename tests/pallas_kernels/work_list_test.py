"""Plans of decode attention: every tile once, equal loads, a fixed size."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pallas_kernels.work_list import PARTS_PER_GROUP, WORKERS_PER_CTA, most_parts, plan_decode

_TILE = 16
_LENS = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 3000)), max_size=12)


def _items(plan, num_kv_heads):
    """(worker, request, head, first tile, end of tiles, part or None) as the kernel walks them."""
    for worker, (segment, offset, left, num_items, part) in enumerate(plan.workers.tolist()):
        for _ in range(num_items):
            live, head = divmod(segment, num_kv_heads)
            request, first, end, split = plan.live[live].tolist()
            start = first + offset
            stop = min(end, start + left, start + split)
            is_part = (start, stop) != (first, end)
            yield worker, request, head, start, stop, part if is_part else None
            part, left = part + is_part, left - (stop - start)
            segment, offset = (segment + 1, 0) if stop == end else (segment, stop - first)
        assert left == 0


def _tiles_seen(lens, window, num_kv_heads):
    seen = [range(max(0, n - window) if window else 0, n) for n in lens]
    return {
        (request, head, token // _TILE)
        for request, tokens in enumerate(seen)
        for head in range(num_kv_heads)
        for token in tokens
    }


def _check_plan(plan, lens, num_kv_heads, window):
    """Every tile is read once, and parts of a segment are what its group says; items, parts."""
    items = list(_items(plan, num_kv_heads))
    assert all(start < stop for _, _, _, start, stop, _ in items)
    read = collections.Counter(
        (request, head, tile)
        for _, request, head, start, stop, _ in items
        for tile in range(start, stop)
    )
    assert read == collections.Counter(_tiles_seen(lens, window, num_kv_heads))
    parts = collections.defaultdict(list)
    for _, request, head, _, _, part in items:
        if part is not None:
            parts[request * num_kv_heads + head].append(part)
    num_rows, max_groups = len(lens) * num_kv_heads, len(plan.groups)
    assert plan.row_groups.shape == (num_rows,)
    groups = {
        row: group for row, group in enumerate(plan.row_groups.tolist()) if group < max_groups
    }
    merged = {row: list(range(*plan.groups[group])) for row, group in groups.items()}
    assert merged == parts
    assert sorted(itertools.chain(*merged.values())) == list(range(plan.groups.max()))
    assert all(len(one) >= PARTS_PER_GROUP for one in merged.values())
    unused = sorted(set(range(max_groups)) - set(groups.values()))
    assert not plan.groups[unused].any()
    return items


_HEADS = st.integers(1, 5)
_CTAS = st.integers(1, 9)
_WINDOWS = st.one_of(st.none(), st.integers(1, 200))


@given(lens=_LENS, num_kv_heads=_HEADS, num_ctas=_CTAS, spare=st.integers(0, 3), window=_WINDOWS)
@example(lens=[0, 0], num_kv_heads=2, num_ctas=3, spare=0, window=None)
@example(lens=[3000], num_kv_heads=1, num_ctas=9, spare=0, window=None)
@example(lens=[], num_kv_heads=1, num_ctas=1, spare=1, window=None)
@example(lens=[131072, *[1] * 30], num_kv_heads=1, num_ctas=9, spare=0, window=None)
def test_every_tile_that_is_seen_is_read_once_and_loads_are_equal(
    lens, num_kv_heads, num_ctas, spare, window
):
    plan = plan_decode(
        np.asarray(lens, np.int32),
        num_kv_heads=num_kv_heads,
        tile_len=_TILE,
        num_ctas=num_ctas,
        max_ctas=num_ctas + spare,
        window=window,
    )
    items = _check_plan(plan, lens, num_kv_heads, window)
    loads = plan.workers[: WORKERS_PER_CTA * num_ctas, 2]
    assert loads.max() - loads.min() <= 1
    assert not plan.workers[WORKERS_PER_CTA * num_ctas :].any()
    assert len(items) <= len(lens) * num_kv_heads + WORKERS_PER_CTA * num_ctas


@given(
    lens=_LENS,
    num_kv_heads=_HEADS,
    num_ctas=_CTAS,
    window=_WINDOWS,
    split_tiles=st.integers(1, 40),
)
@example(lens=[131072, *[1] * 30], num_kv_heads=1, num_ctas=9, window=None, split_tiles=64)
def test_with_a_split_a_request_is_cut_at_the_same_places_in_any_batch(
    lens, num_kv_heads, num_ctas, window, split_tiles
):
    options = {
        "num_kv_heads": num_kv_heads,
        "tile_len": _TILE,
        "window": window,
        "split_len": split_tiles * _TILE,
    }
    plan = plan_decode(lens, num_ctas=num_ctas, **options)
    items = _check_plan(plan, lens, num_kv_heads, window)
    loads = plan.workers[: WORKERS_PER_CTA * num_ctas, 2]
    assert loads.max() - loads.sum() / len(loads) <= split_tiles
    room = most_parts(
        num_requests=len(lens),
        num_tokens=sum(lens),
        context_len=max(lens, default=0),
        num_kv_heads=num_kv_heads,
        split_len=options["split_len"],
    )
    assert plan.groups.max(initial=0) <= room
    for number, length in enumerate(lens):
        alone = plan_decode([length], num_ctas=1, **options)
        cuts = [item[2:5] for item in items if item[1] == number]
        assert cuts == [item[2:5] for item in _items(alone, num_kv_heads)]


@given(lens=_LENS, num_ctas=st.integers(1, 9))
def test_the_size_of_a_plan_depends_on_rows_and_room_alone(lens, num_ctas):
    room = {"num_kv_heads": 3, "tile_len": _TILE, "num_ctas": num_ctas, "max_ctas": 9}
    plan = plan_decode(lens, **room)
    shapes = [(len(lens), 4), (18, 5), (18, 2), (3 * len(lens),)]
    assert [field.shape for field in plan] == shapes
    assert all(field.dtype == np.int32 for field in plan)
    shapes[2] = (3500, 2)
    plan = plan_decode(lens, **room, split_len=_TILE, max_parts=6999)
    assert [field.shape for field in plan] == shapes
    assert all(field.dtype == np.int32 for field in plan)


def test_a_plan_worked_by_hand():
    # Tiles: request 0 has 3 of each head, request 2 one; 8 in all for 4 workers.
    plan = plan_decode([33, 0, 16], num_kv_heads=2, tile_len=16, num_ctas=2)
    assert plan.live[:2, :3].tolist() == [[0, 0, 3], [2, 0, 1]]
    assert not plan.live[2].any()
    assert plan.workers.tolist() == [
        [0, 0, 2, 1, 0],
        [0, 2, 2, 2, 1],
        [1, 1, 2, 1, 3],
        [2, 0, 2, 2, 4],
    ]
    assert plan.groups.tolist() == [[0, 2], [2, 4], [0, 0], [0, 0]]
    assert plan.row_groups.tolist() == [0, 1, 4, 4, 4, 4]


def test_a_plan_with_splits_worked_by_hand():
    # Items of request 0 have 2 tiles and 1; workers begin with items, the last has more to do.
    plan = plan_decode(
        [33, 0, 16], num_kv_heads=2, tile_len=16, num_ctas=2, split_len=32, max_parts=5
    )
    assert plan.live.tolist() == [[0, 0, 3, 2], [2, 0, 1, 2], [0, 0, 0, 0]]
    assert plan.workers.tolist() == [
        [0, 0, 2, 1, 0],
        [0, 2, 1, 1, 1],
        [1, 0, 3, 2, 2],
        [2, 0, 2, 2, 4],
    ]
    assert plan.groups.tolist() == [[0, 2], [2, 4], [0, 0]]
    assert plan.row_groups.tolist() == [0, 1, 3, 3, 3, 3]


def test_long_contexts_of_many_heads_do_not_overflow():
    plan = plan_decode([1 << 30] * 64, num_kv_heads=8, tile_len=64, num_ctas=132)
    assert plan.workers[:, 2].tolist() == pytest.approx([64 * 8 * (1 << 24) / 264] * 264, abs=1)


_GOOD = {"context_lens": [1, 2], "num_kv_heads": 2, "tile_len": 16, "num_ctas": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_lens": [[1]]}, r"context_lens\(1, 1\) is not \[R\]"),
        ({"context_lens": [3, -1]}, "context_lens has -1; lengths are at least 0"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 is not at least 1"),
        ({"tile_len": 0}, "tile_len=0 is not at least 1"),
        ({"num_ctas": 0}, r"num_ctas=0 is outside \[1, max_ctas=0\]"),
        ({"max_ctas": 1}, r"num_ctas=2 is outside \[1, max_ctas=1\]"),
        ({"window": 0}, "window=0 is not at least 1; None sees all tokens"),
        ({"split_len": 0}, "split_len=0 is no positive multiple of tile_len=16"),
        ({"split_len": 40}, "split_len=40 is no positive multiple of tile_len=16"),
        ({"max_parts": 4}, "max_parts=4 is for a split_len"),
        ({"split_len": 16, "max_parts": -1}, "max_parts=-1 is not at least 0"),
        (
            {"context_lens": [40], "split_len": 16, "max_parts": 5},
            r"cut into 6 parts; there is room for max_parts=5: raise it \(see most_parts\)",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan_decode(**{**_GOOD, **change})
