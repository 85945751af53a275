import pytest

from nanoflow_jax.config import PlanSection
from nanoflow_jax.nanobatch import builders, plan_file
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.overlap import asked_plan
from nanoflow_jax.scheduler.buckets import Bucket

_SHAPE = LayerShape()


def _find(plan, tokens, **knobs):
    bucket = Bucket(tokens=tokens, decode_rows=tokens // 2, prefill_rows=4)
    return asked_plan.find(PlanSection(plan=str(plan), **knobs), bucket, _SHAPE, num_sms=132)


@pytest.fixture
def plans(tmp_path):
    path = tmp_path / "plans.json"
    path.write_text(plan_file.to_json([builders.halves(_SHAPE, num_tokens=n) for n in (256, 1024)]))
    return path


def test_plans_are_found_for_any_size_of_batch(plans):
    assert _find("one", 100).name == "one"
    assert _find("halves", 4096).num_tokens == 4096
    assert _find(plans, 1024) == builders.halves(_SHAPE, num_tokens=1024)


def test_a_batch_that_halves_would_not_cut_is_refused():
    for knobs in ({"plan_granule": 1024}, {"plan_min_tokens": 2048}):
        with pytest.raises(ValueError, match="--plan=halves does not cut --tokens=1024; take more"):
            _find("halves", 1024, **knobs)


def test_a_size_for_which_a_file_has_no_plan_is_refused_with_those_that_it_has(plans):
    with pytest.raises(
        ValueError, match="has plans for 256, 1024 tokens and none for --tokens=512; ask for one"
    ):
        _find(plans, 512)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--plan=.*none\.json cannot be read"):
        _find(tmp_path / "none.json", 512)
