"""Legal plans pass; of each kind of illegal one the message says what to change."""

import dataclasses

import pytest
import random_plans
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.nanobatch import builders, legality, pipeline
from nanoflow_jax.nanobatch.operations import LayerShape, Resource
from nanoflow_jax.nanobatch.plan import NanoOperation, TokenRange

DENSE, TENSOR = LayerShape(), LayerShape(num_devices=8)
HALVES = builders.halves(DENSE, num_tokens=256)


def _changed(plan, key, **changes):
    """The plan with other fields in one nano-operation."""
    place = plan.keys.index(key)
    order = list(plan.order)
    order[place] = dataclasses.replace(order[place], **changes)
    return dataclasses.replace(plan, order=tuple(order))


def _without(plan, key):
    place = plan.keys.index(key)
    return dataclasses.replace(plan, order=plan.order[:place] + plan.order[place + 1 :])


def _refused(plan, match):
    with pytest.raises(ValueError, match=match) as caught:
        legality.check(plan)
    assert str(caught.value).startswith(f"plan '{plan.name}': ")


@given(random_plans.plans())
def test_random_plans_are_legal(plan):
    legality.check(plan)


@given(random_plans.plans())
def test_every_token_of_every_operation_is_issued_once_in_each_layer(plan):
    issued = pipeline.issue_order(plan, [plan.graph] * 3)
    counts = {}
    for node in issued:
        nano = plan.order[node.place]
        op = plan.graph.by_name[nano.operation]
        of = op.name if op.choice is None else (op.choice.product, op.choice.way, op.name)
        for token in range(*nano.tokens):
            counts[node.layer, of, token] = counts.get((node.layer, of, token), 0) + 1
    assert set(counts.values()) == {1}
    for layer in range(3):
        for product, ways in plan.graph.choices.items():
            for token in range(plan.num_tokens):
                taken = {
                    w
                    for w in ways
                    for op in ways[w]
                    if (layer, (product, w, op.name), token) in counts
                }
                assert len(taken) == 1
        for op in plan.graph.operations:
            if op.choice is None:
                covered = {t for t in range(plan.num_tokens) if (layer, op.name, t) in counts}
                assert covered == set(range(plan.num_tokens))


@given(random_plans.plans(), st.data())
def test_a_plan_that_lacks_a_nano_operation_is_not_legal(plan, data):
    place = data.draw(st.integers(0, len(plan.order) - 1))
    lacking = dataclasses.replace(plan, order=plan.order[:place] + plan.order[place + 1 :])
    with pytest.raises(ValueError, match=r"cover|shift 0|split both alike|decode_weights|order is"):
        legality.check(lacking)


@pytest.mark.parametrize("name", ["num_tokens", "granule", "num_sms"])
def test_sizes_are_positive(name):
    _refused(dataclasses.replace(HALVES, **{name: 0}), f"{name}=0 is not positive; give it at")


def test_an_empty_order_is_refused():
    _refused(dataclasses.replace(HALVES, order=()), "order is empty; list the nano-operations")


def test_an_unknown_operation_is_refused_with_those_there_are():
    plan = _changed(HALVES, "o.0", operation="out")
    _refused(plan, r"out \[0, 128\): a layer of .*has no such operation; it has norm_kqv, rope")


@pytest.mark.parametrize("tokens", [(-128, 128), (128, 128), (128, 384)])
def test_ranges_lie_within_the_dense_batch(tokens):
    plan = _changed(HALVES, "o.0", tokens=TokenRange(*tokens))
    _refused(plan, r"not a range of tokens within \[0, 256\); change its tokens")


def test_borders_are_multiples_of_the_granule_but_for_the_end():
    legality.check(builders.halves(DENSE, num_tokens=200, first=128))
    plan = _changed(HALVES, "o.0", tokens=TokenRange(0, 100))
    _refused(plan, r"o \[0, 100\): 100 is not a multiple of the granule 128; move the border")


@pytest.mark.parametrize("num_ctas", [0, 133])
def test_a_cap_is_at_least_one_and_at_most_the_device(num_ctas):
    plan = _changed(HALVES, "o.0", num_ctas=num_ctas)
    _refused(plan, rf"num_ctas={num_ctas} is outside \[1, 132\], the SMs of the device; change")


def test_a_cap_outside_a_lane_is_refused():
    plan = _changed(HALVES, "norm.0", num_ctas=8)
    _refused(plan, "num_ctas=8 caps nothing outside a lane; give it a lane or leave num_ctas out")


def test_shifts_begin_at_zero_and_are_few():
    _refused(_changed(HALVES, "o.1", shift=-1), "shift=-1 is negative; raise all shifts alike")
    _refused(_changed(HALVES, "o.1", shift=10**6), "shift=1000000 is above 16, the most layers")
    order = tuple(dataclasses.replace(n, shift=n.shift + 1) for n in HALVES.order)
    raised = dataclasses.replace(HALVES, order=order)
    _refused(raised, "no nano-operation has shift 0; lower all shifts alike")


