"""Which nano-operations run in one kernel, side by side, each on its share of the SMs.

An attention takes with it what the plan lets run beside it: kernels of other lanes that wait for
nothing of it, nor it for them. A kernel of several begins when all of them could and ends with the
last of them, so that each group is one node of a smaller graph, in which others must still be free
of each other to become a group.

    memory   decode A, layer 1                    [decode A, layer 1  ]
    compute  o B, 0 | up_gate B, 0 | down B, 0    [up_gate B, layer 0 ]  between o B and down B
"""

from collections.abc import Callable, Iterable, Iterator

from nanoflow_jax.nanobatch import operations
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.nanobatch.pipeline import Node

Group = tuple[Node, ...]
# How much a kernel has to do, in any unit; None for what is no kernel that could run beside others.
WorkOf = Callable[[Node], float | None]


def group(graph: Dependencies, work_of: WorkOf) -> tuple[Group, ...]:
    """All nano-operations in groups, in an order in which each group comes after what it waits for.

    A group of more than one has at most one decode attention, one prefill attention and one
    product, each of another lane. Decode attention chooses first, in order of issue, then what is
    left of prefill attention; each takes the kernel with the most work, and of equal ones the one
    that is issued next to it.

    Args:
        graph: What waits for what.
        work_of: What each has to do.
    """
    merged = _Merged(graph)
    for value in (operations.DECODED, operations.PREFILLED):
        for node in graph.nodes:
            if merged.operation(node).writes == value:
                while (other := merged.try_find(node, work_of)) is not None:
                    merged.merge(node, other)
    return tuple(merged.in_order())


class _Merged:
    """The graph in which groups are nodes.

    Invariant: of each node, `_before` has everything that must end before its group begins; it is
    the same for all nodes of a group, and none of them is in it.
    """

    def __init__(self, graph: Dependencies) -> None:
        self._graph = graph
        self._number = {node: i for i, node in enumerate(graph.nodes)}
        self._groups = [[node] for node in graph.nodes]
        self._before = list(graph.ancestors)

    def operation(self, node: Node) -> operations.Operation:
        return self._graph.operation(node)

    def try_find(self, node: Node, work_of: WorkOf) -> Node | None:
        """The best of what may join the group of an attention; None if nothing may."""
        mine = self._groups[self._number[node]]
        has_joined = mine[0] != node
        if has_joined or self._lane(node) is None or work_of(node) is None:
            return None
        found = [
            (-work, abs(self._number[node] - self._number[other]), other)
            for other in self._graph.nodes
            if self._fits(other, mine) and (work := work_of(other)) is not None
        ]
        return min(found)[-1] if found else None

    def _fits(self, other: Node, mine: list[Node]) -> bool:
        i, j = self._number[other], self._number[mine[0]]
        return (
            len(self._groups[i]) == 1
            and self._lane(other) not in (None, *map(self._lane, mine))
            and self._kind(other) not in (None, *map(self._kind, mine))
            and not (self._before[i] >> j | self._before[j] >> i) & 1
        )

    def _lane(self, node: Node) -> operations.Resource | None:
        return self._graph.plan.order[node.place].lane

    def _kind(self, node: Node) -> str | None:
        """What only one of a group may be; None for what joins none."""
        op = self.operation(node)
        if op.has_weights:
            return "product"
        return op.name if op.writes in (operations.DECODED, operations.PREFILLED) else None

    def merge(self, node: Node, other: Node) -> None:
        """Makes one group of two, which are free of each other."""
        members = [*self._groups[self._number[node]], other]
        numbers = [self._number[member] for member in members]
        own = _bits(numbers)
        before = self._before[numbers[0]] | self._before[numbers[-1]]
        for i, known in enumerate(self._before):
            if known & own:
                self._before[i] = known | before | own
        for i in numbers:
            self._before[i] = before
            self._groups[i] = members

    def in_order(self) -> Iterator[Group]:
        """Groups as their first node was issued, later where they wait for others."""
        done = 0
        members = [[self._number[node] for node in one] for one in self._groups]
        waiting = [i for i, numbers in enumerate(members) if i == min(numbers)]
        while waiting:
            free = next(i for i in waiting if not self._before[i] & ~done)
            waiting.remove(free)
            done |= _bits(members[free])
            yield tuple(self._groups[free])


def _bits(numbers: Iterable[int]) -> int:
    """A set of numbers as the bits of one."""
    found = 0
    for number in numbers:
        found |= 1 << number
    return found
