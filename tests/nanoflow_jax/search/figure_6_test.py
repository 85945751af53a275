"""The plan that was found for the paper's model and times, beside the paper's own."""

import pathlib

import pytest

from nanoflow_jax.cost import timeline
from nanoflow_jax.nanobatch import operations, plan_file
from nanoflow_jax.search import figure_6, plan_search
from nanoflow_jax.search.interference import TABLE_3
from nanoflow_jax.search.profiles import PAPER_70B

_PLANS = pathlib.Path(__file__).parents[3] / "configs" / "plans"
_SHAPE = operations.LayerShape(num_devices=8)


def _period_s(plan):
    return timeline.period_s(plan_search.predict(plan, PAPER_70B, TABLE_3))


def test_a_layer_takes_what_the_papers_operations_take_together():
    whole = plan_search.sequential_s(_SHAPE, 2048, PAPER_70B)
    assert whole * 80 == pytest.approx(225.05e-3, rel=1e-3)


def test_the_papers_split_costs_what_its_ablation_says():
    whole = plan_search.sequential_s(_SHAPE, 2048, PAPER_70B)
    assert plan_search.split_s(figure_6.plan(), PAPER_70B) / whole == pytest.approx(
        1106 / 982, rel=2e-3
    )


def test_the_plan_that_was_found_is_at_least_as_good_as_the_papers():
    (found,) = plan_file.read(_PLANS / "a100-80g" / "llama-2-70b-tp8.json")
    assert _period_s(found) <= _period_s(figure_6.plan())


@pytest.mark.parametrize(
    ("file", "num_tokens", "num_sms"),
    [("a100-80g/llama-2-70b-tp8.json", 2048, 108), ("h200/llama-3-8b.json", 2048, 132)],
)
def test_plans_that_are_kept_are_legal_and_need_no_weight_twice(file, num_tokens, num_sms):
    (plan,) = plan_file.read(_PLANS / file)  # checks that it is legal
    assert (plan.num_tokens, plan.num_sms) == (num_tokens, num_sms)
    assert all(len(ways) == 1 for ways in plan.ways.values())
