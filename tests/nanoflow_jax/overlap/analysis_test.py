"""Programs by hand: what may run at once in them."""

import dataclasses

import planned_programs
import pytest
from planned_programs import EIGHT, HALVES, NUM_LAYERS

from nanoflow_jax.deviceless.devices import find_device
from nanoflow_jax.deviceless.program import Graph, Launch
from nanoflow_jax.nanobatch.dependencies import Rule
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.overlap import analysis


def _analysis(program, plan=HALVES):
    return analysis.Analysis(program, plan, [plan.graph] * NUM_LAYERS, find_device("H200"))


def _beside(found, *names):
    return {found.name(b.node): [found.name(p) for p in b.others] for b in found.beside(*names)}


def _seconds(plan, **longer):
    """A second for each nano-operation, or what is said."""
    return {key: longer.get(key.split(".")[0], 1.0) for key in plan.keys}


def test_attention_of_one_half_may_run_beside_the_products_of_the_other():
    found = _analysis(planned_programs.program(HALVES))
    beside = _beside(found, "decode_attention")
    assert len(beside) == 2 * NUM_LAYERS
    assert beside["layer 1 decode_attention.0"] == [
        "layer 0 o.1",
        "layer 0 up_gate.1",
        "layer 0 down.1",
        "layer 1 norm_kqv.1",
    ]
    assert beside["layer 3 decode_attention.1"] == [
        "layer 3 o.0",
        "layer 3 up_gate.0",
        "layer 3 down.0",
    ]
    assert found.products_at_once() == ()
    assert found.too_ordered() == ()
    assert found.called_wrongly() == {}
    assert found.most_ctas()[0] == 132


def test_in_a_chain_nothing_may_run_beside_anything():
    found = _analysis(planned_programs.program(HALVES, planned_programs.chain(HALVES)))
    assert not any(_beside(found, "decode_attention").values())
    assert found.too_ordered()
    assert found.most_ctas()[0] == 100
    assert len(found.most_ctas()[1]) == 1


def _fills_alone(plan):
    """The plan, in which the second half waits for the first one's attention.

    So nothing is beside that of the first layer, where the pipeline fills; later the rest of the
    layer before is.
    """
    order = tuple(
        dataclasses.replace(nano, after=("decode_attention.0",)) if key == "norm_kqv.1" else nano
        for key, nano in zip(plan.keys, plan.order, strict=True)
    )
    return dataclasses.replace(plan, order=order)


def test_attention_that_fills_the_pipeline_may_be_alone_if_the_plan_has_nothing_beside_it():
    plan = _fills_alone(HALVES)
    found = _beside(_analysis(planned_programs.program(plan), plan), "decode_attention")
    assert "layer 0 decode_attention.0" not in found
    assert len(found) == 2 * NUM_LAYERS - 1
    assert all(found.values())


def test_a_chain_is_found_in_every_other_turn_of_such_a_plan():
    plan = _fills_alone(HALVES)
    program = planned_programs.program(plan, planned_programs.chain(plan))
    found = _beside(_analysis(program, plan), "decode_attention")
    assert len(found) == 2 * NUM_LAYERS - 1
    assert not any(found.values())


def test_attention_that_is_alone_in_full_turns_too_is_not_left_out():
    """All else waits for it, and it for all else."""
    attention = [key for key in HALVES.keys if key.startswith("decode_attention")]
    others = [key for key in HALVES.keys if key not in attention]
    order = tuple(
        dataclasses.replace(nano, after=tuple(others if key in attention else attention))
        for key, nano in zip(HALVES.keys, HALVES.order, strict=True)
    )
    plan = dataclasses.replace(HALVES, order=order)
    found = _beside(_analysis(planned_programs.program(plan), plan), "decode_attention")
    assert found == {f"layer {i} {key}": [] for i in (1, 2) for key in attention}


def test_a_lost_lane_is_found_as_two_products_at_once():
    edges = planned_programs.wanted_edges(HALVES, rules=(Rule.VALUE, Rule.CACHE))
    found = _analysis(planned_programs.program(HALVES, edges))
    pairs = {tuple(map(found.name, pair)) for pair in found.products_at_once()}
    assert ("layer 0 norm_kqv.0", "layer 0 norm_kqv.1") in pairs
    assert found.most_ctas()[0] == 2 * 100 + 2 * 32


def test_products_outside_lanes_are_found_at_once_too():
    order = tuple(
        dataclasses.replace(nano, lane=None, num_ctas=None) if nano.operation == "o" else nano
        for nano in HALVES.order
    )
    free = dataclasses.replace(HALVES, order=order)
    found = _analysis(planned_programs.program(free), free)
    assert any("o." in found.name(node) for pair in found.products_at_once() for node in pair)


