import itertools
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from nanoflow_jax.split.planning import labels
from nanoflow_jax.split.planning.labels import Chain, Tolls

_NUMBERS = st.tuples(*[st.integers(0, 9)] * 4)


@st.composite
def _chains(draw, has_memory):
    """Three stages of two states; every way adds up some of 12 vectors."""
    stages = []
    before = [0]
    for _ in range(3):
        stage = {state: {one: draw(_NUMBERS) for one in before} for state in (0, 1)}
        if not has_memory:
            stage = {s: {b: (*v[:2], 0, v[3]) for b, v in to.items()} for s, to in stage.items()}
        stages.append(stage)
        before = [0, 1]
    limits = tuple(draw(st.sampled_from((10, 18, math.inf))) for _ in range(3))
    total = draw(st.sampled_from((40, math.inf)))
    return Chain(start=0, begin=(0, 0, 0, 0), stages=stages, limits=limits, weight=2, total=total)


def _everything(chain):
    """All ways, by walking each."""
    for states in itertools.product((0, 1), repeat=3):
        arcs = zip(chain.stages, (0, *states), states, strict=False)
        vectors = [stage[state][before] for stage, before, state in arcs]
        yield tuple(map(sum, zip(*vectors, strict=True))), states


def _is_within(chain, vector):
    kept = all(value <= most for value, most in zip(vector, chain.limits, strict=False))
    return kept and vector[0] + chain.weight * vector[1] <= chain.total


def _covers(one, other):
    return all(a <= b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("has_memory", [False, True])
@hypothesis.settings(max_examples=100)
@hypothesis.given(data=st.data())
def test_ways_are_those_that_nothing_within_the_limits_dominates(has_memory, data):
    chain = data.draw(_chains(has_memory))
    within = {v for v, _ in _everything(chain) if _is_within(chain, v)}
    wanted = {v for v in within if not any(_covers(one, v) for one in within - {v})}
    found = labels.ways(chain, max_labels=None)
    assert found.is_complete
    assert sorted(way.vector for way in found.ways) == sorted(wanted)
    walked = {states: vector for vector, states in _everything(chain)}
    assert all(walked[way.states] == way.vector for way in found.ways)


@hypothesis.given(chain=_chains(has_memory=True), weights=_NUMBERS)
def test_the_least_way_is_the_least_of_all_whatever_the_limits(chain, weights):
    def weighted(vector):
        return sum(a * b for a, b in zip(vector, weights, strict=True))

    found = labels.least(chain, weights)
    assert weighted(found.vector) == min(weighted(vector) for vector, _ in _everything(chain))


@hypothesis.given(chain=_chains(has_memory=True), rank=st.integers(0, 20), tolls=_NUMBERS)
def test_ways_of_at_most_a_rank_are_found_whatever_the_tolls(chain, rank, tolls):
    limits = (*chain.limits[:2], chain.total)
    first, second, total = (
        0 if most == math.inf else toll for toll, most in zip(tolls, limits, strict=False)
    )
    paid = Tolls(first=first, second=second, total=total)
    found = labels.ways(chain, max_labels=None, rank_limit=rank, tolls=paid)
    ranks = [v[3] for v, _ in _everything(chain) if _is_within(chain, v) and v[3] <= rank]
    kept = [way.vector[3] for way in found.ways if way.vector[3] <= rank]
    assert min(kept, default=None) == min(ranks, default=None)


def test_thinning_keeps_the_cheapest_of_those_alike_and_says_that_it_did():
    first = {i: {0: (i, 100 - i, 0, i % 7)} for i in range(100)}
    last = {0: dict.fromkeys(range(100), (0, 0, 0, 0))}
    chain = Chain(
        start=0,
        begin=(0, 0, 0, 0),
        stages=[first, last],
        limits=(math.inf, math.inf, math.inf),
        weight=0,
        total=math.inf,
    )
    whole = labels.ways(chain, max_labels=None)
    thin = labels.ways(chain, max_labels=16)
    assert (whole.is_complete, thin.is_complete) == (True, False)
    assert len(thin.ways) <= 16 < len(whole.ways)
    assert min(way.vector[3] for way in thin.ways) == 0


def test_a_chain_without_a_way_has_none():
    chain = Chain(
        start=0,
        begin=(0, 0, 0, 0),
        stages=[{}, {0: {0: (0, 0, 0, 0)}}],
        limits=(1, 1, 1),
        weight=0,
        total=1,
    )
    assert labels.least(chain, (1, 0, 0, 0)) is None
    assert labels.ways(chain, max_labels=None).ways == ()
