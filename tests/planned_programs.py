"""Compiled steps by hand: a launch for each nano-operation of a plan, with its edges or others."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from nanoflow_jax.deviceless.program import Graph, Kernel, Launch, Memory, Program
from nanoflow_jax.nanobatch import builders, operations
from nanoflow_jax.nanobatch.dependencies import Dependencies, Rule
from nanoflow_jax.nanobatch.pipeline import Node
from nanoflow_jax.nanobatch.plan import Plan

SHAPE = operations.LayerShape()
HALVES = builders.halves(SHAPE, num_tokens=512)
EIGHT = builders.tensor_parallel(
    dataclasses.replace(SHAPE, num_devices=8), num_tokens=512, gathers=False
)
NUM_LAYERS = 4

Edges = Sequence[tuple[int, ...]]


def dependencies(plan: Plan) -> Dependencies:
    """Of `NUM_LAYERS` layers."""
    return Dependencies(plan, [plan.graph] * NUM_LAYERS)


def wanted_edges(plan: Plan, *, rules: Sequence[Rule] = tuple(Rule)) -> Edges:
    """What each nano-operation waits for by some of the rules."""
    found = dependencies(plan)
    number = {node: i for i, node in enumerate(found.nodes)}
    return [
        tuple(number[first] for first, rule in found.waits_for(node).items() if rule in rules)
        for node in found.nodes
    ]


def chain(plan: Plan) -> Edges:
    """One after another."""
    return [(i - 1,) if i else () for i in range(len(dependencies(plan).nodes))]


def program(
    plan: Plan,
    edges: Edges | None = None,
    *,
    doubled: Sequence[str] = (),
    told: int | None = None,
    change: Callable[[Kernel], Kernel] = lambda kernel: kernel,
    **fields: Any,
) -> Program:
    """A program that keeps its cache in place.

    Args:
        plan: Its nano-operations, of `NUM_LAYERS` layers.
        edges: What each waits for; what the plan wants if None.
        doubled: Keys of nano-operations that are called twice.
        told: How many launches the compiler tells of; all if None.
        change: Makes other kernels of those that keep to their share.
        fields: Of the program.
    """
    found = dependencies(plan)
    edges = list(wanted_edges(plan) if edges is None else edges)
    nodes = [_launch(found, node) for node in found.nodes]
    for i, node in enumerate(found.nodes):
        if plan.keys[node.place] in doubled:
            nodes.append(nodes[i])
            edges.append((i,))
    count = len(nodes) if told is None else told
    order = Graph(nodes=tuple(nodes[:count]), parents=tuple(edges[:count]), num_nodes=len(nodes))
    names = sorted({node.kernel for node in nodes if node.kernel})
    whole: dict[str, Any] = {
        "hlo": "",
        "instructions": (),
        "kernels": tuple(change(_kernel(name)) for name in names),
        "launches": order.nodes,
        "graphs": (order,),
        "order": order,
        "memory": Memory(argument_bytes=0, output_bytes=0, alias_bytes=1 << 40, temp_bytes=0),
    }
    return Program(**whole | fields)


def _launch(found: Dependencies, node: Node) -> Launch:
    """Of a kernel of ours, a sum over devices, or a short kernel of XLA's outside lanes."""
    nano = found.plan.order[node.place]
    ctas = found.plan.num_ctas(node.place)
    scope = f"jit(forward)/layer_{node.layer}/{found.plan.keys[node.place]}/entry"
    kind, kernel = "kCustomCall", f"ctas_{ctas}"
    if nano.lane is operations.Resource.NETWORK:
        kind, kernel = "kAllReduce", None
    elif nano.lane is None:
        kind, kernel = "kCustomKernel", None
    return Launch(name="call", kind=kind, scope=scope, kernel=kernel)


def _kernel(name: str) -> Kernel:
    return Kernel(
        name=name,
        is_mosaic=True,
        registers=168,
        spill_bytes=0,
        shared_bytes=229_440,
        grid=(int(name.split("_")[1]), 1, 1),
        num_threads=384,
        ptx="",
    )
