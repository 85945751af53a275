"""What of a compiled step may run at once, beside what its plan wanted.

The order of a program has a node for each kernel, copy and collective. Those of one nano-operation
are known by their named scopes, `layer_3/up_gate.1`; those that do its work are its calls of
kernels, its collective or XLA's own product, or all of them where XLA makes it of short kernels.
A kernel of several has the scopes of all of them.
The compiler tells of the beginning of a long graph only; none of it waits for the rest, so what is
found there is exact, and the layers that follow repeat it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from nanoflow_jax.cost import timeline
from nanoflow_jax.deviceless.devices import Device, find_device
from nanoflow_jax.deviceless.program import Graph, Launch, Program
from nanoflow_jax.nanobatch import operations
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.pipeline import Node
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.overlap.step import Step

_SCOPE = re.compile(r"layer_(\d+)/(\w+\.\d+)(?:/|$)")
# Calls of our kernels and of libraries, and names of kernels of products that XLA makes itself.
_CALLS = ("kCustomCall", "kGemm", "kCublasLtMatmul", "kCuDnn")
_PRODUCTS = ("gemm_fusion", "triton_gemm")
_COLLECTIVES = ("kAllReduce", "kAllGather", "kReduceScatter", "kAllToAll", "kCollectivePermute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """A nano-operation and others of other tokens that may run beside it."""

    node: Node
    others: tuple[Node, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """The longest chain of waits among the nano-operations that the compiler tells of.

    Attributes:
        fraction: Of the sum of their durations.
        wanted_fraction: The same if only that was waited for that the plan wants.
    """

    fraction: float
    wanted_fraction: float


class Analysis:
    """One compiled step.

    Invariant: `_works` has the nodes of the order that do the work of nano-operations.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        layers: Sequence[operations.LayerGraph],
        device: Device,
    ) -> None:
        """Finds the nano-operations in the program.

        Args:
            program: The step's forward.
            plan: That it runs by.
            layers: The graph of each layer.
            device: That it is compiled for.
        """
        self.program, self.plan, self.device = program, plan, device
        self.wanted = Dependencies(plan, layers)
        self.graph: Graph = program.order
        self._places = {key: place for place, key in enumerate(plan.keys)}
        self._works: dict[Node, list[int]] = {}
        for index, launch in enumerate(self.graph.nodes):
            for node in self._nodes(launch):
                self._works.setdefault(node, []).append(index)
        # Those of which something else than short kernels of XLA's was found.
        self._calls = set()
        for node, found in self._works.items():
            if calls := self._calls_among(found):
                self._works[node] = calls
                self._calls.add(node)

    def _calls_among(self, found: Sequence[int]) -> list[int]:
        launches = self.graph.nodes
        calls = [i for i in found if launches[i].kind in _CALLS]
        if not calls:
            calls = [i for i in found if (launches[i].kernel or "").startswith(_PRODUCTS)]
        return sorted(calls + [i for i in found if launches[i].kind in _COLLECTIVES])

    def _nodes(self, launch: Launch) -> Iterator[Node]:
        for layer, key in _SCOPE.findall(launch.scope):
            if key in self._places:
                yield Node(int(layer), self._places[key])

    def name(self, node: Node) -> str:
        """Layer and key, for people."""
        return self.wanted.name(node)

    def operation(self, node: Node) -> operations.Operation:
        """What a nano-operation does."""
        return self.plan.graph.by_name[self.plan.order[node.place].operation]

    @functools.cached_property
    def seen(self) -> tuple[Node, ...]:
        """Nano-operations that the compiler tells of, in order of issue."""
        return tuple(node for node in self.wanted.nodes if node in self._works)

    def are_unordered(self, one: Node, other: Node) -> bool:
        """Whether the program lets all work of two nano-operations run at once, or as one kernel.

        What decode attention does with the results of that kernel is not counted.
        """
        mine, others = self._works[one], self._works[other]
        if not set(mine).isdisjoint(others):
            return True
        return not any(self.graph.are_ordered(first, second) for first in mine for second in others)

    @property
    def collectives(self) -> tuple[str, ...]:
        """Operations of the plan that devices do together."""
        names = dict.fromkeys(nano.operation for nano in self.plan.order)
        of_network = Resource.NETWORK
        return tuple(n for n in names if self.plan.graph.by_name[n].resource is of_network)

    def beside(self, *names: str) -> Iterator[Beside]:
        """Nano-operations of these operations, with what is to run beside them of other tokens.

        Beside attention that is products and, over several devices, sums; beside sums it is
        products and prefill attention, which computes too. Where none is found, nano-operations
        are left out if the plan wants some of which the compiler does not tell; or none, because
        nothing comes after their layer, or because the pipeline still fills: the turn lacks what
        belongs to layers before the first.
        """
        for node in self.seen:
            if self.operation(node).name not in names:
                continue
            others = [other for other in self.wanted.nodes if self._are_partners(node, other)]
            told = [other for other in others if other in self._works]
            found = tuple(other for other in told if self.are_unordered(node, other))
            wanted = [other for other in others if self.wanted.are_unordered(node, other)]
            is_at_end = self._is_filling(node) or node.layer == self.wanted.nodes[-1].layer
            is_missing = any(other not in self._works for other in wanted)
            if found or not (is_missing or (is_at_end and not wanted)):
                yield Beside(node=node, others=found)

    def _is_filling(self, node: Node) -> bool:
        """Whether its turn has parts of some layers only, as the first layer has just begun."""
        return node.layer < self.plan.order[node.place].shift

    def _are_partners(self, node: Node, other: Node) -> bool:
        if self._share_tokens(node, other):
            return False
        if self._is_network(node):
            return self.operation(other).resource is Resource.COMPUTE
        return self.operation(other).has_weights or self._is_network(other)

    def _share_tokens(self, one: Node, other: Node) -> bool:
        order = self.plan.order
        return order[one.place].tokens.overlaps(order[other.place].tokens)

    def products_at_once(self) -> tuple[tuple[Node, Node], ...]:
        """Pairs of products that the program does not order."""
        found = [node for node in self.seen if self.operation(node).has_weights]
        return tuple(
            (one, other)
            for i, one in enumerate(found)
            for other in found[i + 1 :]
            if self.are_unordered(one, other)
        )

    def _lane(self, node: Node) -> Resource | None:
        return self.plan.order[node.place].lane

    def too_ordered(self) -> tuple[tuple[Node, Node], ...]:
        """Pairs of work in different lanes that the plan leaves free and the program does not."""
        laned = [node for node in self.seen if self._lane(node) is not None]
        return tuple(
            (one, other)
            for i, one in enumerate(laned)
            for other in laned[i + 1 :]
            if self._lane(one) is not self._lane(other)
            and self.wanted.are_unordered(one, other)
            and not self.are_unordered(one, other)
        )

    def chain(self, durations_s: Mapping[str, float]) -> Chain:
        """The longest chain of nano-operations; embedding, head and the like take no time in it.

        Args:
            durations_s: Of each nano-operation, by its key in the plan.
        """
        seconds = [0.0] * len(self.graph.nodes)
        total = 0.0
        for node, works in self._works.items():
            duration = durations_s[self.plan.keys[node.place]]
            total += duration
            for index in works:
                seconds[index] = duration / len(works)
        ends: list[float] = []
        for parents, duration in zip(self.graph.parents, seconds, strict=True):
            ends.append(duration + max((ends[parent] for parent in parents), default=0.0))
        spans = timeline.predict(self.wanted, durations_s)
        wanted = (
            span.end_s
            for node, span in zip(self.wanted.nodes, spans, strict=True)
            if node in self._works
        )
        return Chain(
            fraction=max(ends, default=0.0) / total,
            wanted_fraction=max(wanted, default=0.0) / total,
        )

    def most_ctas(self) -> tuple[int, tuple[Node, ...]]:
        """The most CTAs of calls that may run at once, and the nano-operations that they are of.

        The many small CTAs of XLA's short kernels are not counted.
        """
        nodes = [node for node in self.seen if node in self._calls]
        ctas = {node: self._num_ctas(node) for node in nodes}

        def widest(allowed: list[Node]) -> tuple[int, tuple[Node, ...]]:
            best: tuple[int, tuple[Node, ...]] = (0, ())
            for i, node in enumerate(allowed):
                beside = [other for other in allowed[i + 1 :] if self.are_unordered(node, other)]
                width, others = widest(beside)
                if ctas[node] + width > best[0]:
                    best = ctas[node] + width, (node, *others)
            return best

        return widest(nodes)

    def _num_ctas(self, node: Node) -> int:
        """CTAs of its largest kernel.

        What is no kernel keeps to its share or takes all; in a kernel of several it has its share.
        """
        return max(
            self.plan.num_ctas(node.place)
            if launch.kernel is None or len(list(self._nodes(launch))) > 1
            else math.prod(self.program.kernel(launch.kernel).grid)
            for launch in (self.graph.nodes[i] for i in self._works[node])
        )

    def called_wrongly(self) -> Mapping[str, int]:
        """Products and collectives whose number of calls is not one, by name: merged or doubled.

        Of layers of which the compiler tells all.
        """
        layers = {node.layer for node in self.seen if self.operation(node).name == "down"}
        is_cut = self.graph.num_nodes > len(self.graph.nodes)
        end = max(layers, default=-1) + (0 if is_cut else 1)
        counts = {
            self.name(node): self._num_calls(node)
            for node in self.wanted.nodes
            if node.layer < end and (self.operation(node).has_weights or self._is_network(node))
        }
        return {name: count for name, count in counts.items() if count != 1}

    def _num_calls(self, node: Node) -> int:
        """A product that sums over devices by itself is one call all the same."""
        found = (self.graph.nodes[i] for i in self._works.get(node, ()) if node in self._calls)
        return sum((one.kind in _COLLECTIVES) is self._is_network(node) for one in found)

    def _is_network(self, node: Node) -> bool:
        return self.operation(node).resource is Resource.NETWORK

    def too_large(self) -> tuple[str, ...]:
        """Names of our kernels of which an SM cannot hold a CTA."""
        kernels = self.program.mosaic_kernels
        return tuple(kernel.name for kernel in kernels if not self.device.holds(kernel))

    def spilled_bytes(self) -> int:
        """Of all kernels that we wrote."""
        return sum(kernel.spill_bytes for kernel in self.program.mosaic_kernels)


def of_step(program: Program, step: Step) -> Analysis:
    """The analysis of a step that was compiled."""
    shapes = (
        dataclasses.replace(step.plan.shape, is_sparse=step.model.is_sparse(layer))
        for layer in range(step.model.num_layers)
    )
    layers = [operations.layer_graph(shape) for shape in shapes]
    return Analysis(program, step.plan, layers, find_device(step.device))
