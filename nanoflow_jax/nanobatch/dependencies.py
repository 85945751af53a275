"""Which nano-operation must wait for which, over all layers of a model.

Four rules make one wait for another:

VALUE  It reads a value that the other writes, and their token ranges overlap. Layer l + 1 reads
       what layer l leaves in the same way. Attention reads the cache where its own tokens were
       appended; prefill attention also wherever a token before its own was, since a request's
       tokens lie in the dense batch in the order of their positions (see `dealing`), so any
       earlier one may belong to the same request.
CACHE  The cache of a layer is one buffer that is changed in place: an append waits for what was
       issued before it and reads or changes that cache, and attention waits for every append
       issued before it, whether it needs that append's tokens or not.
LANE   The other is the one before it in its lane.
AFTER  The plan says so.
"""

import dataclasses
import enum
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nanoflow_jax.nanobatch import operations
from nanoflow_jax.nanobatch.pipeline import Node, issue_order
from nanoflow_jax.nanobatch.plan import Plan, TokenRange


class Rule(enum.Enum):
    """Why one nano-operation waits for another; see the module."""

    VALUE = "value"
    CACHE = "cache"
    LANE = "lane"
    AFTER = "after"


def value_dependencies(
    plan: Plan, layers: Sequence[operations.LayerGraph]
) -> Iterator[tuple[Node, Node]]:
    """Pairs (writer, reader) of rule VALUE, whatever the order of issue is."""
    for layer, graph in enumerate(layers):
        for op in graph.operations:
            for place in plan.by_operation.get(op.name, ()):
                for value in op.reads:
                    for writer in _writers(plan, layers, layer, op, place, value):
                        yield writer, Node(layer, place)


