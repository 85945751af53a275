"""Packing loses only the tail, and grain's order is seeded and resumable."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.train_embedded import rows


def test_rows_of_a_short_stream_by_hand() -> None:
    packed = rows.pack([[1, 2, 3], [4, 5], [6, 7, 8]], context_len=3)
    np.testing.assert_array_equal(packed, [[1, 2, 3, 4], [4, 5, 6, 7]])


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), context_len=st.integers(1, 12))
def test_every_token_but_the_first_is_predicted_once(lengths: list[int], context_len: int) -> None:
    stream = list(range(sum(lengths)))
    cuts = np.cumsum([0, *lengths])
    documents = [stream[a:b] for a, b in itertools.pairwise(cuts)]
    if len(stream) <= context_len:
        with pytest.raises(ValueError, match="do not fill one row"):
            rows.pack(documents, context_len=context_len)
        return
    targets = rows.pack(documents, context_len=context_len)[:, 1:].reshape(-1)
    np.testing.assert_array_equal(targets, stream[1 : len(targets) + 1])
    assert len(stream) - 1 - len(targets) < context_len


def test_one_pass_sees_every_row_once_and_the_next_in_another_order() -> None:
    source = rows.RowSource(np.arange(12, dtype=np.int32).reshape(6, 2))
    data = rows.batches(source, batch_rows=2, seed=3)
    first, second = ([x for _ in range(3) for x in next(data)[:, 0].tolist()] for _ in range(2))
    assert sorted(first) == sorted(second) == [0, 2, 4, 6, 8, 10]
    assert first != second


def test_a_restored_iterator_goes_on_where_it_was() -> None:
    source = rows.RowSource(np.arange(40, dtype=np.int32).reshape(20, 2))
    data = rows.batches(source, batch_rows=3, seed=1)
    for _ in range(8):
        next(data)
    state = data.get_state()
    wanted = [next(data) for _ in range(5)]
    again = rows.batches(source, batch_rows=3, seed=1)
    again.set_state(state)
    np.testing.assert_array_equal([next(again) for _ in range(5)], wanted)


def test_mixing_is_a_seeded_reordering() -> None:
    first, second = list(range(30)), list(range(100, 110))
    mixed = rows.mixed(first, second, seed=5)
    assert sorted(mixed) == first + second
    assert mixed == rows.mixed(first, second, seed=5)
    assert mixed != rows.mixed(first, second, seed=6)


def test_fewer_rows_than_a_batch_are_refused() -> None:
    source = rows.RowSource(np.zeros((2, 5), np.int32))
    with pytest.raises(ValueError, match="--train_batch_rows=3, but the text fills only 2 rows"):
        rows.batches(source, batch_rows=3, seed=0)
