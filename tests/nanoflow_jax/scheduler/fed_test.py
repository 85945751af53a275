"""Requests whose tokens come from outside: when they run, what they hold, who goes before them."""

import hypothesis
import pytest
from hypothesis import strategies as st

from nanoflow_jax.kv_cache import pages
from nanoflow_jax.scheduler import buckets, scheduler


def _scheduler(*, num_pages=8, max_requests=4):
    limits = scheduler.Limits(
        max_requests=max_requests, dense_batch=6, page_size=4, penalty_requests=1
    )
    bucket = buckets.Bucket(tokens=6, decode_rows=max_requests, prefill_rows=3)
    return scheduler.Scheduler(limits, [bucket], pages.PageAllocator(num_pages))


def _add(made, name, *, limit, prompt_len=3, is_fed=True, draws=True, priority=0):
    made.add(
        name,
        prompt_len=prompt_len,
        limit=limit,
        priority=priority,
        uses_penalties=False,
        ends_at_limit=True,
        is_fed=is_fed,
        draws=draws,
    )


def _run(made):
    """One step, committed: (id, start, length, samples) of its rows."""
    plan = made.plan()
    made.check()
    if plan is None:
        return []
    made.commit(plan)
    return [(row.request_id, row.start, row.length, row.samples) for row in plan.rows]


def test_a_fed_request_runs_what_came_and_samples_from_the_end_of_its_prompt_on():
    made = _scheduler()
    _add(made, "a", limit=12, prompt_len=9)
    assert (_run(made), made.has_work, made.num_pages_used) == ([], False, 3)
    made.feed("a", 4)
    assert made.has_work
    assert _run(made) == [("a", 0, 4, False)]
    made.feed("a", 5)
    assert _run(made) == [("a", 4, 5, True)]
    assert (_run(made), made.has_work) == ([], False)
    made.feed("a", 1)
    assert _run(made) == [("a", 9, 1, True)]
    made.finish("a")
    assert made.num_pages_used == 0


def test_one_that_does_not_draw_never_samples():
    made = _scheduler()
    _add(made, "a", limit=4, prompt_len=1, draws=False)
    made.feed("a", 3)
    assert _run(made) == [("a", 0, 3, False)]
    made.feed("a", 1)
    assert _run(made) == [("a", 3, 1, False)]


def test_rows_that_were_forgotten_run_again_in_the_same_pages():
    made = _scheduler()
    _add(made, "a", limit=8, draws=False)
    made.feed("a", 6)
    _run(made)
    made.truncate("a", 5)
    made.feed("a", 2)
    plan = made.plan()
    assert [(row.start, row.length, row.pages) for row in plan.rows] == [(5, 2, (0, 1))]


def test_all_pages_are_reserved_before_it_runs_and_nobody_takes_them():
    made = _scheduler()
    _add(made, "fed", limit=20, priority=5)
    _add(made, "first", limit=13, prompt_len=2, is_fed=False)
    # Four pages in the end beside the five: the later one waits, with room for it today.
    assert _run(made) == [("first", 0, 2, True)]
    assert (made.num_running, made.num_waiting, made.num_pages_used) == (1, 1, 1)


@pytest.fixture
def crowded():
    """An idle fed request with five of eight pages."""
    made = _scheduler()
    _add(made, "fed", limit=20)
    _run(made)
    return made


def test_an_ordinary_request_that_would_need_its_pages_waits(crowded):
    _add(crowded, "whole", limit=13 + 1, prompt_len=2, is_fed=False)
    assert _run(crowded) == []
    crowded.finish("fed")
    assert _run(crowded) == [("whole", 0, 2, True)]


def test_one_for_which_there_are_too_few_pages_waits_for_others_to_end(crowded):
    _add(crowded, "late", limit=16)
    crowded.feed("late", 2)
    assert (_run(crowded), crowded.has_work) == ([], True)
    crowded.finish("fed")
    assert _run(crowded) == [("late", 0, 2, False)]


def test_one_that_could_never_run_is_refused():
    message = "^no memory for this request: it may grow to 33 tokens and the cache holds 32"
    with pytest.raises(ValueError, match=message):
        _add(_scheduler(), "a", limit=33)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_row_runs_once_and_in_order_whoever_else_is_there(data):
    """Ordinary requests are preempted among fed ones, which always keep what they have."""
    made = _scheduler(num_pages=10, max_requests=4)
    fed = {f"fed {i}": data.draw(st.integers(1, 12)) for i in range(3)}
    whole = {f"whole {i}": data.draw(st.integers(2, 16)) for i in range(3)}
    for name, limit in fed.items():
        _add(made, name, limit=limit, prompt_len=1, draws=False)
    for name, limit in whole.items():
        _add(made, name, limit=limit, prompt_len=1, is_fed=False)
    left, ran, held = dict(fed), dict.fromkeys(fed, 0), {}
    for _ in range(100):
        for name in [name for name, count in left.items() if count]:
            count = data.draw(st.integers(1, left[name]))
            made.feed(name, count)
            left[name] -= count
        plan = made.plan()
        made.check()
        if plan is None:
            if not made.has_work and not any(left.values()):
                break
            continue
        for row in plan.rows:
            if row.request_id in fed:
                assert row.start == ran[row.request_id]
                ran[row.request_id] += row.length
                assert held.setdefault(row.request_id, row.pages) == row.pages
        made.commit(plan)
        for name, count in list(ran.items()):
            if count == fed[name] and name in held:
                made.finish(name)
                del held[name]
    assert ran == fed
    assert made.num_pages_used == 0
