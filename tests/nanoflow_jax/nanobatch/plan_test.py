"""Plans name their parts and their cells; the order of issue of all layers follows."""

from nanoflow_jax.nanobatch import builders, pipeline
from nanoflow_jax.nanobatch.operations import LayerShape, layer_graph
from nanoflow_jax.nanobatch.plan import NanoOperation, Plan, TokenRange, cut_at, find_cells


def _plan(*order):
    return Plan(name="by hand", shape=LayerShape(), num_tokens=8, decode_weights=(1,), order=order)


def _nano(operation, start, stop, shift=0):
    return NanoOperation(operation=operation, tokens=TokenRange(start, stop), shift=shift)


def test_ranges_overlap_where_a_token_lies_in_both():
    assert TokenRange(0, 4).overlaps(TokenRange(3, 5))
    assert not TokenRange(0, 4).overlaps(TokenRange(4, 5))
    assert TokenRange(2, 5).length == 3


def test_cells_are_cut_at_every_border_of_every_operation():
    ranges = [TokenRange(0, 6), TokenRange(6, 10), TokenRange(4, 10), TokenRange(0, 4)]
    assert find_cells(ranges, num_tokens=12) == cut_at([0, 4, 6, 10, 12])


def test_keys_count_an_operations_ranges_from_the_first_token_on_whatever_the_order():
    plan = _plan(_nano("o", 4, 8), _nano("norm", 0, 8), _nano("o", 0, 4))
    assert plan.keys == ("o.1", "norm.0", "o.0")
    assert plan.by_operation == {"o": (2, 0), "norm": (1,)}


def test_a_plan_changes_bits_where_it_cuts_what_adds_up():
    whole = [_nano(name, 0, 8) for name in ("norm_kqv", "decode_attention", "o")]
    assert not _plan(*whole).changes_bits
    assert not _plan(*whole, _nano("norm", 0, 4), _nano("rope", 4, 8)).changes_bits
    assert _plan(*whole[:2], _nano("o", 0, 4), _nano("o", 4, 8)).changes_bits
    assert _plan(*whole[::2], _nano("decode_attention", 0, 4)).changes_bits


def test_a_plan_changes_bits_where_a_product_takes_another_way_than_in_the_plain_pass():
    shape = LayerShape(num_devices=2)
    assert not builders.one(shape, num_tokens=8).changes_bits
    order = (_nano("attention_gather", 0, 8), _nano("o_columns", 0, 8))
    gathers = Plan(name="by hand", shape=shape, num_tokens=8, decode_weights=(1,), order=order)
    assert gathers.changes_bits


def test_a_turn_issues_parts_of_several_layers():
    plan = _plan(_nano("o", 0, 4), _nano("norm", 0, 4, shift=2), _nano("norm", 4, 8, shift=1))
    issued = pipeline.issue_order(plan, [plan.graph] * 3)
    names = [(node.layer, plan.keys[node.place]) for node in issued]
    assert names == [
        (0, "norm.0"),
        (1, "norm.0"),
        (0, "norm.1"),
        (0, "o.0"),
        (2, "norm.0"),
        (1, "norm.1"),
        (1, "o.0"),
        (2, "norm.1"),
        (2, "o.0"),
    ]


def test_a_dense_layer_of_a_sparse_model_leaves_out_what_it_does_not_have():
    plan = builders.one(LayerShape(is_sparse=True), num_tokens=8)
    dense, sparse = layer_graph(LayerShape()), layer_graph(LayerShape(is_sparse=True))
    issued = pipeline.issue_order(plan, [dense, sparse])
    routed = [node.layer for node in issued if plan.order[node.place].operation == "route"]
    assert routed == [1]
    assert len(issued) == 2 * len(plan.order) - 1
