import dataclasses
import math
from unittest import mock

import hypothesis
import pytest
import split_problems
from hypothesis import strategies as st

from nanoflow_jax.split.planning import labels, search
from nanoflow_jax.split.planning import problem as problems

_MODES = ("e2e", "two", "all", "migrate")
_SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("mode", _MODES)
@hypothesis.settings(max_examples=150)
@hypothesis.given(seed=_SEEDS)
def test_what_is_found_is_what_trying_everything_finds(mode, seed):
    problem = split_problems.random_problem(seed, mode=mode)
    found = search.cheapest(problem, max_labels=None)
    wanted = split_problems.best_by_trying(problem)
    if wanted is None:
        assert found is None
        return
    outcome = split_problems.by_hand(problem, found)
    assert split_problems.is_within(problem, outcome)
    assert outcome["rank"] == wanted


@pytest.mark.parametrize("mode", _MODES)
@hypothesis.given(seed=_SEEDS)
def test_an_outcome_is_what_its_definition_gives(mode, seed):
    problem = split_problems.random_problem(seed, mode=mode)
    for one in split_problems.all_placements(problem):
        found, wanted = problems.outcome(problem, one), split_problems.by_hand(problem, one)
        assert (found.ttft, found.tpot, found.e2e) == tuple(
            wanted[name] for name in ("ttft", "tpot", "e2e")
        )
        assert (found.rank, found.memory) == (wanted["rank"], wanted["memory"])
        assert found.meets(problem.limits) == split_problems.is_within(problem, wanted)


@pytest.mark.parametrize("mode", _MODES)
@hypothesis.given(seed=_SEEDS)
def test_units_run_where_they_may(mode, seed):
    problem = split_problems.random_problem(seed, mode=mode)
    found = search.cheapest(problem, max_labels=None)
    for placed in () if found is None else (found.prefill, found.decode):
        assert all(at in unit.allowed for at, unit in zip(placed, problem.units, strict=True))


@pytest.mark.parametrize("mode", _MODES)
@hypothesis.given(seed=_SEEDS, more=st.floats(1, 3))
def test_more_time_or_memory_never_costs_more(mode, seed, more):
    problem = split_problems.random_problem(seed, mode=mode)
    limits = {
        name: None if value is None else math.ceil(value * more)
        for name, value in dataclasses.asdict(problem.limits).items()
    }
    looser = dataclasses.replace(problem, limits=problems.Limits(**limits))
    before, after = (search.cheapest(one, max_labels=None) for one in (problem, looser))
    if before is not None:
        assert after is not None
        assert problems.outcome(looser, after).rank <= problems.outcome(problem, before).rank


@pytest.mark.parametrize("mode", _MODES)
@hypothesis.given(seed=_SEEDS)
def test_what_tolls_leave_out_is_nothing_better(mode, seed):
    units = 6 if mode == "migrate" else 10
    asked = split_problems.random_problem(seed, mode=mode, num_units=units, unit_of_time=10**6)
    with mock.patch.object(search, "_FEW", 4):  # so that the first search seldom is complete
        found = search.cheapest(asked, max_labels=None)
    everything = [
        problems.outcome(asked, one).rank for one in search.undominated(asked, max_labels=None)
    ]
    assert (found and problems.outcome(asked, found).rank) == min(everything, default=None)


def test_a_first_search_that_is_not_complete_is_followed_by_one_with_tolls():
    asked = split_problems.random_problem(11, mode="two", num_units=20, unit_of_time=10**6)
    with mock.patch.object(labels, "tolls", wraps=labels.tolls) as tolls:
        found = search.cheapest(asked, max_labels=None)
    assert tolls.called
    (chain, *_), rank = tolls.call_args.args, tolls.call_args.kwargs["rank"]
    paid = labels.tolls(chain, rank=rank)
    assert max(paid.first, paid.second, paid.total) > 0
    # The least of rank and tolls is a bound: nothing within the limits is under it.
    way = labels.least(chain, paid.weights(chain))
    weights = paid.weights(chain)
    least = sum(v * w for v, w in zip(way.vector, weights, strict=True)) - paid.of_limits(chain)
    charge, crossings, units = problems.outcome(asked, found).rank
    assert least <= charge << 24 | crossings << 12 | units


@pytest.mark.parametrize("mode", _MODES)
@hypothesis.given(seed=_SEEDS)
def test_thinned_labels_keep_the_limits(mode, seed):
    problem = split_problems.random_problem(seed, mode=mode, num_units=20)
    found = search.cheapest(problem, max_labels=16)
    if found is not None:
        assert split_problems.is_within(problem, split_problems.by_hand(problem, found))


@pytest.mark.parametrize("mode", ["e2e", "two"])
@hypothesis.given(seed=_SEEDS)
def test_of_equal_charge_fewest_crossings_are_taken_and_always_the_same(mode, seed):
    problem = split_problems.random_problem(seed, mode=mode, even=True)
    found = search.cheapest(problem, max_labels=None)
    again = search.cheapest(problem, max_labels=None)
    assert found == again
    wanted = split_problems.best_by_trying(problem)
    assert (found and problems.outcome(problem, found).rank) == wanted


@hypothesis.given(seed=_SEEDS)
def test_known_placements_change_nothing_of_the_answer(seed):
    problem = split_problems.random_problem(seed, mode="two")
    known = list(split_problems.all_placements(problem))[:5]
    free = search.cheapest(problem, max_labels=None)
    found = search.cheapest(problem, max_labels=None, known=known)
    assert (found is None) == (free is None)
    if found is not None:
        assert problems.outcome(problem, found).rank == problems.outcome(problem, free).rank


@pytest.mark.parametrize("mode", ["two", "migrate"])
@hypothesis.given(seed=_SEEDS)
def test_the_quickest_is_the_quickest_of_all(mode, seed):
    problem = split_problems.random_problem(seed, mode=mode)
    for first, second in ((1, 0), (0, 1), (1, problem.num_steps)):
        found = search.quickest(problem, first=first, second=second)
        outcome = split_problems.by_hand(problem, found)
        everything = (
            split_problems.by_hand(problem, one) for one in split_problems.all_placements(problem)
        )
        least = min(first * one["ttft"] + second * one["tpot"] for one in everything)
        assert first * outcome["ttft"] + second * outcome["tpot"] == least


@pytest.mark.parametrize("mode", ["two", "migrate"])
@hypothesis.given(seed=_SEEDS)
def test_undominated_placements_have_the_best_for_each_pair_of_deadlines(mode, seed):
    problem = split_problems.random_problem(seed, mode=mode)
    found = [problems.outcome(problem, one) for one in search.undominated(problem, max_labels=None)]
    for one in split_problems.all_placements(problem):
        outcome = split_problems.by_hand(problem, one)
        if split_problems.is_within(problem, outcome):
            assert any(
                f.ttft <= outcome["ttft"]
                and f.tpot <= outcome["tpot"]
                and f.rank <= outcome["rank"]
                for f in found
            )
