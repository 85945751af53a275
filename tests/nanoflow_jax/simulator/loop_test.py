"""The simulated loop: what must be kept, and queues whose answers are known."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.scheduler import buckets, scheduler
from nanoflow_jax.simulator import loop
from nanoflow_jax.simulator.step_time import StepTime
from nanoflow_jax.workload import traces

_IDLE = dict.fromkeys(Resource, 0.0)


class _Second:
    """Every step takes a second."""

    def predict(self, work):
        return StepTime(device_s=1.0, busy_s=_IDLE)


def _served(*, requests=4, tokens=16, num_pages=64, page_size=4, **changes):
    return loop.Served(
        limits=scheduler.Limits(
            max_requests=requests, dense_batch=tokens, page_size=page_size, penalty_requests=0
        ),
        buckets=(buckets.Bucket(tokens=tokens, decode_rows=requests, prefill_rows=requests),),
        num_pages=num_pages,
        **changes,
    )


def _requests(rows):
    inputs, outputs, gaps = zip(*rows, strict=True)
    return traces.Requests(
        input_lens=np.array(inputs), output_lens=np.array(outputs), arrivals_s=np.cumsum(gaps)
    )


_ROWS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.0, 0.125, 3.0])),
    min_size=1,
    max_size=12,
)


@hypothesis.given(
    rows=_ROWS,
    num_pages=st.integers(13, 40),
    replicas=st.integers(1, 3),
    run_ahead=st.booleans(),
    max_tokens=st.sampled_from([None, 12]),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_every_request_gets_its_tokens_and_none_are_lost_or_made_up(
    rows, num_pages, replicas, run_ahead, max_tokens
):
    asked = _requests(rows)
    served = _served(
        num_pages=num_pages,
        num_replicas=replicas,
        run_ahead=run_ahead,
        max_tokens=max_tokens,
        host_s=0.25,
    )
    found = loop.run(asked, served, _Second())
    np.testing.assert_array_equal(found.generated, asked.output_lens)
    new = sum(step.new_tokens for step in found.steps)
    assert new == asked.input_lens.sum() + asked.output_lens.sum()
    # A token takes a step that begins after its request came; the next one takes another.
    assert (found.first_s >= asked.arrivals_s + 1.0).all()
    assert (found.end_s - found.first_s >= asked.output_lens - 1.0).all()
    for replica in range(replicas):
        own = [step for step in found.steps if step.replica == replica]
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(own))
    assert all(step.tokens <= 16 and step.pages_used <= num_pages for step in found.steps)


def test_a_host_that_plans_ahead_hides_its_time_and_one_that_waits_adds_it():
    asked = _requests([(8, 11, 0.0)])
    steps = 11  # the prompt gives the first token
    ahead = loop.run(asked, _served(host_s=0.25), _Second())
    waits = loop.run(asked, _served(host_s=0.25, run_ahead=False), _Second())
    assert ahead.end_s[0] == pytest.approx(0.25 + steps)
    assert waits.end_s[0] == pytest.approx(1.25 * steps)


def test_an_end_that_nobody_knew_of_costs_one_surplus_token_if_the_host_plans_ahead():
    asked = _requests([(8, 5, 0.0), (8, 3, 0.0)])
    ahead = loop.run(asked, _served(max_tokens=9), _Second())
    waits = loop.run(asked, _served(max_tokens=9, run_ahead=False), _Second())
    known = loop.run(asked, _served(), _Second())
    assert [sum(s.tokens for s in run.steps) for run in (ahead, waits, known)] == [24, 22, 22]
    assert (ahead.surplus_tokens, waits.surplus_tokens, known.surplus_tokens) == (2, 0, 0)


def test_requests_are_served_in_order_of_arrival_where_one_runs_at_a_time():
    rows = [(4, 3, 0.5), (9, 2, 0.0), (2, 5, 4.0), (7, 1, 40.0)]
    asked = _requests(rows)
    found = loop.run(asked, _served(requests=1, run_ahead=False), _Second())
    free, ends = 0.0, []
    for arrival, length in zip(asked.arrivals_s, asked.output_lens, strict=True):
        free = max(free, arrival) + length  # a prompt fits a step, and each step is a second
        ends.append(free)
    assert found.end_s == pytest.approx(ends)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_a_server_of_one_request_at_a_time_is_the_queue_of_poisson_and_constant_service(load):
    asked = traces.generate("8/1", 10_000, seed=4, rate=load)
    found = loop.run(asked, _served(requests=1, run_ahead=False), _Second())
    waited = (found.end_s - asked.arrivals_s - 1.0).mean()
    # M/D/1 (Pollaczek and Khinchine): load x service / (2 (1 - load)).
    assert waited == pytest.approx(load / (2 * (1 - load)), rel=0.08)


def test_replicas_share_requests_evenly():
    found = loop.run(_requests([(8, 4, 0.0)] * 12), _served(num_replicas=3), _Second())
    sums = [sum(s.new_tokens for s in found.steps if s.replica == i) for i in range(3)]
    assert sums == [48, 48, 48]
    one = loop.run(_requests([(8, 4, 0.0)] * 4), _served(), _Second())
    assert found.end_s.max() == pytest.approx(one.end_s.max())


def test_requests_longer_than_they_may_ask_for_are_refused():
    with pytest.raises(ValueError, match=r"--max_tokens=3 is less than the 4 tokens that a"):
        loop.run(_requests([(8, 4, 0.0)]), _served(max_tokens=3), _Second())


def test_requests_that_no_cache_could_hold_are_refused():
    with pytest.raises(ValueError, match="no memory for this request"):
        loop.run(_requests([(80, 4, 0.0)]), _served(num_pages=4), _Second())
