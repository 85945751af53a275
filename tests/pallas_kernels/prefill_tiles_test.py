"""The prefill kernel's work list against what it must say of each token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.prefill_tiles import build_prefill_tiles, max_tiles, tile_len

# Gap before a chunk, its tokens, tokens cached before it.
_CHUNKS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 70), st.integers(0, 200)), max_size=6
)


@given(_CHUNKS, st.integers(1, 16), st.integers(0, 5), st.sampled_from([None, 1, 50]))
def test_each_token_of_a_chunk_is_in_one_tile_at_its_position(sizes, group, after, window):
    chunks, end = [], 0
    for row, (gap, length, position) in enumerate(sizes):
        chunks.append((end + gap, length, position, row))
        end += gap + length
    num_tokens = end + after
    capacity = max_tiles(num_tokens, max(1, len(chunks)), group=group)
    tiles = build_prefill_tiles(
        chunks, group=group, capacity=capacity, num_tokens=num_tokens, window=window
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
            found[token] = (tiles.positions[tile] + slot, tiles.rows[tile])
    assert found == wanted
    used = tiles.num_tiles[0]
    assert (tiles.starts % 8 == 0).all()
    assert (tiles.counts[:used] > 0).all()
    assert (tiles.counts[used:] == 0).all()
    seen = (tiles.positions + tiles.counts)[:used]
    if window is not None:
        seen = np.minimum(seen, tiles.counts[:used] + window)
    assert (np.diff(seen) <= 0).all()


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
        ([(-1, 8, 0, 0)], r"reach over tokens -1\.\.7 of a batch of 60"),
        ([(16, 8, 0, 0), (26, 8, 0, 1)], "a chunk starts at token 26, which is no multiple of 8"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(chunks, message):
    with pytest.raises(ValueError, match=message):
        build_prefill_tiles(chunks, group=4, capacity=2, num_tokens=60, aligned=True)