def _writers(
    plan: Plan,
    layers: Sequence[operations.LayerGraph],
    layer: int,
    reader: operations.Operation,
    place: int,
    value: operations.Value,
) -> Iterator[Node]:
    tokens = plan.order[place].tokens
    if value == operations.X:
        if layer == 0:
            return
        layer, value = layer - 1, operations.Y
    elif value == operations.CACHE and reader.sees_earlier:
        tokens = TokenRange(0, tokens.stop)
    for op in layers[layer].writers(value):
        for writer in plan.by_operation.get(op.name, ()):
            if tokens.overlaps(plan.order[writer].tokens):
                yield Node(layer, writer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalPath:
    """The longest chain of nano-operations that wait for each other.

    Attributes:
        length_s: Its duration.
        nodes: The chain, first to last.
    """

    length_s: float
    nodes: tuple[Node, ...]


class Dependencies:
    """The nano-operations of a model in order of issue, and what each waits for.

    Invariant: whatever a node waits for was issued before it.
    """

    def __init__(self, plan: Plan, layers: Sequence[operations.LayerGraph]) -> None:
        """Finds all dependencies.

        Args:
            plan: A plan whose order of issue respects rule VALUE.
            layers: The graph of each layer.
        """
        self.plan = plan
        self.nodes = issue_order(plan, layers)
        self._layers = layers
        self._number = {node: i for i, node in enumerate(self.nodes)}
        self._rules: list[dict[int, Rule]] = [{} for _ in self.nodes]
        self._add(Rule.VALUE, value_dependencies(plan, layers))
        self._add(Rule.CACHE, self._cache_hazards())
        # An edge keeps the first rule that asks for it: what values and the cache order anyway
        # needs nothing from an executor.
        self._add(Rule.LANE, self._lane_order())
        self._add(Rule.AFTER, self._wanted_order())
        self.check()

    def _add(self, rule: Rule, pairs: Iterable[tuple[Node, Node]]) -> None:
        for first, second in pairs:
            self._rules[self._number[second]].setdefault(self._number[first], rule)

    def operation(self, node: Node) -> operations.Operation:
        """What a node does."""
        name = self.plan.order[node.place].operation
        return self._layers[node.layer].by_name[name]

    def _cache_hazards(self) -> Iterator[tuple[Node, Node]]:
        readers: dict[int, list[Node]] = {}
        writers: dict[int, list[Node]] = {}
        for node in self.nodes:
            op, layer = self.operation(node), node.layer
            reads, writes = operations.CACHE in op.reads, op.writes == operations.CACHE
            if reads or writes:
                yield from ((writer, node) for writer in writers.get(layer, ()))
            if writes:
                yield from ((reader, node) for reader in readers.get(layer, ()))
                writers.setdefault(layer, []).append(node)
            if reads:
                readers.setdefault(layer, []).append(node)

    def _lane_order(self) -> Iterator[tuple[Node, Node]]:
        last: dict[operations.Resource, Node] = {}
        for node in self.nodes:
            lane = self.plan.order[node.place].lane
            if lane is not None:
                if lane in last:
                    yield last[lane], node
                last[lane] = node

    def _wanted_order(self) -> Iterator[tuple[Node, Node]]:
        place_of = {key: place for place, key in enumerate(self.plan.keys)}
        last: dict[int, Node] = {}
        for node in self.nodes:
            for key in self.plan.order[node.place].after:
                if place_of[key] in last:
                    yield last[place_of[key]], node
            last[node.place] = node

    def name(self, node: Node) -> str:
        """Layer and key, for people."""
        return f"layer {node.layer} {self.plan.keys[node.place]}"

    def waits_for(self, node: Node) -> dict[Node, Rule]:
        """What a node waits for directly, and why; some of it may follow from the rest."""
        found = self._rules[self._number[node]]
        return {self.nodes[i]: rule for i, rule in sorted(found.items())}

    @functools.cached_property
    def waits(self) -> tuple[tuple[int, ...], ...]:
        """What each node waits for directly, all of them by their number in `nodes`."""
        return tuple(tuple(sorted(rules)) for rules in self._rules)

    @functools.cached_property
    def ancestors(self) -> list[int]:
        """For each node a set, in bits by number in `nodes`, of those that run before it."""
        found: list[int] = []
        for rules in self._rules:
            before = 0
            for i in rules:
                before |= found[i] | 1 << i
            found.append(before)
        return found

    def is_before(self, first: Node, second: Node) -> bool:
        """Whether `second` waits for `first`, directly or not."""
        return bool(self.ancestors[self._number[second]] >> self._number[first] & 1)

    def are_unordered(self, one: Node, other: Node) -> bool:
        """Whether both may run at once."""
        return one != other and not self.is_before(one, other) and not self.is_before(other, one)

    def unordered_with(self, node: Node) -> tuple[Node, ...]:
        """All that may run at once with a node, in order of issue."""
        return tuple(other for other in self.nodes if self.are_unordered(node, other))

    @functools.cached_property
    def reduced(self) -> dict[Node, dict[Node, Rule]]:
        """What each node waits for, without what follows from the rest (transitive reduction)."""
        return {
            node: {
                self.nodes[i]: rule
                for i, rule in sorted(rules.items())
                if not any(self.ancestors[j] >> i & 1 for j in rules)
            }
            for node, rules in zip(self.nodes, self._rules, strict=True)
        }

    @functools.cached_property
    def token_edges(self) -> dict[Node, tuple[Node, ...]]:
        """Whose output each node needs as an operand that it does not read.

        These are the edges of lanes and of `after` that no value and no other edge implies. With
        them, and nothing else, XLA's concurrent graph keeps the order that the plan wants.
        """
        found = {}
        for node, edges in self.reduced.items():
            extra = (first for first, rule in edges.items() if rule in (Rule.LANE, Rule.AFTER))
            found[node] = tuple(extra)
        return {node: extra for node, extra in found.items() if extra}

    def critical_path(self, durations_s: Mapping[str, float]) -> CriticalPath:
        """The longest chain.

        Args:
            durations_s: Of each nano-operation, by its key in the plan.
        """
        ends: list[float] = []
        previous: list[int | None] = []
        for node, rules in zip(self.nodes, self._rules, strict=True):
            last = max(rules, key=lambda i: ends[i], default=None)
            ends.append(
                durations_s[self.plan.keys[node.place]] + (0 if last is None else ends[last])
            )
            previous.append(last)
        at: int | None = max(range(len(ends)), key=lambda i: ends[i])
        assert at is not None
        length_s, chain = ends[at], []
        while at is not None:
            chain.append(self.nodes[at])
            at = previous[at]
        return CriticalPath(length_s=length_s, nodes=tuple(reversed(chain)))

    def widest_cut(self) -> tuple[int, tuple[Node, ...]]:
        """The most SMs that nano-operations in lanes may ask for at once, and which of them do."""
        by_lane: dict[operations.Resource, int] = {}
        for i, node in enumerate(self.nodes):
            lane = self.plan.order[node.place].lane
            if lane is not None:
                by_lane[lane] = by_lane.get(lane, 0) | 1 << i
        everyone = (1 << len(self.nodes)) - 1
        return self._widest(tuple(by_lane.values()), everyone)

    def _widest(self, lanes: tuple[int, ...], allowed: int) -> tuple[int, tuple[Node, ...]]:
        """The widest cut with at most one node of each lane, all of them among `allowed`."""
        if not lanes:
            return 0, ()
        best = self._widest(lanes[1:], allowed)
        for i in _bits(lanes[0] & allowed):
            width, others = self._widest(lanes[1:], allowed & ~self._ordered[i])
            width += self.plan.num_ctas(self.nodes[i].place)
            if width > best[0]:
                best = width, (self.nodes[i], *others)
        return best

    @functools.cached_property
    def _ordered(self) -> list[int]:
        """For each node a set, in bits, of those before and after it."""
        found = list(self.ancestors)
        for i, before in enumerate(self.ancestors):
            for j in _bits(before):
                found[j] |= 1 << i
        return found

    def check(self) -> None:
        """Raises AssertionError if the class invariant is broken."""
        for i, rules in enumerate(self._rules):
            assert all(j < i for j in rules), f"{self.name(self.nodes[i])} waits for a later one"


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
