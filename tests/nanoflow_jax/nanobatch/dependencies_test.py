"""What waits for what: worked by hand, and against plain definitions for random plans."""

import itertools

import pytest
import random_plans
from hypothesis import given

from nanoflow_jax.nanobatch import builders, dependencies, operations
from nanoflow_jax.nanobatch.dependencies import Dependencies, Rule
from nanoflow_jax.nanobatch.operations import LayerShape, Resource, layer_graph
from nanoflow_jax.nanobatch.pipeline import Node
from nanoflow_jax.nanobatch.plan import NanoOperation, Plan, TokenRange

DENSE = LayerShape()


def _build(plan, num_layers=3):
    return Dependencies(plan, [plan.graph] * num_layers)


def _halves():
    return builders.halves(DENSE, num_tokens=256)


def _node(graph, layer, key):
    return Node(layer, graph.plan.keys.index(key))


def _waits(graph, layer, key):
    found = graph.waits_for(_node(graph, layer, key))
    return {(n.layer, graph.plan.keys[n.place]): rule for n, rule in found.items()}


def test_the_plain_pass_is_one_chain():
    graph = _build(builders.one(DENSE, num_tokens=8))
    assert all(graph.is_before(a, b) for a, b in itertools.pairwise(graph.nodes))
    assert graph.unordered_with(graph.nodes[4]) == ()


def test_an_operation_waits_for_writers_of_its_own_tokens_only():
    graph = _build(_halves())
    assert _waits(graph, 1, "rope.0") == {(1, "norm_kqv.0"): Rule.VALUE}
    assert _waits(graph, 1, "up_gate.1") == {(1, "norm.1"): Rule.VALUE, (1, "o.1"): Rule.LANE}


def test_a_layer_reads_what_the_layer_before_leaves():
    waits = _waits(_build(_halves()), 2, "norm_kqv.0")
    assert waits[1, "down.0"] is Rule.VALUE
    assert (1, "down.1") not in waits


def test_decode_attention_needs_its_own_append_and_prefill_also_earlier_ones():
    graph = _build(_halves())
    assert _waits(graph, 1, "decode_attention.1")[1, "append.1"] is Rule.VALUE
    first, second = (_waits(graph, 1, f"prefill_attention.{i}") for i in range(2))
    assert first[1, "append.0"] is Rule.VALUE and (1, "append.1") not in first
    assert second[1, "append.0"] is second[1, "append.1"] is Rule.VALUE


def test_an_append_waits_for_attention_that_reads_the_same_buffer():
    waits = _waits(_build(_halves()), 1, "append.1")
    assert waits[1, "decode_attention.0"] is waits[1, "append.0"] is Rule.CACHE
    assert all(layer == 1 for layer, _ in waits)


def test_attention_waits_for_an_append_before_it_that_it_does_not_need():
    order = list(_halves().order)
    names = [(n.operation, n.tokens.start) for n in order]
    decode = order.pop(names.index(("decode_attention", 0)))
    at = [(n.operation, n.tokens.start) for n in order].index(("append", 128))
    order.insert(at + 1, decode)
    plan = Plan(
        name="late",
        shape=DENSE,
        num_tokens=256,
        decode_weights=(1, 1),
        order=tuple(order),
    )
    waits = _waits(_build(plan), 1, "decode_attention.0")
    assert waits[1, "append.1"] is Rule.CACHE


def test_decode_attention_of_a_half_is_unordered_with_all_products_of_the_other():
    graph = _build(_halves(), num_layers=4)
    beside = graph.unordered_with(_node(graph, 2, "decode_attention.0"))
    keys = {(node.layer, graph.plan.keys[node.place]) for node in beside}
    assert {(1, "o.1"), (1, "up_gate.1"), (1, "down.1"), (2, "norm_kqv.1")} <= keys
    assert not any(key.startswith("decode") for _, key in keys)


def test_no_two_products_of_halves_are_unordered():
    graph = _build(_halves(), num_layers=4)
    products = [n for n in graph.nodes if graph.plan.order[n.place].lane is Resource.COMPUTE]
    for a, b in itertools.combinations(products, 2):
        assert not graph.are_unordered(a, b)


def test_collectives_of_one_half_are_in_flight_over_products_of_the_other():
    plan = builders.tensor_parallel(LayerShape(num_devices=8), num_tokens=512)
    graph = _build(plan, num_layers=4)
    for collective, products in {
        "o_reduce.0": {"up_gate.0", "down.0"},
        "down_reduce.0": {"up_gate.1", "down.1"},
        "o_gather.0": {"o.0"},
    }.items():
        beside = graph.unordered_with(_node(graph, 2, collective))
        assert products <= {plan.keys[node.place] for node in beside if node.layer == 2}
    last = graph.unordered_with(_node(graph, 1, "down_reduce.2"))
    assert {"norm_kqv.0", "norm_kqv.1"} <= {plan.keys[n.place] for n in last if n.layer == 2}


def test_after_waits_for_the_last_issued_before():
    order = (
        NanoOperation(operation="norm", tokens=TokenRange(0, 4), after=("o.0",)),
        NanoOperation(operation="o", tokens=TokenRange(0, 8)),
    )
    plan = Plan(name="x", shape=DENSE, num_tokens=8, decode_weights=(1,), order=order)
    layers = [operations.LayerGraph(operations=(_copy("norm"), _copy("o")))] * 2
    graph = Dependencies(plan, layers)
    assert graph.waits_for(Node(0, 0)) == {}
    assert graph.waits_for(Node(1, 0))[Node(0, 1)] is Rule.AFTER


