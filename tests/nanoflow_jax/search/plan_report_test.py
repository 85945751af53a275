import pytest

from nanoflow_jax.cost import timeline
from nanoflow_jax.nanobatch import builders, operations
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.search import interference, plan_report, plan_search
from nanoflow_jax.search.profiles import Measured

_PROFILE = Measured(
    whole_s={"norm_kqv": 2e-4, "decode_attention": 8e-4, "o": 2e-4, "up_gate": 8e-4, "down": 4e-4},
    tokens=512,
    fixed=0.0,
    source="made up",
)
_SPEEDS = interference.ROOFLINE


@pytest.fixture
def plan():
    device = builders.Device(num_sms=100, attention_ctas=40)
    return builders.halves(operations.LayerShape(), num_tokens=512, device=device)


def _outcome(plan):
    period = timeline.period_s(plan_search.predict(plan, _PROFILE, _SPEEDS))
    return plan_search.Outcome(sequential_s=24e-4, plan=plan, period_s=period, bound_s=16e-4)


def test_lanes_are_as_busy_as_their_operations_are_long(plan):
    found = plan_report.reasons(plan, _PROFILE, _SPEEDS)
    # 40 of 100 SMs take all that memory gives; products have 60 of them.
    assert found.busy_s[Resource.MEMORY] == pytest.approx(8e-4)
    assert found.busy_s[Resource.COMPUTE] == pytest.approx(16e-4 / 0.6)


def test_attention_of_one_half_runs_beside_products_of_the_other(plan):
    found = plan_report.reasons(plan, _PROFILE, _SPEEDS)
    assert all("decode_attention" in pair for pair in found.together_s)
    assert sum(found.together_s.values()) == pytest.approx(8e-4)  # all of it is hidden
    assert {key.split(".")[0] for key in found.critical} >= {"norm_kqv", "o", "up_gate", "down"}


def test_the_text_says_what_is_gained_and_by_what(plan):
    text = plan_report.text(_outcome(plan), _PROFILE, _SPEEDS)
    assert "times of operations: made up" in text
    assert "best plan: halves, 2,666.7 us a layer" in text
    assert "nothing split, one after another: 2,400.0 us, 0.900 x" in text
    assert "at most 66.7 % from the best" in text
    assert "splitting costs 0.0, sharing SMs 1,066.7; running side by side hides 800.0" in text
    assert "compute bounds it" in text


def test_of_a_plan_that_splits_nothing_only_that_is_said():
    plan = builders.one(operations.LayerShape(), num_tokens=512)
    text = plan_report.text(_outcome(plan), _PROFILE, _SPEEDS)
    assert "splitting does not pay here" in text
    assert "why" not in text
