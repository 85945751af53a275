"""Groups of nano-operations: worked by hand for halves, and legal for random plans."""

import dataclasses
import itertools

import random_plans
from hypothesis import given

from nanoflow_jax.nanobatch import builders, grouping
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.nanobatch.operations import LayerShape, Resource

_WORKS = {"up_gate": 4.0, "down": 2.0, "norm_kqv": 1.0, "o": 1.0}
_ATTENTIONS = {"decode_attention": 0.0, "prefill_attention": 0.0}


def _graph(plan, num_layers=3):
    return Dependencies(plan, [plan.graph] * num_layers)


def _groups(graph, works=None):
    works = _WORKS | _ATTENTIONS if works is None else works
    return grouping.group(graph, lambda node: works.get(graph.operation(node).name))


def _named(graph, groups):
    """Layer and key of all groups of several."""
    keys = graph.plan.keys
    return [
        [f"{node.layer} {keys[node.place]}" for node in group] for group in groups if len(group) > 1
    ]


def _several(groups):
    return [group for group in groups if len(group) > 1]


_HALVES = builders.halves(LayerShape(), num_tokens=256)


def test_decode_attention_takes_the_largest_product_of_the_other_half():
    graph = _graph(_HALVES)
    assert _named(graph, _groups(graph)) == [
        ["0 decode_attention.0", "0 norm_kqv.1"],
        ["0 decode_attention.1", "0 up_gate.0"],
        ["1 decode_attention.0", "0 up_gate.1"],
        ["1 decode_attention.1", "1 up_gate.0"],
        ["2 decode_attention.0", "1 up_gate.1"],
        ["2 decode_attention.1", "2 up_gate.0"],
    ]


def test_of_equal_products_the_one_issued_next_to_an_attention_joins_it():
    graph = _graph(_HALVES)
    works = dict.fromkeys(("o", "up_gate", "down"), 1.0) | _ATTENTIONS
    assert ["1 decode_attention.0", "0 o.1"] in _named(graph, _groups(graph, works))


def test_what_is_no_kernel_stays_alone():
    graph = _graph(_HALVES)
    products = _groups(graph, _WORKS)
    assert _several(products) == []
    assert [node for (node,) in products] == list(graph.nodes)
    works = _WORKS | {"decode_attention": 0.0, "up_gate": None}
    found = _named(graph, _groups(graph, works))
    assert [other for _, other in found] == [
        "0 norm_kqv.1",
        "0 down.0",
        "0 down.1",
        "1 down.0",
        "1 down.1",
        "2 down.0",
    ]


def test_the_plain_pass_has_no_groups():
    graph = _graph(builders.one(LayerShape(), num_tokens=256))
    assert [node for (node,) in _groups(graph)] == list(graph.nodes)


def test_both_attentions_run_beside_a_product_where_each_has_a_lane():
    device = builders.Device(num_sms=100, attention_ctas=48)
    halves = builders.halves(LayerShape(), num_tokens=256, device=device)
    own = {"prefill_attention": {"lane": Resource.NETWORK, "num_ctas": 32}}
    order = [dataclasses.replace(n, **own.get(n.operation, {})) for n in halves.order]
    graph = _graph(dataclasses.replace(halves, order=tuple(order), num_sms=132))
    groups = _several(_groups(graph))
    assert groups
    for group in groups:
        names = {graph.operation(node).name for node in group}
        assert len(names) == 3 and names > set(_ATTENTIONS)


def test_decode_attention_takes_prefill_attention_where_no_product_is_a_kernel():
    graph = _graph(_HALVES)
    found = _named(graph, _groups(graph, _ATTENTIONS))
    assert found == [
        [f"{layer} decode_attention.{half}", f"{layer} prefill_attention.{half}"]
        for layer in range(3)
        for half in range(2)
    ]


@given(random_plans.plans())
def test_groups_of_random_plans_wait_for_nothing_of_themselves_and_come_after_what_they_wait_for(
    plan,
):
    graph = _graph(plan)
    groups = _groups(graph)
    assert sorted(itertools.chain(*groups)) == sorted(graph.nodes)
    done = set()
    for group in groups:
        for node in group:
            assert done.issuperset(graph.waits_for(node))
        assert all(graph.are_unordered(a, b) for a, b in itertools.combinations(group, 2))
        done.update(group)


@given(random_plans.plans())
def test_kernels_of_a_group_are_of_different_lanes_and_kinds_and_fit_into_the_sms(plan):
    graph = _graph(plan)
    for group in _several(_groups(graph)):
        lanes = [plan.order[node.place].lane for node in group]
        assert None not in lanes and len(set(lanes)) == len(group)
        names = [graph.operation(node).name for node in group]
        assert sum(name in _WORKS for name in names) <= 1
        assert len(set(names)) == len(group)
        assert set(names) <= {*_WORKS, *_ATTENTIONS}
        assert sum(plan.num_ctas(node.place) for node in group) <= plan.num_sms


@given(random_plans.plans())
def test_no_decode_attention_is_left_beside_a_product_that_it_could_run_with(plan):
    graph = _graph(plan)
    groups = _groups(graph)
    alone = [group[0] for group in groups if len(group) == 1]
    lane = {node: plan.order[node.place].lane for node in alone}
    for node in alone:
        if graph.operation(node).name != "decode_attention" or lane[node] is None:
            continue
        for other in alone:
            if graph.operation(other).name in _WORKS and lane[other] not in (None, lane[node]):
                assert _are_ordered(graph, groups, node, other)


def _are_ordered(graph, groups, one, other):
    """Whether one waits for the other, through groups too, by a walk."""
    group_of = {node: group for group in groups for node in group}

    def reaches(start, goal):
        seen, left = set(), [start]
        while left:
            group = group_of[left.pop()]
            if goal in group:
                return True
            if group not in seen:
                seen.add(group)
                left += [first for node in group for first in graph.waits_for(node)]
        return False

    return reaches(one, other) or reaches(other, one)
