"""Knobs choose a plan for each bucket; what fits nothing is refused."""

import dataclasses
import logging
import re

import pytest

from nanoflow_jax import config
from nanoflow_jax.engine import plan_choice
from nanoflow_jax.nanobatch import builders, plan_file
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.scheduler.buckets import Bucket

_SMALL = Bucket(tokens=8, decode_rows=8, prefill_rows=0)
_LARGE = Bucket(tokens=64, decode_rows=8, prefill_rows=4)
_DENSE = LayerShape()


def _choose(shape=_DENSE, **knobs):
    section = config.PlanSection(**{"plan_granule": 8, **knobs})
    return plan_choice.choose(section, [_SMALL, _LARGE], shape, num_sms=100)


def _refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_every_bucket_runs_whole_unless_told_otherwise():
    plans = _choose()
    assert [plan.name for plan in plans.values()] == ["one", "one"]
    assert [plan.num_tokens for plan in plans.values()] == [8, 64]


def test_halves_cut_buckets_that_have_tokens_enough(caplog):
    with caplog.at_level(logging.INFO):
        plans = _choose(plan="halves")
    assert plans[_SMALL].name == "one"
    assert plans[_LARGE].name == "halves"
    assert (plans[_LARGE].num_sms, plans[_LARGE].granule) == (100, 8)
    assert "bucket 64:8:4 runs by plan halves, which may change last bits" in caplog.text


def test_it_is_said_that_halves_cut_nothing(caplog):
    assert {plan.name for plan in _choose(plan="halves", plan_granule=64).values()} == {"one"}
    assert (
        "--plan=halves cuts none of the buckets 8:8:0, 64:8:4, and all run as with one; raise "
        "--dense_batch, or lower --plan_granule or --plan_min_tokens" in caplog.text
    )
    caplog.clear()
    _choose(plan="halves")
    assert not caplog.text


@pytest.mark.parametrize(("least", "name"), [(64, "halves"), (65, "one")])
def test_buckets_below_the_threshold_run_whole(least, name):
    assert _choose(plan="halves", plan_min_tokens=least)[_LARGE].name == name


def test_several_devices_reduce_one_half_beside_products_of_the_other():
    plans = _choose(LayerShape(num_devices=2), plan="halves")
    assert plans[_LARGE].name == "tensor_parallel"
    assert plans[_LARGE].shape == LayerShape(num_devices=2)
    assert not any("gather" in key for key in plans[_LARGE].keys)
    # In the plain pass a product sums by itself.
    assert plans[_SMALL].shape == LayerShape()


def _by_columns(*columns, num_tokens=(8, 64)):
    """Plans of one device each that take some products by columns."""
    shape = LayerShape(num_devices=2)
    return [
        dataclasses.replace(
            builders.one(shape, num_tokens=count, by_columns=some), name=f"plan {i}"
        )
        for i, (count, some) in enumerate(zip(num_tokens, columns, strict=True))
    ]


def test_buckets_without_a_plan_multiply_with_the_weights_that_those_of_the_file_want(tmp_path):
    path = tmp_path / "plans.json"
    path.write_text(plan_file.to_json(_by_columns({"o"}, num_tokens=[64])))
    plans = _choose(LayerShape(num_devices=2), plan=str(path))
    assert plans[_SMALL].ways == plans[_LARGE].ways == {"o": {"gather"}, "down": {"reduce"}}
    assert plan_choice.by_columns(plans.values()) == {"o"}


def test_plans_that_want_a_weight_both_ways_are_refused(tmp_path):
    path = tmp_path / "plans.json"
    path.write_text(plan_file.to_json(_by_columns({"o", "down"}, {"o"})))
    with _refused(
        "plan 'plan 0' wants the weight of down split by columns and plan 'plan 1' along the "
        "summed axis, and it is held once; take one way in all plans and for all of their tokens"
    ):
        _choose(LayerShape(num_devices=2), plan=str(path))


def test_a_plan_that_wants_a_weight_both_ways_by_itself_is_refused():
    shape, device = LayerShape(num_devices=2), builders.Device(granule=8)
    both = builders.tensor_parallel(shape, num_tokens=64, device=device)
    name = "plan 'tensor_parallel'"
    with _refused(
        f"{name} wants the weight of o split by columns and {name} along the summed axis, and it "
        "is held once; take one way in all plans and for all of their tokens"
    ):
        plan_choice.by_columns([both])


def test_a_plan_for_one_device_sums_beside_those_of_several():
    (columns,) = _by_columns({"o"}, num_tokens=[64])
    with pytest.raises(ValueError, match="plan 'one' along the summed axis"):
        plan_choice.by_columns([columns, builders.one(LayerShape(), num_tokens=8)])


def test_a_file_has_plans_for_buckets_of_its_sizes(tmp_path):
    plan = builders.halves(_DENSE, num_tokens=64, device=builders.Device(granule=8))
    path = tmp_path / "plans.json"
    path.write_text(plan_file.to_json([plan]))
    plans = _choose(plan=str(path))
    assert plans[_LARGE] == plan
    assert plans[_SMALL].name == "one"


def test_a_file_that_is_not_there_is_refused():
    with _refused(
        "--plan=half cannot be read (No such file or directory); name one, halves or a file of "
        "plans"
    ):
        _choose(plan="half")


def test_a_plan_without_a_bucket_is_refused(tmp_path):
    path = tmp_path / "plans.json"
    path.write_text(plan_file.to_json([builders.halves(_DENSE, num_tokens=256)]))
    with _refused(
        f"{path}: plan 'halves' is for 256 tokens and buckets have 8, 64; add 256:... to "
        "--buckets, or remove the plan"
    ):
        _choose(plan=str(path))


def test_a_plan_for_another_model_is_refused(tmp_path):
    path = tmp_path / "plans.json"
    sparse = LayerShape(is_sparse=True)
    path.write_text(plan_file.to_json([builders.one(sparse, num_tokens=64)]))
    with _refused(
        f"{path}: plan 'one' is for LayerShape(is_sparse=True, num_devices=1) and the model has "
        "LayerShape(is_sparse=False, num_devices=1); make one for this model and "
        "--tensor_parallel"
    ):
        _choose(plan=str(path))