def _copy(name):
    return operations.Operation(
        name=name,
        resource=Resource.COMPUTE,
        reads=(),
        writes=operations.Y,
    )


def test_token_edges_are_the_edges_of_lanes_that_nothing_else_implies():
    graph = _build(_halves(), num_layers=4)
    edges = {
        (node.layer, graph.plan.keys[node.place]): [
            (n.layer, graph.plan.keys[n.place]) for n in before
        ]
        for node, before in graph.token_edges.items()
    }
    assert edges[2, "o.0"] == [(2, "prefill_attention.1")]
    assert edges[2, "decode_attention.0"] == [(1, "decode_attention.1")]
    # The append before it waits for the other half's attention anyway.
    assert (2, "decode_attention.1") not in edges


def test_the_critical_path_of_halves_worked_by_hand():
    plan = _halves()
    graph = _build(plan, num_layers=10)
    durations = dict.fromkeys(plan.keys, 0.0)
    for part in "01":
        durations |= {f"decode_attention.{part}": 3.0, f"up_gate.{part}": 4.0}
    # The pipeline fills with one attention; then products run without a break.
    assert graph.critical_path(durations).length_s == 3 + 10 * (4 + 4)
    durations |= {"up_gate.0": 1.0, "up_gate.1": 1.0}
    path = graph.critical_path(durations)
    # Attention is the longer now, and the last half's products come after it.
    assert path.length_s == 10 * (3 + 3) + 1
    assert graph.name(path.nodes[-1]) == "layer 9 up_gate.1"


def test_the_plain_pass_takes_the_sum_of_all_durations():
    plan = builders.one(DENSE, num_tokens=8)
    graph = _build(plan, num_layers=3)
    durations = {key: float(i) for i, key in enumerate(plan.keys)}
    path = graph.critical_path(durations)
    assert path.length_s == 3 * sum(durations.values())
    assert path.nodes == graph.nodes


@given(random_plans.plans())
def test_before_is_the_transitive_closure_and_reduction_keeps_it(plan):
    graph = _build(plan)
    known = {node: set(graph.waits_for(node)) for node in graph.nodes}
    reduced = {node: set(graph.reduced[node]) for node in graph.nodes}

    def closure(edges):
        found = {}
        for node in graph.nodes:
            found[node] = set().union(edges[node], *(found[first] for first in edges[node]))
        return found

    wanted = closure(known)
    assert closure(reduced) == wanted
    for a, b in itertools.combinations(graph.nodes, 2):
        assert graph.is_before(a, b) == (a in wanted[b])
        assert not graph.is_before(b, a)
    for edges in reduced.values():
        for first in edges:
            assert not any(first in wanted[other] for other in edges)


@given(random_plans.plans())
def test_value_and_cache_edges_with_token_edges_give_the_whole_order(plan):
    graph = _build(plan)
    before = {}
    for node in graph.nodes:
        given_edges = (
            first
            for first, rule in graph.waits_for(node).items()
            if rule in (Rule.VALUE, Rule.CACHE)
        )
        edges = {*given_edges, *graph.token_edges.get(node, ())}
        before[node] = set().union(edges, *(before[first] for first in edges))
    for a, b in itertools.combinations(graph.nodes, 2):
        assert (a in before[b]) == graph.is_before(a, b)


@given(random_plans.plans(max_cells=2))
def test_the_widest_cut_is_the_best_of_all_sets_that_may_run_at_once(plan):
    graph = _build(plan, num_layers=2)
    laned = [n for n in graph.nodes if plan.order[n.place].lane is not None]
    best = 0
    for size in range(1, 4):
        for some in itertools.combinations(laned, size):
            if all(graph.are_unordered(a, b) for a, b in itertools.combinations(some, 2)):
                best = max(best, sum(plan.num_ctas(node.place) for node in some))
    width, nodes = graph.widest_cut()
    assert sum(plan.num_ctas(node.place) for node in nodes) == width
    assert all(graph.are_unordered(a, b) for a, b in itertools.combinations(nodes, 2))
    assert width == best


@given(random_plans.plans())
def test_every_reader_waits_for_every_writer_of_each_of_its_tokens(plan):
    layers = [plan.graph] * 2
    graph = Dependencies(plan, layers)
    for (i, a), (j, b) in itertools.product(enumerate(plan.order), repeat=2):
        shared = set(range(*a.tokens)) & set(range(*b.tokens))
        writes = plan.graph.by_name[a.operation].writes
        reads = plan.graph.by_name[b.operation].reads
        if shared and writes in reads:
            assert graph.is_before(Node(1, i), Node(1, j))
        if shared and writes == operations.Y and operations.X in reads:
            assert graph.is_before(Node(0, i), Node(1, j))
        is_context = a.operation == "append" and b.operation == "prefill_attention"
        if is_context and a.tokens.start < b.tokens.stop:
            assert graph.is_before(Node(0, i), Node(0, j))


def test_an_order_in_which_a_reader_comes_first_is_an_error():
    plan = builders.one(DENSE, num_tokens=8)
    turned = Plan(
        name="turned",
        shape=DENSE,
        num_tokens=8,
        decode_weights=(1,),
        order=plan.order[::-1],
    )
    with pytest.raises(AssertionError, match="waits for a later one"):
        dependencies.Dependencies(turned, [layer_graph(DENSE)])
