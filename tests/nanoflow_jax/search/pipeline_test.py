import random
import types

import pytest

from nanoflow_jax.cost import timeline
from nanoflow_jax.nanobatch import legality, operations
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.search import candidates, interference, periodic, pipeline, plan_search

_SHAPE = operations.LayerShape()


class _Random:
    """Made-up times of operations; those that XLA makes are short."""

    source = "made up"

    def __init__(self, seed):
        chance = random.Random(seed)
        self._whole_s = {
            op.name: 0.01 if op.name in ("rope", "append", "norm") else chance.choice([1, 2, 5])
            for op in operations.layer_graph(_SHAPE).operations
        }

    def seconds(self, operation, tokens):
        return self._whole_s[operation] * (0.1 + 0.9 * tokens / 512)


def _split(seed):
    ways = [
        split
        for name, split in candidates.splits(_SHAPE, num_tokens=512, granule=128)
        if "in 2" in name
    ]
    return ways[seed % len(ways)]


def _find(seed):
    return pipeline.find(
        _split(seed),
        _Random(seed).seconds,
        interference.TABLE_3,
        num_sms=100,
        name="found",
        seconds=600,
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_a_plan_is_legal_and_runs_in_the_time_that_its_schedule_says(seed):
    found = _find(seed)
    legality.check(found.plan)
    spans = plan_search.predict(found.plan, _Random(seed), interference.TABLE_3)
    assert timeline.period_s(spans) <= found.period_s * (1 + 1e-3)


def test_the_same_instance_has_the_same_plan_again():
    assert _find(2).plan == _find(2).plan


def test_a_task_waits_for_the_last_of_every_shift_that_it_must_not_run_beside():
    """In the first turns of a model those of lower shifts are missing, and those before them not.

    `late` is missing where layer 0 has only begun; waiting for it alone would let the task run
    beside `early`.
    """
    assert _after((["late", "early"], []), late=0) == ("early", "late")
    assert _after((["late", "early"], []), late=1) == ("late",)


def test_a_task_waits_for_the_turn_before_too_as_the_last_turn_has_no_later_task_of_a_shift():
    """`late` of this turn is missing behind the last layer, where `early` of the turn before is."""
    assert _after((["late"], ["early"]), late=1) == ("early", "late")


def _after(before: tuple[list[str], list[str]], *, late: int) -> tuple[str, ...]:
    """What a task of shift 1 waits for; `early` has shift 1 too, `late` any."""
    lanes = {"task": Resource.COMPUTE, "early": Resource.MEMORY, "late": Resource.MEMORY}
    apart = frozenset({frozenset(("task", "early")), frozenset(("task", "late"))})
    return pipeline._after(
        "task",
        before,
        {"task": 1, "early": 1, "late": late},
        types.SimpleNamespace(lanes=lanes),
        types.SimpleNamespace(apart=apart),
    )


def test_a_round_that_time_cuts_off_leaves_the_plan_of_the_round_before(monkeypatch):
    rounds = []
    whole = pipeline._round

    def cut_off(*args, **kwargs):
        if rounds:
            raise periodic.ProgramError("too few seconds")
        rounds.append(whole(*args, **kwargs))
        return rounds[0]

    monkeypatch.setattr(pipeline, "_round", cut_off)
    found = _find(2)
    legality.check(found.plan)
    assert found.period_s == rounds[0].period_s
    with pytest.raises(periodic.ProgramError, match="too few seconds"):
        _find(2)  # and in the first round there is none yet


def test_shares_with_which_nothing_ever_runs_are_none(monkeypatch):
    solve = periodic.Program.solve

    def stand_still(self, *, seconds):
        values, bound, is_best = solve(self, seconds=seconds)
        if any(name[0] == "share" for name in values):
            values["rate"] = 0.0
        return values, bound, is_best

    monkeypatch.setattr(periodic.Program, "solve", stand_still)
    with pytest.raises(periodic.ProgramError, match="no shares were found"):
        _find(2)
