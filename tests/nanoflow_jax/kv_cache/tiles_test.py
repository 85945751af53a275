"""Prefill tiles cover every token of every chunk once, in as few tiles as promised."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.kv_cache.tiles import Chunk, build_prefill_tiles, max_tiles


def test_a_case_worked_by_hand():
    chunks = [
        Chunk(start=2, length=5, position=10, row=1),
        Chunk(start=7, length=1, position=0, row=3),
    ]
    tiles = build_prefill_tiles(chunks, tile_len=4, capacity=5)
    assert tiles.starts.tolist() == [2, 6, 7, 0, 0]
    assert tiles.counts.tolist() == [4, 1, 1, 0, 0]
    assert tiles.positions.tolist() == [10, 14, 0, 0, 0]
    assert tiles.rows.tolist() == [1, 1, 3, 0, 0]
    assert {field.dtype for field in tiles} == {np.dtype(np.int32)}


def test_no_chunk_leaves_every_tile_unused():
    tiles = build_prefill_tiles([], tile_len=4, capacity=2)
    assert tiles.counts.tolist() == [0, 0]


def test_too_many_tiles_are_refused():
    chunks = [Chunk(start=0, length=9, position=0, row=0)]
    with pytest.raises(ValueError, match="1 chunks need 3 tiles of 4 tokens and there are 2"):
        build_prefill_tiles(chunks, tile_len=4, capacity=2)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=8), st.integers(1, 9))
def test_tiles_cover_each_token_once_and_fit_the_promised_capacity(sizes, tile_len):
    chunks, wanted, start = [], [], 3
    for row, (count, position) in enumerate(sizes):
        chunks.append(Chunk(start=start, length=count, position=position, row=row))
        wanted += [(start + i, position + i, row) for i in range(count)]
        start += count
    num_tokens = sum(count for count, _ in sizes)
    capacity = max_tiles(num_tokens, len(sizes), tile_len=tile_len)
    tiles = build_prefill_tiles(chunks, tile_len=tile_len, capacity=capacity)
    assert tiles.counts.max(initial=0) <= tile_len
    assert np.all(np.diff((tiles.counts > 0).astype(int)) <= 0), "used tiles come first"
    covered = [
        (first + i, position + i, row)
        for first, count, position, row in zip(*map(np.ndarray.tolist, tiles), strict=True)
        for i in range(count)
    ]
    assert sorted(covered) == wanted


def test_max_tiles_is_reached():
    assert max_tiles(10, 2, tile_len=4) == 4
    chunks = [
        Chunk(start=0, length=5, position=0, row=0),
        Chunk(start=5, length=5, position=0, row=1),
    ]
    assert np.count_nonzero(build_prefill_tiles(chunks, tile_len=4, capacity=4).counts) == 4