def test_a_token_that_nothing_covers_is_named():
    _refused(_without(HALVES, "o.1"), r"o: nothing covers tokens \[128, 256\); add a range")
    _refused(_without(HALVES, "o.0"), r"o: nothing covers tokens \[0, 128\); add a range")


def test_a_token_that_is_covered_twice_is_named():
    plan = _changed(HALVES, "o.1", tokens=TokenRange(0, 256))
    _refused(plan, r"o: tokens from 0 on are covered twice; cut \[0, 256\)")


def _tensor():
    return builders.tensor_parallel(TENSOR, num_tokens=512)


def test_each_token_takes_one_way_of_a_product():
    plan = _without(_without(_tensor(), "o.0"), "o_reduce.0")
    _refused(plan, r"o \(ways reduce and gather\): nothing covers tokens \[256, 512\); add")
    whole = TokenRange(0, 512)
    plan = _changed(_changed(_tensor(), "o.0", tokens=whole), "o_reduce.0", tokens=whole)
    _refused(plan, r"o \(ways reduce and gather\): tokens from 0 on are covered twice; cut")


def test_a_way_is_taken_whole():
    _refused(
        _without(_tensor(), "o_gather.0"),
        "attention_gather and o_gather together are the way 'gather' of o and cover different",
    )


def test_a_collective_covers_a_token_once():
    plan = _tensor()
    again = dataclasses.replace(plan.order[plan.keys.index("o_reduce.0")])
    plan = dataclasses.replace(plan, order=(*plan.order, again))
    _refused(plan, r"o_reduce: tokens from 256 on are covered twice; cut \[256, 512\)")


def test_operations_on_rows_sorted_by_expert_are_split_alike():
    plan = builders.halves(LayerShape(is_sparse=True), num_tokens=256)
    whole = NanoOperation(
        operation="route", tokens=TokenRange(0, 256), lane=Resource.COMPUTE, num_ctas=84
    )
    plan = _without(_without(plan, "route.1"), "route.0")
    _refused(
        dataclasses.replace(plan, order=(*plan.order, whole)),
        "up_gate reads rows that route has sorted by expert, and is split at other tokens",
    )


def test_there_is_a_decode_weight_for_each_cell():
    plan = dataclasses.replace(HALVES, decode_weights=(1,))
    _refused(plan, r"decode_weights has 1 entries and the ranges make 2 cells \(\[0, 128\), \[128")


@pytest.mark.parametrize("weights", [(0, 0), (-1, 2)])
def test_decode_weights_are_proportions(weights):
    plan = dataclasses.replace(HALVES, decode_weights=weights)
    _refused(plan, "must not be negative, nor all 0; decode rows are dealt in these")


def test_only_nano_operations_of_the_plan_can_be_waited_for():
    plan = _changed(HALVES, "o.0", after=("o.2",))
    _refused(plan, r"o.0 is to run after 'o.2', which is none of decode_attention.0, o.1")


def test_a_reader_that_is_issued_first_is_refused():
    plan = builders.one(DENSE, num_tokens=8)
    norm, up_gate = plan.keys.index("norm.0"), plan.keys.index("up_gate.0")
    order = list(plan.order)
    order[norm], order[up_gate] = order[up_gate], order[norm]
    _refused(
        dataclasses.replace(plan, order=tuple(order)),
        "up_gate.0 is issued before norm.0 of its layer, which it reads; move it back in order",
    )


def test_a_layer_is_not_issued_before_what_the_layer_before_leaves():
    plan = _changed(HALVES, "norm_kqv.0", shift=3)
    _refused(plan, "norm_kqv.0 is issued before down.0 of the layer before, which it reads; move")


def test_two_kernels_that_may_run_at_once_fit_the_device_together():
    plan = _changed(HALVES, "up_gate.1", num_ctas=132)
    _refused(plan, r"up_gate.1 \(132\).* may run at once and ask for 164 CTAs of 132 SMs; lower")


def test_three_kernels_that_may_run_at_once_fit_the_device_together():
    plan = _changed(_tensor(), "norm_kqv.1", num_ctas=85)
    _refused(plan, "may run at once and ask for 133 CTAs of 132 SMs; lower num_ctas, or order")


def test_a_kernel_may_use_the_whole_device_once_it_waits_for_the_other():
    plan = _changed(HALVES, "up_gate.1", num_ctas=132, after=("decode_attention.0",))
    after = ("decode_attention.0",)
    legality.check(_changed(_changed(plan, "down.1", after=after), "norm_kqv.1", after=after))
