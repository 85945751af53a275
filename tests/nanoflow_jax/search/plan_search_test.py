import pytest

from nanoflow_jax.nanobatch import legality, operations
from nanoflow_jax.search import candidates, interference, plan_search
from nanoflow_jax.search.profiles import Measured

_SHAPE = operations.LayerShape()
_WHOLE_S = {
    "norm_kqv": 2e-4,
    "decode_attention": 9e-4,
    "o": 2e-4,
    "up_gate": 8e-4,
    "down": 4e-4,
}


def _measured(fixed):
    return Measured(whole_s=_WHOLE_S, tokens=512, fixed=fixed, source="made up")


def _search(profile, seconds):
    looked_at = []
    outcome = plan_search.search(
        [
            entry
            for entry in candidates.splits(_SHAPE, num_tokens=512, granule=128)
            if entry[0] == "256 + 256, attention in 2"
        ],
        profile,
        interference.ROOFLINE,
        shape=_SHAPE,
        num_tokens=512,
        num_sms=100,
        seconds=seconds,
        report=looked_at.append,
    )
    last = {candidate.name: candidate for candidate in looked_at}
    assert {candidate.name: candidate for candidate in outcome.candidates} == last
    return outcome


def test_overlap_beats_the_plan_that_splits_nothing_where_splitting_is_cheap():
    outcome = _search(_measured(0.0), 600)
    legality.check(outcome.plan)
    assert outcome.sequential_s == pytest.approx(25e-4)
    # Products take all of the device, and attention a third of it while it runs.
    assert outcome.bound_s >= (16e-4 + 9e-4 / 3) * (1 - 1e-9)
    assert outcome.bound_s <= outcome.period_s < 0.9 * outcome.sequential_s
    assert outcome.gap == pytest.approx(outcome.period_s / outcome.bound_s - 1)
    assert plan_search.split_s(outcome.plan, _measured(0.0)) == pytest.approx(25e-4)


def test_nothing_is_split_where_each_part_takes_as_long_as_the_whole():
    outcome = _search(_measured(1.0), 600)
    assert outcome.plan.name == "one"
    assert outcome.period_s == outcome.sequential_s == outcome.bound_s
    assert all(candidate.plan is None for candidate in outcome.candidates)  # by their bounds


def test_without_time_the_plan_that_splits_nothing_is_left_and_its_gap_is_told():
    outcome = _search(_measured(0.0), 0)
    assert outcome.plan.name == "one"
    assert outcome.gap == pytest.approx(25 / 19 - 1)


def test_a_plan_that_splits_nothing_is_predicted_to_take_the_sum_of_its_operations():
    plan = _search(_measured(0.0), 0).plan
    durations = plan_search.durations_s(plan, _measured(0.0), interference.ROOFLINE)
    assert sum(durations.values()) == pytest.approx(25e-4)
