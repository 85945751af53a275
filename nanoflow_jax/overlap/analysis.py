"""What of a compiled step may run at once, beside what its plan wanted.

XLA's graph of a step has a node for each kernel and copy. Those of one nano-operation are known by
their named scopes, `layer_3/up_gate.1`; the one that does its work is its call of a kernel, or
XLA's own product. A kernel of several has the scopes of all of them. The compiler tells of the
beginning of a long graph only; none of it waits for the rest, so what is found there is exact, and
the layers that follow repeat it.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

from nanoflow_jax.deviceless.program import Graph, Launch, Program
from nanoflow_jax.nanobatch import operations
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.pipeline import Node
from nanoflow_jax.nanobatch.plan import Plan

_SCOPE = re.compile(r"layer_(\d+)/(\w+\.\d+)(?:/|$)")
# Calls of our kernels and of libraries, and names of kernels of products that XLA makes itself.
_CALLS = ("kCustomCall", "kGemm", "kCublasLtMatmul", "kCuDnn")
_PRODUCTS = ("gemm_fusion", "triton_gemm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """A decode attention and the products that may run beside it."""

    attention: Node
    products: tuple[Node, ...]


class Analysis:
    """One compiled step.

    Invariant: `_works` has the nodes of the graph that do the work of nano-operations.
    """

    def __init__(
        self, program: Program, plan: Plan, layers: Sequence[operations.LayerGraph]
    ) -> None:
        """Finds the nano-operations in the program.

        Args:
            program: The step's forward.
            plan: That it runs by.
            layers: The graph of each layer.

        Raises:
            ValueError: The program has neither a CUDA graph nor streams.
        """
        if not program.graphs and not program.asides:
            raise ValueError(
                "the program has no CUDA graph and one stream; nothing can be said of its order"
            )
        self.program, self.plan = program, plan
        self.wanted = Dependencies(plan, layers)
        self.graph: Graph = program.order
        self._places = {key: place for place, key in enumerate(plan.keys)}
        self._works: dict[Node, list[int]] = {}
        for index, launch in enumerate(self.graph.nodes):
            if _does_work(launch):
                for node in self._nodes(launch):
                    self._works.setdefault(node, []).append(index)

    def _nodes(self, launch: Launch) -> Iterator[Node]:
        for layer, key in _SCOPE.findall(launch.scope):
            if key in self._places:
                yield Node(int(layer), self._places[key])

    def name(self, node: Node) -> str:
        """Layer and key, for people."""
        return self.wanted.name(node)

    def _operation(self, node: Node) -> str:
        return self.plan.order[node.place].operation

    @functools.cached_property
    def seen(self) -> tuple[Node, ...]:
        """Nano-operations whose work the compiler tells of."""
        return tuple(sorted(self._works, key=lambda node: self._works[node][0]))

    def are_unordered(self, one: Node, other: Node) -> bool:
        """Whether the graph lets all work of two nano-operations run at once, or as one kernel.

        What decode attention does with the results of that kernel is not counted.
        """
        mine, others = self._works[one], self._works[other]
        if not set(mine).isdisjoint(others):
            return True
        return not any(self.graph.are_ordered(first, second) for first in mine for second in others)

    def products_beside_attention(self) -> Iterator[Beside]:
        """Each decode attention that has products of other nano-operations around it.

        The first layer's have none before them.
        """
        for node in self._of("decode_attention"):
            if node.layer == 0:
                continue
            beside = tuple(p for p in self._products() if self.are_unordered(node, p))
            yield Beside(attention=node, products=beside)

    def _of(self, operation: str) -> list[Node]:
        return [node for node in self.seen if self._operation(node) == operation]

    def _products(self) -> list[Node]:
        graph = self.plan.graph.by_name
        return [node for node in self.seen if graph[self._operation(node)].has_weights]

    def products_at_once(self) -> tuple[tuple[Node, Node], ...]:
        """Pairs of products of one lane that the graph does not order."""
        found = self._products()
        return tuple(
            (one, other)
            for i, one in enumerate(found)
            for other in found[i + 1 :]
            if self._lane(one) is not None
            and self._lane(one) is self._lane(other)
            and self.are_unordered(one, other)
        )

    def _lane(self, node: Node) -> Resource | None:
        return self.plan.order[node.place].lane

    def too_ordered(self) -> tuple[tuple[Node, Node], ...]:
        """Pairs of work in different lanes that the plan leaves free and the graph does not."""
        return tuple(
            (one, other)
            for i, one in enumerate(self.seen)
            for other in self.seen[i + 1 :]
            if self._lane(one) is not self._lane(other)
            and self.wanted.are_unordered(one, other)
            and not self.are_unordered(one, other)
        )

    def most_ctas(self) -> tuple[int, tuple[Node, ...]]:
        """The most SMs that two nano-operations in lanes ask for which may run at once."""
        best: tuple[int, tuple[Node, ...]] = (0, ())
        lanes = [node for node in self.seen if self._lane(node) is not None]
        for i, one in enumerate(lanes):
            for other in lanes[i + 1 :]:
                ctas = self.plan.num_ctas(one.place) + self.plan.num_ctas(other.place)
                if ctas > best[0] and self.are_unordered(one, other):
                    best = ctas, (one, other)
        return best

    def split_wrongly(self) -> Mapping[str, int]:
        """Products of whole layers whose number of calls is not one, by name: merged or doubled."""
        whole = {node.layer for node in self.seen if self._operation(node) == "down"}
        wanted = [
            node
            for node in self.wanted.nodes
            if node.layer < max(whole, default=0)
            and self.plan.graph.by_name[self._operation(node)].has_weights
        ]
        counts = {self.name(node): len(self._works.get(node, ())) for node in wanted}
        return {name: count for name, count in counts.items() if count != 1}

    def spilled_bytes(self) -> int:
        """Of all kernels that we wrote."""
        return sum(kernel.spill_bytes for kernel in self.program.mosaic_kernels)


def _does_work(launch: Launch) -> bool:
    return launch.kind in _CALLS or (launch.kernel or "").startswith(_PRODUCTS)
