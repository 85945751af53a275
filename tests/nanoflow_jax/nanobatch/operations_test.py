"""Layers have the operations of their shape, and dependencies follow from what they read."""

import pytest

from nanoflow_jax.nanobatch import operations
from nanoflow_jax.nanobatch.operations import LayerShape, Resource, layer_graph

DENSE = layer_graph(LayerShape())


def test_a_dense_layer_has_the_operations_of_the_forward_pass_in_order():
    wanted = "norm_kqv rope append decode_attention prefill_attention o norm up_gate down"
    assert list(DENSE.by_name) == wanted.split()
    assert not DENSE.choices


def test_a_sparse_layer_routes_between_norm_and_its_grouped_products():
    names = list(layer_graph(LayerShape(is_sparse=True)).by_name)
    assert names[names.index("norm") :] == ["norm", "route", "up_gate", "down"]


def test_only_attention_needs_more_than_its_own_tokens():
    wide = [op.name for op in DENSE.operations if not op.is_token_wise]
    assert wide == ["decode_attention", "prefill_attention"]
    assert [op.name for op in DENSE.operations if op.sees_earlier] == ["prefill_attention"]


def test_decode_attention_is_bound_by_memory_and_products_by_arithmetic():
    bound = {op.name: op.resource for op in DENSE.operations}
    assert bound["decode_attention"] is Resource.MEMORY
    assert {bound[n] for n in ("norm_kqv", "o", "up_gate", "down")} == {Resource.COMPUTE}


def test_o_reads_what_both_attentions_write():
    attentions = {DENSE.by_name[n].writes for n in ("decode_attention", "prefill_attention")}
    assert attentions == {operations.DECODED, operations.PREFILLED}
    assert attentions < set(DENSE.by_name["o"].reads)


def test_products_and_routing_have_weights():
    graph = layer_graph(LayerShape(is_sparse=True))
    weighted = [op.name for op in graph.operations if op.has_weights]
    assert weighted == ["norm_kqv", "o", "route", "up_gate", "down"]


def test_nothing_of_a_layer_writes_what_enters_it():
    assert DENSE.writers(operations.X) == ()
    assert [op.name for op in DENSE.writers(operations.Y)] == ["down"]


def test_products_over_several_devices_have_two_ways():
    graph = layer_graph(LayerShape(num_devices=8))
    ways = {
        product: {way: [op.name for op in ops] for way, ops in found.items()}
        for product, found in graph.choices.items()
    }
    assert ways == {
        "o": {"reduce": ["o", "o_reduce"], "gather": ["attention_gather", "o_columns", "o_gather"]},
        "down": {
            "reduce": ["down", "down_reduce"],
            "gather": ["hidden_gather", "down_columns", "down_gather"],
        },
    }
    network = {op.name for op in graph.operations if op.resource is Resource.NETWORK}
    assert network == {
        "o_reduce",
        "attention_gather",
        "o_gather",
        "down_reduce",
        "hidden_gather",
        "down_gather",
    }


def test_a_sparse_layer_over_several_devices_always_reduces_its_experts():
    graph = layer_graph(LayerShape(is_sparse=True, num_devices=8))
    assert list(graph.choices) == ["o"]
    assert graph.by_name["down_reduce"].choice is None


def test_a_layer_on_no_device_is_refused():
    with pytest.raises(ValueError, match="num_devices=0 cannot hold a layer; give it at least 1"):
        LayerShape(num_devices=0)
