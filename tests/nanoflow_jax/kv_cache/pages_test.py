"""Page allocator: nothing is handed out twice, and a full cache answers None."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.kv_cache.pages import PageAllocator


def test_a_case_worked_by_hand():
    allocator = PageAllocator(4)
    assert allocator.try_take(3) == [0, 1, 2]
    allocator.give_back([1, 0])
    assert allocator.num_free == 3
    assert allocator.try_take(2) == [0, 1]
    assert allocator.try_take(1) == [3]
    allocator.check()


def test_no_room_answers_none_and_takes_nothing():
    allocator = PageAllocator(3)
    assert allocator.try_take(2) == [0, 1]
    assert allocator.try_take(2) is None
    assert allocator.num_free == 1
    assert allocator.try_take(0) == []
    allocator.check()


def test_giving_a_page_back_twice_is_an_assertion():
    allocator = PageAllocator(3)
    allocator.try_take(2)
    allocator.give_back([1])
    with pytest.raises(AssertionError, match="page 1 was given back twice"):
        allocator.give_back([1])


@pytest.mark.parametrize("page", [-1, 3])
def test_a_page_of_no_cache_is_an_assertion(page):
    with pytest.raises(AssertionError, match="not in this cache"):
        PageAllocator(3).give_back([page])


def test_a_cache_without_pages_is_refused():
    with pytest.raises(ValueError, match="num_pages=0, wanted at least 1"):
        PageAllocator(0)


@pytest.mark.parametrize(
    ("heap", "message"),
    [([0, 0, 2], "twice"), ([0, 2], "disagree"), ([2, 1, 0], "out of order")],
)
def test_check_finds_a_broken_invariant(heap, message):
    allocator = PageAllocator(3)
    allocator._heap = heap
    with pytest.raises(AssertionError, match=message):
        allocator.check()


@given(st.integers(1, 20), st.data())
def test_any_takes_and_gives_keep_each_page_with_one_owner(num_pages, data):
    allocator = PageAllocator(num_pages)
    held: list[int] = []
    for _ in range(data.draw(st.integers(0, 30))):
        count = data.draw(st.integers(0, num_pages + 1))
        if data.draw(st.booleans()):
            free = sorted(set(range(num_pages)) - set(held))
            taken = allocator.try_take(count)
            assert taken == (free[:count] if count <= len(free) else None)
            held += taken or []
        else:
            held = data.draw(st.permutations(held))
            allocator.give_back(held[:count])
            held = held[count:]
        allocator.check()
        assert allocator.num_free == num_pages - len(held)