def test_sums_over_devices_may_run_beside_products_of_other_tokens():
    found = _analysis(planned_programs.program(EIGHT), EIGHT)
    beside = _beside(found, "o_reduce", "down_reduce")
    assert beside["layer 0 o_reduce.1"][:2] == ["layer 0 up_gate.0", "layer 0 down.0"]
    assert "layer 1 norm_kqv.1" in beside["layer 0 down_reduce.1"]
    # Nothing comes after the last two sums of the last layer.
    assert "layer 3 down_reduce.1" not in beside
    assert "layer 3 down_reduce.0" in beside
    sums = ["down_reduce.0", "down_reduce.1", "down_reduce.2", "o_reduce.0", "o_reduce.1"]
    assert sorted(key for key in EIGHT.keys if key.endswith("reduce", 0, -2)) == sums
    chained = planned_programs.program(EIGHT, planned_programs.chain(EIGHT))
    assert not any(_beside(_analysis(chained, EIGHT), "o_reduce").values())


def test_attention_counts_sums_over_devices_beside_it_and_sums_do_not():
    found = _analysis(planned_programs.program(EIGHT), EIGHT)
    assert any(
        "reduce" in name for names in _beside(found, "decode_attention").values() for name in names
    )
    assert not any(
        "reduce" in name for names in _beside(found, "down_reduce").values() for name in names
    )


def test_a_combined_sum_is_missed_where_it_was_and_counted_where_it_is():
    program = planned_programs.program(EIGHT)
    nodes = [
        dataclasses.replace(node, scope=node.scope.replace("down_reduce.2", "down_reduce.1"))
        for node in program.order.nodes
    ]
    combined = dataclasses.replace(
        program, order=dataclasses.replace(program.order, nodes=tuple(nodes))
    )
    found = _analysis(combined, EIGHT).called_wrongly()
    assert found["layer 0 down_reduce.1"] == 2
    assert found["layer 0 down_reduce.2"] == 0


def test_what_the_compiler_does_not_tell_of_is_not_missed():
    count = next(
        i
        for i, node in enumerate(planned_programs.dependencies(HALVES).nodes)
        if node.layer == 2 and HALVES.keys[node.place] == "o.0"
    )
    found = _analysis(planned_programs.program(HALVES, told=count))
    beside = _beside(found, "decode_attention")
    assert all(beside.values())
    assert "layer 2 decode_attention.1" not in beside
    assert "layer 1 decode_attention.1" in beside
    assert found.called_wrongly() == {}


def test_a_product_with_two_calls_is_found():
    found = _analysis(planned_programs.program(HALVES, doubled=["up_gate.0"]))
    assert found.called_wrongly() == {f"layer {i} up_gate.0": 2 for i in range(NUM_LAYERS)}


@pytest.mark.parametrize(
    ("kind", "kernel", "is_call"),
    [
        ("kCustomKernel", "loop_fusion", False),
        ("kCopy", None, False),
        ("kCustomKernel", "gemm_fusion_dot", True),
        ("kCublasLtMatmul", None, True),
    ],
)
def test_only_calls_and_products_do_the_work_of_a_product(kind, kernel, is_call):
    scope = "jit(forward)/layer_0/o.0/o"
    launch = Launch(name="one", kind=kind, scope=scope, kernel=kernel)
    order = Graph(nodes=(launch,), parents=((),), num_nodes=1)
    done = dataclasses.replace(launch, scope="jit(forward)/layer_0/down.0", kind="kCustomCall")
    both = Graph(nodes=(launch, done), parents=((), (0,)), num_nodes=2)
    assert _analysis(planned_programs.program(HALVES, order=order)).seen
    missing = _analysis(planned_programs.program(HALVES, order=both)).called_wrongly()
    assert ("layer 0 o.0" in missing) is not is_call


def test_the_longest_chain_of_a_chain_is_all_of_it():
    found = _analysis(planned_programs.program(HALVES, planned_programs.chain(HALVES)))
    chain = found.chain(_seconds(HALVES, decode_attention=8.0))
    assert chain.fraction == pytest.approx(1.0)
    assert chain.wanted_fraction < 0.8


def test_the_longest_chain_is_as_the_plan_wants_it_where_nothing_else_is_waited_for():
    seconds = _seconds(HALVES, decode_attention=8.0)
    chain = _analysis(planned_programs.program(HALVES)).chain(seconds)
    assert chain.fraction == pytest.approx(chain.wanted_fraction)


def test_three_kernels_at_once_are_summed_up():
    def widen(kernel):
        return dataclasses.replace(kernel, grid=(kernel.grid[0] + 8 * (kernel.name == "ctas_32"),))

    ctas, nodes = _analysis(planned_programs.program(EIGHT, change=widen), EIGHT).most_ctas()
    assert ctas == 84 + 40 + 16
    assert {EIGHT.order[node.place].lane for node in nodes} == set(Resource)


def test_kernels_that_no_sm_can_hold_are_found():
    def widen(kernel):
        return dataclasses.replace(kernel, registers=176)

    assert _analysis(planned_programs.program(HALVES)).too_large() == ()
    wide = planned_programs.program(HALVES, change=widen)
    assert _analysis(wide).too_large() == ("ctas_100", "ctas_32")
