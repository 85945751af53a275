"""Plans of decode attention: every tile once, equal loads, a fixed size."""

import collections

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pallas_kernels.work_list import WORKERS_PER_CTA, plan_decode

_TILE = 16
_LENS = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 3000)), max_size=12)


def _items(plan, num_kv_heads):
    """(worker, request, head, first tile, end of tiles, part or None) as the kernel walks them."""
    for worker, (segment, num_items, begin, end, size) in enumerate(plan.workers.tolist()):
        walked = 0
        for i in range(num_items):
            live, head = divmod(segment + i, num_kv_heads)
            request, first, last = plan.live[live].tolist()
            start = begin if i == 0 else first
            stop = end if i == num_items - 1 else last
            whole = (start, stop) == (first, last)
            walked += stop - start
            yield worker, request, head, start, stop, None if whole else 2 * worker + (i > 0)
        assert walked == size


@given(
    lens=_LENS,
    num_kv_heads=st.integers(1, 5),
    num_ctas=st.integers(1, 9),
    spare=st.integers(0, 3),
    window=st.one_of(st.none(), st.integers(1, 200)),
)
@example(lens=[0, 0], num_kv_heads=2, num_ctas=3, spare=0, window=None)
@example(lens=[3000], num_kv_heads=1, num_ctas=9, spare=0, window=None)
@example(lens=[], num_kv_heads=1, num_ctas=1, spare=1, window=None)
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
    read = collections.Counter()
    num_items = 0
    parts = collections.defaultdict(list)
    for _, request, head, start, stop, part in _items(plan, num_kv_heads):
        assert start < stop
        num_items += 1
        read.update((request, head, tile) for tile in range(start, stop))
        if part is not None:
            parts[request * num_kv_heads + head].append(part)

    seen = [range(max(0, n - window) if window else 0, n) for n in lens]
    wanted = {
        (request, head, token // _TILE)
        for request, tokens in enumerate(seen)
        for head in range(num_kv_heads)
        for token in tokens
    }
    assert read == collections.Counter(wanted)
    loads = plan.workers[: WORKERS_PER_CTA * num_ctas, 4]
    assert loads.max() - loads.min() <= 1
    assert not plan.workers[WORKERS_PER_CTA * num_ctas :].any()
    assert num_items <= len(lens) * num_kv_heads + WORKERS_PER_CTA * num_ctas

    num_rows, capacity = len(lens) * num_kv_heads, len(plan.workers)
    merged = collections.defaultdict(list)
    for part, group in enumerate(plan.part_groups.tolist()):
        if group < capacity:
            merged[int(plan.group_rows[group])].append(part)
    assert merged == parts
    assert (plan.group_rows[len(parts) :] == num_rows).all()


@given(lens=_LENS, num_ctas=st.integers(1, 9))
def test_the_size_of_a_plan_depends_on_rows_and_room_alone(lens, num_ctas):
    plan = plan_decode(lens, num_kv_heads=3, tile_len=_TILE, num_ctas=num_ctas, max_ctas=9)
    assert [field.shape for field in plan] == [(len(lens), 3), (18, 5), (36,), (18,)]
    assert all(field.dtype == np.int32 for field in plan)


def test_a_plan_worked_by_hand():
    # Tiles: request 0 has 3 of each head, request 2 one; 8 in all for 4 workers.
    plan = plan_decode([33, 0, 16], num_kv_heads=2, tile_len=16, num_ctas=2)
    assert plan.live.tolist() == [[0, 0, 3], [2, 0, 1], [0, 0, 0]]
    assert plan.workers.tolist() == [
        [0, 1, 0, 2, 2],
        [0, 2, 2, 1, 2],
        [1, 1, 1, 3, 2],
        [2, 2, 0, 1, 2],
    ]
    assert plan.part_groups.tolist() == [0, 4, 0, 1, 1, 4, 4, 4]
    assert plan.group_rows.tolist() == [0, 1, 6, 6]


def test_long_contexts_of_many_heads_do_not_overflow():
    plan = plan_decode([1 << 30] * 64, num_kv_heads=8, tile_len=64, num_ctas=132)
    assert plan.workers[:, 4].tolist() == pytest.approx([64 * 8 * (1 << 24) / 264] * 264, abs=1)


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
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan_decode(**{**_GOOD, **change})
