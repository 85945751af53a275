"""The prefill kernel's work list against what it must say of each token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.prefill_tiles import (
    KeySplit,
    build_prefill_tiles,
    max_parts,
    max_tiles,
    tile_len,
)

# Gap before a chunk, its tokens, tokens cached before it.
_CHUNKS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 70), st.integers(0, 1500)), max_size=6
)
_SPLITS = st.none() | st.builds(
    KeySplit,
    num_kv_heads=st.integers(1, 3),
    num_ctas=st.integers(1, 20),
    max_parts=st.integers(1, 10).map(lambda half: 2 * half),
    least_len=st.sampled_from([128, 512]),
    part_cost=st.sampled_from([0, 192]),
)


@given(_CHUNKS, st.integers(1, 16), st.integers(0, 5), st.sampled_from([None, 1, 500]), _SPLITS)
def test_each_token_of_a_chunk_is_in_one_tile_at_its_position(sizes, group, after, window, split):
    chunks, end = [], 0
    for row, (gap, length, position) in enumerate(sizes):
        chunks.append((end + gap, length, position, row))
        end += gap + length
    num_tokens = end + after
    room = 0 if split is None else split.max_parts
    capacity = max_tiles(num_tokens, max(1, len(chunks)), group=group) + room
    tiles = build_prefill_tiles(
        chunks,
        group=group,
        capacity=capacity,
        num_tokens=num_tokens,
        window=window,
        split=split,
    )
    slots = tile_len(group)
    wanted = {
        start + i: (position + i, row)
        for start, length, position, row in chunks
        for i in range(length)
    }
    found = {}
    for token, source in enumerate(tiles.sources.tolist()):
        tile, slot = divmod(source, slots)
        if tile < capacity:
            assert tile < tiles.num_tiles[0]
            assert slot < tiles.counts[tile]
            assert tiles.starts[tile] + slot == token
            assert tiles.cuts[tile, 0] == 0
            found[token] = (tiles.positions[tile] + slot, tiles.rows[tile])
    assert found == wanted
    used = tiles.num_tiles[0]
    assert (tiles.starts % 8 == 0).all()
    assert (tiles.counts[:used] > 0).all()
    assert not tiles.counts[used:].any()
    assert not tiles.cuts[used:].any()
    seen = (tiles.positions + tiles.counts)[:used]
    if window is not None:
        seen = np.minimum(seen, tiles.counts[:used] + window)
    assert (np.diff(seen / tiles.cuts[:used, 1]) <= 0).all()
    _check_parts(tiles, seen, split, capacity)


def _check_parts(tiles, seen, split, capacity):
    """Each cut tile has all its parts once, in a group of its own."""
    cut, room = {}, 2 * len(tiles.groups)
    for item, (part, parts, place) in enumerate(tiles.cuts[: len(seen)].tolist()):
        if parts > 1:
            assert seen[item] >= parts * split.least_len
            members = cut.setdefault((tiles.rows[item], tiles.starts[item]), {})
            assert part not in members
            members[part] = (item, place, parts)
    places = [place for members in cut.values() for _, place, _ in members.values()]
    assert sorted(places) == list(range(len(places)))
    assert room == (0 if split is None else split.max_parts)
    used = len(cut)
    for (first, end), item in zip(tiles.groups[:used], tiles.group_items[:used], strict=True):
        members = cut.pop((tiles.rows[item], tiles.starts[item]))
        assert members[0] == (item, first, end - first)
        found = {part: place for part, (_, place, _) in members.items()}
        assert found == {place - first: place for place in range(first, end)}
    assert not cut
    assert not tiles.groups[used:].any()
    assert (tiles.group_items[used:] == capacity).all()


def _tiles_of_70b(num_tokens, position, **more):
    """A chunk of Llama-3-70B on one of 8 GPUs."""
    room = max_parts(num_kv_heads=1, num_ctas=132)
    split = KeySplit(num_kv_heads=1, num_ctas=132, max_parts=room, **more)
    return build_prefill_tiles(
        [(0, num_tokens, position, 0)],
        group=8,
        capacity=max_tiles(num_tokens, 1, group=8) + room,
        num_tokens=num_tokens,
        split=split,
    )


def test_a_short_chunk_behind_a_long_prefix_keeps_all_ctas_busy():
    tiles = _tiles_of_70b(128, 32768)
    assert tiles.num_tiles.tolist() == [128]
    assert tiles.cuts[:128, 1].tolist() == [16] * 128
    split = KeySplit(num_kv_heads=1, num_ctas=132, max_parts=132)
    _check_parts(tiles, tiles.positions[:128] + 16, split, len(tiles.starts))


@pytest.mark.parametrize(
    ("num_tokens", "position", "more"),
    [(2048, 8192, {}), (128, 300, {}), (128, 2000, {"part_cost": 2000})],
    ids=["tiles_enough", "short_context", "dear_parts"],
)
def test_keys_are_not_cut_where_nothing_is_gained(num_tokens, position, more):
    tiles = _tiles_of_70b(num_tokens, position, **more)
    assert tiles.num_tiles.tolist() == [num_tokens // 16]
    assert (tiles.cuts[: num_tokens // 16] == [0, 1, 0]).all()


def test_keys_are_not_cut_where_two_ctas_in_turn_get_as_much():
    # To and fro: 2000 keys for one CTA, 1000 and 1000 for the other.
    chunks = [(0, 8, 1992, 0), (8, 8, 992, 1), (16, 8, 992, 2)]
    split = KeySplit(num_kv_heads=1, num_ctas=2, max_parts=2)
    tiles = build_prefill_tiles(chunks, group=16, capacity=5, num_tokens=24, split=split)
    assert tiles.num_tiles.tolist() == [3]


@pytest.mark.parametrize(("capacity", "room", "num_parts"), [(2, 2, 2), (4, 4, 2), (1, 2, 1)])
def test_parts_worked_by_hand(capacity, room, num_parts):
    split = KeySplit(num_kv_heads=1, num_ctas=2, max_parts=room)
    tiles = build_prefill_tiles(
        [(0, 8, 1016, 3)], group=16, capacity=capacity, num_tokens=8, split=split
    )
    assert tiles.num_tiles.tolist() == [num_parts]
    assert tiles.rows[:num_parts].tolist() == [3] * num_parts
    assert tiles.sources.tolist() == list(range(8))
    if num_parts == 2:
        assert tiles.cuts[:2].tolist() == [[0, 2, 0], [1, 2, 1]]
        assert tiles.groups.tolist() == [[0, 2], [0, 0]][: room // 2]
        assert tiles.group_items.tolist() == [0, capacity][: room // 2]
    else:
        assert tiles.cuts.tolist() == [[0, 1, 0]]
        assert tiles.groups.tolist() == [[0, 0]]
        assert tiles.group_items.tolist() == [1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads=0 is not at least 1"),
        ({"num_ctas": 0}, "num_ctas=0 is not at least 1"),
        ({"max_parts": 0}, "max_parts=0 is not at least 2"),
        ({"max_parts": 3}, "max_parts=3 is odd; a tile has two or more"),
        ({"least_len": 127}, "least_len=127 is not at least 128"),
        ({"part_cost": -1}, "part_cost=-1 is not at least 0"),
    ],
)
def test_splits_that_no_kernel_can_do_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        KeySplit(**{"num_kv_heads": 1, "num_ctas": 1, "max_parts": 2} | fields)


def test_two_chunks_worked_by_hand():
    # Tokens 3..8 are new at positions 0..5 of row 1, tokens 9..18 at 100..109 of row 0.
    tiles = build_prefill_tiles(
        [(3, 6, 0, 1), (9, 10, 100, 0)], group=16, capacity=5, num_tokens=20
    )
    assert tile_len(16) == 8
    assert tiles.num_tiles.tolist() == [4]
    assert tiles.starts.tolist() == [16, 8, 8, 0, 0]
    assert tiles.counts.tolist() == [3, 8, 1, 8, 0]
    assert tiles.positions.tolist() == [107, 99, 5, -3, 0]
    assert tiles.rows.tolist() == [0, 0, 1, 1, 0]
    none = 5 * 8
    assert tiles.sources[:9].tolist() == [none] * 3 + [27, 28, 29, 30, 31, 16]
    assert tiles.sources[9:].tolist() == [9, 10, 11, 12, 13, 14, 15, 0, 1, 2, none]


@pytest.mark.parametrize(
    ("group", "slots"), [(1, 128), (2, 64), (3, 40), (4, 32), (5, 24), (7, 16), (8, 16), (16, 8)]
)
def test_a_tile_has_room_for_eight_tokens_of_each_head_and_more(group, slots):
    assert tile_len(group) == slots


@pytest.mark.parametrize("group", [0, 17])
def test_groups_that_no_tile_has_room_for_are_refused(group):
    with pytest.raises(ValueError, match=rf"{group} query heads for each KV head are not in 1\.\."):
        tile_len(group)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([(0, 8, 0, 0), (8, 33, 0, 1)], "2 chunks need 3 tiles of 32 slots and there are 2"),
        ([(40, 8, 0, 0), (59, 2, 0, 1)], r"reach over tokens 40\.\.61 of a batch of 60"),
        ([(-1, 8, 0, 0)], r"\(first token, tokens, position, row\) \(-1, 8, 0, 0\); none of them"),
        (
            [(0, 0, 0, 0), (0, -8, 0, 0)],
            r"a chunk is .* \(0, -8, 0, 0\); none of them may be below",
        ),
        ([(0, 8, -1, 0)], r"a chunk is .* \(0, 8, -1, 0\)"),
        ([(0, 8, 0, -1)], r"a chunk is .* \(0, 8, 0, -1\)"),
        ([(16, 8, 0, 0), (26, 8, 0, 1)], "a chunk starts at token 26, which is no multiple of 8"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(chunks, message):
    with pytest.raises(ValueError, match=message):
        build_prefill_tiles(chunks, group=4, capacity=2, num_tokens=60, aligned=True)


def test_a_window_without_tokens_is_refused():
    with pytest.raises(ValueError, match="window=0 is not at least 1; None sees all tokens"):
        build_prefill_tiles([(0, 8, 0, 0)], group=4, capacity=2, num_tokens=60, window=0)
