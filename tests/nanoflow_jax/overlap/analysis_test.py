"""Graphs of two layers by hand: what may run at once in them."""

import itertools

import pytest

from nanoflow_jax.deviceless.program import Graph, Launch, Memory, Program
from nanoflow_jax.nanobatch import builders, operations
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.overlap import analysis

_SHAPE = operations.LayerShape()
_PLAN = builders.halves(_SHAPE, num_tokens=512)
_LAYERS = [operations.layer_graph(_SHAPE)] * 4


def _program(edges=None, *, plan=_PLAN, doubled=()):
    """A node for each nano-operation, in the plan's order, with the plan's edges or others."""
    wanted = Dependencies(plan, _LAYERS)
    number = {node: i for i, node in enumerate(wanted.nodes)}
    nodes = [
        Launch(
            name=f"call.{i}",
            kind="kCustomCall",
            scope=f"jit(forward)/layer_{node.layer}/{plan.keys[node.place]}/entry",
        )
        for i, node in enumerate(wanted.nodes)
    ]
    if edges is None:
        edges = [tuple(number[first] for first in wanted.waits_for(node)) for node in wanted.nodes]
    for i in doubled:
        nodes.append(nodes[i])
        edges = [*edges, (i,)]
    graph = Graph(nodes=tuple(nodes), parents=tuple(edges), num_nodes=len(nodes))
    memory = Memory(argument_bytes=0, output_bytes=0, alias_bytes=0, temp_bytes=0)
    return Program(hlo="", instructions=(), kernels=(), launches=(), graphs=(graph,), memory=memory)


def _chain():
    count = len(Dependencies(_PLAN, _LAYERS).nodes)
    return [(), *((i,) for i in range(count - 1))]


def _analysis(program, plan=_PLAN):
    return analysis.Analysis(program, plan, _LAYERS)


def test_attention_of_one_half_may_run_beside_the_products_of_the_other():
    found = _analysis(_program())
    beside = {
        found.name(b.attention): [found.name(p) for p in b.products]
        for b in found.products_beside_attention()
    }
    assert {"layer 0 o.1", "layer 0 up_gate.1", "layer 0 down.1"} <= set(
        beside["layer 1 decode_attention.0"]
    )
    assert {"layer 1 o.0", "layer 1 up_gate.0", "layer 1 down.0"} <= set(
        beside["layer 1 decode_attention.1"]
    )
    assert found.products_at_once() == ()
    assert found.too_ordered() == ()
    assert found.split_wrongly() == {}
    assert found.most_ctas()[0] == 132


def test_in_a_chain_nothing_may_run_beside_anything():
    found = _analysis(_program(_chain()))
    assert all(not one.products for one in found.products_beside_attention())
    assert found.too_ordered()
    assert found.most_ctas() == (0, ())


def test_a_lost_lane_is_found_as_two_products_at_once():
    dependencies = Dependencies(_PLAN, _LAYERS)
    number = {node: i for i, node in enumerate(dependencies.nodes)}
    edges = [
        tuple(
            number[first]
            for first, rule in dependencies.waits_for(node).items()
            if rule.name in ("VALUE", "CACHE")
        )
        for node in dependencies.nodes
    ]
    found = _analysis(_program(edges))
    assert found.products_at_once()
    assert found.most_ctas()[0] == 2 * 84


def test_a_product_with_two_calls_and_one_without_any_are_found():
    names = [one.scope.split("/")[1:3] for one in _program().graphs[0].nodes]
    place = names.index(["layer_1", "up_gate.0"])
    assert _analysis(_program(doubled=[place])).split_wrongly() == {"layer 1 up_gate.0": 2}


def test_only_calls_and_products_do_the_work_of_a_nano_operation():
    program = _program()
    graph = program.graphs[0]
    for kind, kernel, is_work in (
        ("kCustomKernel", "loop_fusion", False),
        ("kCopy", None, False),
        ("kCustomKernel", "gemm_fusion_dot", True),
        ("kCublasLtMatmul", None, True),
    ):
        scope = "jit(forward)/layer_0/o.0/o"
        launch = Launch(name="one", kind=kind, scope=scope, kernel=kernel)
        one = Graph(nodes=(launch,), parents=((),), num_nodes=1)
        changed = Program(**{**program.__dict__, "graphs": (one,)})
        assert len(_analysis(changed).seen) == is_work
    assert graph.num_nodes == len(graph.nodes)


def test_a_program_without_a_graph_is_refused():
    program = Program(**{**_program().__dict__, "graphs": ()})
    with pytest.raises(ValueError, match="has no CUDA graph"):
        _analysis(program)


def test_two_kernels_that_want_all_sms_at_once_are_found():
    plan = builders.halves(
        _SHAPE, num_tokens=512, device=builders.Device(num_sms=132, attention_ctas=48)
    )
    order = tuple(
        type(nano)(**{**nano.__dict__, "num_ctas": nano.num_ctas and 132}) for nano in plan.order
    )
    wide = type(plan)(
        **{**{f: getattr(plan, f) for f in plan.__dataclass_fields__}, "order": order}
    )
    assert _analysis(_program(plan=wide), wide).most_ctas()[0] == 2 * 132


def test_names_are_those_of_layers_and_keys():
    found = _analysis(_program())
    assert found.name(found.seen[0]).startswith("layer 0 ")
    assert len(set(map(found.name, found.seen))) == len(found.seen)
    assert all(a != b for a, b in itertools.pairwise(found.seen))
