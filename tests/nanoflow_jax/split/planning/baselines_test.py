import dataclasses

import hypothesis
import pytest
import split_problems
from hypothesis import strategies as st
from split_problems import C, S

from nanoflow_jax.split.planning import baselines, problem, search
from nanoflow_jax.split.planning.problem import Limits, Placement, Problem, Unit

_ALL = {**baselines.GREEDY, "single segment": baselines.single_segment}


@pytest.mark.parametrize("mode", ["e2e", "two", "all"])
@pytest.mark.parametrize("name", _ALL)
@hypothesis.given(seed=st.integers(0, 2**32))
def test_no_baseline_beats_the_search_or_breaks_a_limit(name, mode, seed):
    asked = split_problems.random_problem(seed, mode=mode)
    found = _ALL[name](asked)
    if found is None:
        return
    assert all(at in unit.allowed for at, unit in zip(found.decode, asked.units, strict=True))
    outcome = split_problems.by_hand(asked, found)
    assert split_problems.is_within(asked, outcome)
    best = search.cheapest(asked, max_labels=None)
    assert problem.outcome(asked, best).rank <= outcome["rank"]


def _unit(index, *, client, charge):
    return Unit(
        start=index,
        stop=index + 1,
        allowed=frozenset({C, S}),
        prefill=(client, 1),
        decode=(0, 0),
        prefill_charge=charge,
        decode_charge=0,
        enter_prefill=(2, 2),
        enter_decode=(0, 0),
        migrate=(0, 0),
        memory=1,
    )


@pytest.fixture
def by_hand():
    """Client times 5, 3, 9 and charges 2, 4, 3; on the server each takes 1; crossings take 2."""
    units = tuple(_unit(i, client=c, charge=r) for i, (c, r) in enumerate([(5, 2), (3, 4), (9, 3)]))
    return Problem(
        units=units,
        num_steps=0,
        deliver=2,
        latency=0,
        limits=Limits(ttft=None, tpot=None, e2e=None, memory=3),
    )


def _sides(found):
    return None if found is None else "".join("CS"[at] for at in found.decode)


@pytest.mark.parametrize(
    ("ttft", "wanted"),
    [
        # CSS takes 5+1+1+2+2 = 11, SCS 1+3+1 and four crossings = 13, SSC 15, CCS 13, CSC 19.
        (6, {"forward": None, "prefix": None, "suffix": None, "density": None}),
        (7, {"forward": "SSS", "prefix": "SSS", "suffix": "SSS", "density": "SSS"}),
        (12, {"forward": "CSS", "prefix": "CSS", "suffix": "SSS", "density": "CSS"}),
        (13, {"forward": "CCS", "prefix": "CCS", "suffix": "SSS", "density": "CCS"}),
        (17, {"forward": "CCC", "prefix": "CCC", "suffix": "CCC", "density": "CCC"}),
    ],
)
def test_each_way_places_as_its_name_says(by_hand, ttft, wanted):
    limits = dataclasses.replace(by_hand.limits, ttft=ttft)
    asked = dataclasses.replace(by_hand, limits=limits)
    assert {name: _sides(way(asked)) for name, way in baselines.GREEDY.items()} == wanted


def test_a_single_segment_may_begin_and_end_on_the_client(by_hand):
    # CSC: 5 + 1 + 9 and two crossings; charges leave the dearest unit where time is short.
    limits = dataclasses.replace(by_hand.limits, memory=2)
    found = baselines.single_segment(dataclasses.replace(by_hand, limits=limits))
    assert _sides(found) == "SCC"
    units = tuple(
        dataclasses.replace(unit, prefill_charge=charge)
        for unit, charge in zip(by_hand.units, (4, 2, 4), strict=True)
    )
    found = baselines.single_segment(dataclasses.replace(by_hand, limits=limits, units=units))
    assert _sides(found) == "CSC"


def test_all_on_one_side_leaves_what_may_not_run_there(by_hand):
    pinned = dataclasses.replace(by_hand.units[1], allowed=frozenset({C}))
    asked = dataclasses.replace(by_hand, units=(by_hand.units[0], pinned, by_hand.units[2]))
    assert baselines.all_on(asked, S) == Placement((S, C, S), (S, C, S))
    assert _sides(baselines.all_on(asked, C)) == "CCC"
