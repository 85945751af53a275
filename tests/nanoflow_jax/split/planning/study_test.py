import dataclasses

import pytest
import split_profiles

from nanoflow_jax.split.planning import problem, study
from nanoflow_jax.split.planning.asked import Policy, Request, Side
from nanoflow_jax.split.planning.baselines import all_on
from nanoflow_jax.split.planning.costs import Accounting
from nanoflow_jax.split.planning.planner import VerdictKind

_MODEL = split_profiles.model()
_H100, _GPU = split_profiles.device("h100"), split_profiles.device("gpu")
_LAPTOP, _FIBRE = split_profiles.device("laptop"), split_profiles.link("fibre")


def _gains(**changes):
    setting = study.Setting(server=_H100, clients=[_LAPTOP, _GPU], links=[_FIBRE], slack=(1.1, 3.0))
    setting = dataclasses.replace(setting, **changes)
    return study.gains(_MODEL, setting, Accounting.MARGINAL, num_requests=12, seed=1)


def test_the_load_is_never_above_that_of_a_greedy_way_or_of_the_server_alone():
    found = _gains()
    assert 0 < found.load < 1
    assert found.throughput == pytest.approx(1 / found.load)
    assert all(below >= 0 for below in found.below.values())
    assert found.below["best"] == min(found.below.values())
    assert sum(found.verdicts.values()) == pytest.approx(1)
    assert found.verdicts[VerdictKind.REJECT] == 0
    assert _gains() == found


def test_deadlines_that_nothing_but_the_server_meets_save_nothing():
    found = _gains(slack=(1.001, 1.001), clients=[_LAPTOP])
    assert (found.load, found.throughput, found.below["best"]) == (1.0, 1.0, 0.0)
    assert found.verdicts[VerdictKind.ALL_SERVER] == 1


@pytest.mark.parametrize("has_two", [False, True])
def test_deadlines_are_times_what_the_server_alone_takes(has_two):
    ends = (_MODEL, _LAPTOP, _H100, _FIBRE)
    request = Request(prompt_len=256, output_len=64)
    asked = problem.build(*ends, request, Policy(guard=1.0))
    alone = problem.outcome(asked, all_on(asked, Side.SERVER))
    found = study.with_deadlines(ends, request, 2.0, has_two=has_two)
    if has_two:
        assert found.ttft_s == pytest.approx(2 * alone.ttft / 1e12 + 0.1)
        assert (found.tpot_s, found.e2e_s) == (pytest.approx(2 * alone.tpot / 1e12 + 0.02), None)
    else:
        assert (found.e2e_s, found.ttft_s) == (pytest.approx(2 * alone.e2e / 1e12), None)


def test_the_least_speed_saves_enough_and_the_one_before_does_not():
    def saved(speed):
        ends = (_MODEL, _LAPTOP.scaled(speed), _H100, _FIBRE)
        asked = study.policy(Accounting.AVERAGE, _H100, _MODEL)
        charges = [0, 0]
        for request in study.REGION_REQUESTS:
            timed = study.with_deadlines(ends, request, 2.0, has_two=False)
            built = problem.build(*ends, timed, asked)
            placed = study.planned(built, asked)
            for i, one in enumerate((placed, all_on(built, Side.SERVER))):
                charges[i] += problem.outcome(built, one).charge
        return 1 - charges[0] / charges[1]

    found = study.least_speed(
        _MODEL, _LAPTOP, _H100, _FIBRE, Accounting.AVERAGE, slack=2.0, has_two=False, saved=1 / 3
    )
    before = study.SPEEDS[study.SPEEDS.index(found) - 1]
    assert saved(before) < 1 / 3 <= saved(found)


def test_where_no_speed_saves_enough_there_is_none():
    slow = split_profiles.link("mobile").with_rtt(3.0)
    tiny = dataclasses.replace(_LAPTOP, memory_bytes=1e6)  # no room for any layer
    found = study.least_speed(
        _MODEL, tiny, _H100, slow, Accounting.AVERAGE, slack=1.1, has_two=True, saved=1 / 3
    )
    assert found is None
