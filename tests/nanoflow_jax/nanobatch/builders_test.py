"""Plans that the builders make are those of the papers' pipelines, and errors say what to do."""

import pytest

from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape, Resource
from nanoflow_jax.nanobatch.plan import TokenRange, cut_at

TENSOR = LayerShape(num_devices=8)


def _ranges(plan, operation):
    return [tuple(plan.order[i].tokens) for i in plan.by_operation.get(operation, ())]


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_plain_pass_splits_nothing_and_overlaps_nothing(is_sparse, num_devices):
    shape = LayerShape(is_sparse=is_sparse, num_devices=num_devices)
    plan = builders.one(shape, num_tokens=5)
    assert plan.cells == (TokenRange(0, 5),)
    assert {nano.lane for nano in plan.order} == {Resource.COMPUTE}
    assert {nano.num_ctas for nano in plan.order} == {None}
    assert not any("gather" in key or "columns" in key for key in plan.keys)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_halves_split_every_operation_in_two(is_sparse):
    plan = builders.halves(LayerShape(is_sparse=is_sparse), num_tokens=1024, first=384)
    for op in plan.graph.by_name:
        assert _ranges(plan, op) == [(0, 384), (384, 1024)]
    assert plan.decode_weights == (384, 640)
    caps = {n.num_ctas for n in plan.order if n.lane is Resource.COMPUTE}
    assert caps == {132 - 32}


@pytest.mark.parametrize("is_sparse", [False, True])
def test_tensor_parallel_plans_split_as_the_pipeline_of_the_70b_model(is_sparse):
    shape = LayerShape(is_sparse=is_sparse, num_devices=8)
    plan = builders.tensor_parallel(shape, num_tokens=2048, first=768)
    assert plan.cells == cut_at([0, 384, 768, 1408, 2048])
    for name in ("norm_kqv", "decode_attention"):
        assert _ranges(plan, name) == [(0, 384), (384, 768), (768, 1408), (1408, 2048)]
    assert _ranges(plan, "o_columns") == _ranges(plan, "attention_gather") == [(0, 768)]
    assert _ranges(plan, "o") == _ranges(plan, "o_reduce") == [(768, 2048)]
    assert _ranges(plan, "down_reduce") == [(0, 768), (768, 1408), (1408, 2048)]


def test_shares_of_a_device_are_what_was_asked_for():
    device = builders.Device(num_sms=64, attention_ctas=20, network_ctas=4, granule=2)
    plan = builders.tensor_parallel(TENSOR, num_tokens=16, device=device)
    caps = {(n.operation, n.num_ctas) for n in plan.order if n.lane is not None}
    assert {("norm_kqv", 40), ("decode_attention", 20), ("o_reduce", 4), ("down", 60)} <= caps


def test_halves_of_several_devices_are_refused():
    with pytest.raises(ValueError, match=r"is spread over 8; take tensor_parallel"):
        builders.halves(TENSOR, num_tokens=256)


def test_a_tensor_parallel_plan_of_one_device_is_refused():
    with pytest.raises(ValueError, match="needs several devices to a layer; take halves"):
        builders.tensor_parallel(LayerShape(), num_tokens=512)


@pytest.mark.parametrize("num_tokens", [128, 255])
def test_a_batch_without_two_granules_cannot_be_halved(num_tokens):
    with pytest.raises(
        ValueError, match="each part needs at least the granule of 128 tokens: take"
    ):
        builders.halves(LayerShape(), num_tokens=num_tokens)


def test_a_half_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 256\) cannot be cut after 256 tokens; each part"):
        builders.halves(LayerShape(), num_tokens=256, first=256)


def test_without_gathers_both_halves_reduce():
    plan = builders.tensor_parallel(TENSOR, num_tokens=512, gathers=False)
    assert _ranges(plan, "o") == _ranges(plan, "o_reduce") == [(0, 256), (256, 512)]
    assert not any("gather" in key or "columns" in key for key in plan.keys)


def test_a_smaller_device_is_shared_alike():
    device = builders.share_out(66, granule=4)
    assert device == builders.Device(num_sms=66, attention_ctas=16, network_ctas=8, granule=4)
    tiny = builders.share_out(3, granule=4)
    assert builders.tensor_parallel(TENSOR, num_tokens=16, device=tiny).num_sms == 3
