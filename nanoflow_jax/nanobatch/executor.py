"""Runs the layers of a model as a plan says; the plain pass is the plan that splits nothing.

The program is written in the plan's order of issue. Values alone order little of it, so more is
said in two ways. A barrier keeps XLA from seeing two nano-operations as one product because they
share a weight, and an append from coming before attention that reads the same cache; it leaves
nothing behind in the compiled step. A token is an operand that a kernel takes and does not read:
an edge in XLA's concurrent graph, which is how lanes stay lanes.

Where kernels of several nano-operations can be one, `Together` makes it, of groups that `grouping`
finds. Where the memory lane has a stream of its own, barriers say in which order the program starts
things: XLA goes through it in that order, and waits for the other stream where its result is read.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanoflow_jax.nanobatch import grouping, operations
from nanoflow_jax.nanobatch.dependencies import Dependencies, Rule
from nanoflow_jax.nanobatch.pipeline import Node
from nanoflow_jax.nanobatch.plan import Plan, TokenRange


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What a nano-operation is told beside what it reads.

    Attributes:
        layer: Of those that run, counted from 0.
        operation: Its name in the layer's graph.
        key: Its key in the plan.
        tokens: Its tokens in the dense batch; what it reads and writes has rows for these alone.
        num_ctas: Most SMs to use; None for all.
        token: Read by nobody; it comes after what makes this.
        run_kernel: Who runs its kernel, of those that have one; None for itself.
    """

    layer: int
    operation: str
    key: str
    tokens: TokenRange
    num_ctas: int | None
    token: Array | None
    run_kernel: Callable[[Any], Any] | None = None


@contextlib.contextmanager
def scope(call: Call) -> Iterator[None]:
    """The named scope of a nano-operation: its layer, then its key."""
    with jax.named_scope(f"layer_{call.layer}"), jax.named_scope(call.key):
        yield


class RunOperation(Protocol):
    """Runs one nano-operation: gets the values that it reads, answers the one that it writes.

    An append also gets the cache, last. A value is a pytree of arrays whose first axis has its
    rows (see `operations.Rows`); of DECODE rows it is a tuple, one pytree for each cell, None where
    a cell has none. A value that nobody needs in this program may be None.
    """

    def __call__(self, call: Call, *reads: Any) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A nano-operation of a group, with all that it reads at hand."""

    call: Call
    reads: Sequence[Any]


class Together(Protocol):
    """Runs kernels of several nano-operations as one."""

    def work(self, operation: operations.Operation, tokens: TokenRange) -> float | None:
        """How much a kernel has to do, in any unit; None for what is no kernel."""

    def run(self, members: Sequence[Member], run_operation: RunOperation) -> list[Any]:
        """What each of a group writes; all `num_ctas` of their calls are numbers."""


# Starts an operation aside, on another stream, with what it reads; answers what it writes, and all
# that must be there before it can start.
StartAside = Callable[[Callable[..., Any], Sequence[Any]], tuple[Any, list[Array]]]


def run(
    plan: Plan,
    layers: Sequence[operations.LayerGraph],
    x: Float[Array, "T D"],
    caches: Sequence[Any],
    run_operation: RunOperation,
    *,
    keep_lanes: bool = False,
    together: Together | None = None,
    start_aside: StartAside | None = None,
) -> tuple[Float[Array, "T D"], list[Any]]:
    """Runs all layers.

    Args:
        plan: How; legal.
        layers: The graph of each.
        x: What enters the first of them.
        caches: One for each.
        run_operation: Runs a nano-operation.
        keep_lanes: Whether to pass tokens. An executor that runs one operation after another
            needs none.
        together: Runs what the plan lets run at once in one kernel, and the rest with all SMs but
            those of collectives, as nothing else runs beside it. None runs each by itself.
        start_aside: For operations of the memory lane; None runs them as all others.

    Returns:
        What leaves the last layer, and the updated caches.
    """
    graph = Dependencies(plan, layers)
    values = _Values(plan, layers, x, caches)
    running = _Run(graph, values, keep_lanes=keep_lanes, has_aside=start_aside is not None)
    if together is None:
        for node in graph.nodes:
            nano = plan.order[node.place]
            member = running.start(node, num_ctas=nano.num_ctas)
            operate = functools.partial(run_operation, member.call)
            with scope(member.call):
                if start_aside is not None and nano.lane is operations.Resource.MEMORY:
                    written, begun = start_aside(operate, member.reads)
                    running.begin_aside(nano.lane, begun)
                else:
                    written = operate(*member.reads)
            running.end(node, written)
    else:
        _run_groups(running, graph, run_operation, together)
    whole = TokenRange(0, plan.num_tokens)
    return running.values.read(len(layers), operations.X, whole), running.values.caches


def _run_groups(
    running: "_Run", graph: Dependencies, run_operation: RunOperation, together: Together
) -> None:
    plan = graph.plan

    def work(node: Node) -> float | None:
        return together.work(graph.operation(node), plan.order[node.place].tokens)

    rest = plan.num_sms - max(
        (n.num_ctas or 0 for n in plan.order if n.lane is operations.Resource.NETWORK), default=0
    )
    for group in grouping.group(graph, work):
        if len(group) == 1:
            member = running.start(group[0], num_ctas=rest)
            with scope(member.call):
                written = [run_operation(member.call, *member.reads)]
        else:
            members = [running.start(n, num_ctas=plan.num_ctas(n.place)) for n in group]
            written = together.run(members, run_operation)
        for node, one in zip(group, written, strict=True):
            running.end(node, one)


class _Run:
    """What nano-operations read and write as they run, and what they wait for.

    Invariant: `_done` has, of each that has run, arrays behind which others can come; `_begun`, for
    each lane, those that were there when an operation was started aside, until one in that lane has
    come behind them.
    """

    def __init__(
        self, graph: Dependencies, values: "_Values", *, keep_lanes: bool, has_aside: bool
    ) -> None:
        self.values = values
        self._graph, self._keep_lanes, self._has_aside = graph, keep_lanes, has_aside
        self._begun: dict[operations.Resource, list[Array]] = {}
        self._done: dict[Node, list[Array]] = {}
        self._waited_for: dict[Node, tuple[Node, ...]] = {}
        self._same_weights: dict[tuple[int, str], Node] = {}
        self._idle: set[Node] = set()

    def start(self, node: Node, *, num_ctas: int | None) -> Member:
        """A nano-operation once all that it waits for has run, with a share of the SMs."""
        graph = self._graph
        nano, op = graph.plan.order[node.place], graph.operation(node)
        barriers = self._barriers(node, op)
        tokens = _tokens(graph, node, self._idle) if self._keep_lanes or self._has_aside else ()
        self._waited_for[node] = (*tokens, *barriers)
        if self._has_aside:  # which no operand would tell of where XLA makes the operation
            tokens, barriers = (), [*barriers, *tokens]
        call = Call(
            layer=node.layer,
            operation=op.name,
            key=graph.plan.keys[node.place],
            tokens=nano.tokens,
            num_ctas=num_ctas,
            token=_join(self._made_by(tokens)),
        )
        with scope(call):
            reads = [self.values.read(node.layer, value, nano.tokens) for value in op.reads]
            reads = _after(reads, self._made_by(barriers))
            if nano.lane is not None:
                reads = _after(reads, self._begun.pop(nano.lane, []))
            if op.writes == operations.CACHE:
                reads.append(self.values.read(node.layer, operations.CACHE, nano.tokens))
        return Member(call=call, reads=reads)

    def end(self, node: Node, written: Any) -> None:
        """Takes what a nano-operation wrote."""
        tokens = self._graph.plan.order[node.place].tokens
        self.values.write(node.layer, self._graph.operation(node).writes, tokens, written)
        self._done[node] = jax.tree.leaves(written)[:1]
        if not self._done[node]:
            self._idle.add(node)
            # What comes after it comes after what it would have waited for.
            waited_for = (*self._waited_for[node], *self._before_in_lane(node))
            self._done[node] = self._made_by(dict.fromkeys(waited_for))

    def begin_aside(self, lane: operations.Resource, begun: list[Array]) -> None:
        """Lets what is issued next in each other lane come after the start of an operation."""
        self._begun = dict.fromkeys(set(operations.Resource) - {lane}, begun)

    def _before_in_lane(self, node: Node) -> list[Node]:
        """Others of its lane, where lanes are kept; that values keep them now is over with it."""
        order = self._graph.plan.order
        lane = order[node.place].lane
        if lane is None or not (self._keep_lanes or self._has_aside):
            return []
        return [first for first in self._graph.waits_for(node) if order[first.place].lane is lane]

    def _barriers(self, node: Node, op: operations.Operation) -> list[Node]:
        if op.writes == operations.CACHE:
            return _readers_before(self._graph, node)
        if not op.has_weights:
            return []
        key = node.layer, op.name
        before = self._same_weights.get(key)
        self._same_weights[key] = node
        return [] if before is None else [before]

    def _made_by(self, nodes: Iterable[Node]) -> list[Array]:
        return [array for node in nodes for array in self._done[node]]


def _tokens(graph: Dependencies, node: Node, idle: Collection[Node]) -> tuple[Node, ...]:
    """Whose output a node gets as a token: also what it waits for that made nothing to read."""
    edges = graph.token_edges.get(node, ())
    nothing = (first for first in graph.waits_for(node) if first in idle)
    return tuple(dict.fromkeys((*edges, *nothing)))


def _readers_before(graph: Dependencies, append: Node) -> list[Node]:
    """Attention that reads the cache as it is before this append, which changes it in place."""
    order = graph.plan.order
    return [
        first
        for first, rule in graph.waits_for(append).items()
        if rule is Rule.CACHE and order[first.place].operation != order[append.place].operation
    ]


def _after(reads: list[Any], arrays: Sequence[Array]) -> list[Any]:
    """What was read, once there are some arrays."""
    if not arrays:
        return reads
    leaves, tree = jax.tree.flatten(reads)
    held = [isinstance(leaf, jax.Array) for leaf in leaves]
    some = [leaf for leaf, is_held in zip(leaves, held, strict=True) if is_held]
    later = iter(jax.lax.optimization_barrier((some, list(arrays)))[0])
    return jax.tree.unflatten(
        tree, [next(later) if is_held else leaf for leaf, is_held in zip(leaves, held, strict=True)]
    )


def _join(arrays: Iterable[Array]) -> Array | None:
    """One array that depends on all of some; what is in it does not matter."""
    several = list(arrays)
    if len(several) < 2:
        return several[0] if several else None
    return jnp.stack([jnp.ravel(array)[0].astype(jnp.float32) for array in several])


class _Values:
    """What nano-operations have written so far, in the pieces in which they wrote it."""

    def __init__(
        self,
        plan: Plan,
        layers: Sequence[operations.LayerGraph],
        x: Float[Array, "T D"],
        caches: Sequence[Any],
    ) -> None:
        self._cells = plan.cells
        self._layers = layers
        self._pieces: dict[tuple[int, operations.Value], dict[TokenRange, Any]] = {
            (-1, operations.Y): {TokenRange(0, plan.num_tokens): x}
        }
        self.caches = list(caches)

    def write(self, layer: int, value: operations.Value, tokens: TokenRange, data: Any) -> None:
        if value.rows is operations.Rows.CACHE:
            self.caches[layer] = data
            return
        pieces = self._pieces.setdefault((layer, value), {})
        if value.rows is operations.Rows.DECODE:
            pieces.update(zip(self._cells_in(tokens), data, strict=True))
        else:
            pieces[tokens] = data

    def read(self, layer: int, value: operations.Value, tokens: TokenRange) -> Any:
        """A value's rows of some tokens, as they are if they were written so."""
        if value.rows is operations.Rows.CACHE:
            return self.caches[layer]
        if value == operations.X:
            layer, value = layer - 1, operations.Y
        pieces = self._pieces[layer, value]
        if value.rows is operations.Rows.DECODE:
            return tuple(pieces[cell] for cell in self._cells_in(tokens))
        if tokens in pieces:
            return pieces[tokens]
        parts = [
            _cut(data, held, tokens)
            for held, data in sorted(pieces.items())
            if held.overlaps(tokens)
        ]
        return jax.tree.map(_concatenate, *parts) if parts[1:] else parts[0]

    def _cells_in(self, tokens: TokenRange) -> list[TokenRange]:
        return [cell for cell in self._cells if cell.overlaps(tokens)]


def _cut(data: Any, held: TokenRange, wanted: TokenRange) -> Any:
    """The rows of `held` that are also wanted."""
    start, stop = max(held.start, wanted.start), min(held.stop, wanted.stop)
    if (start, stop) == held:
        return data
    return jax.tree.map(lambda rows: rows[start - held.start : stop - held.start], data)


def _concatenate(*parts: Array) -> Array:
    """Of either kind: a test may run a plan on arrays of numpy, which compiles nothing."""
    joined: Array = parts[0].__array_namespace__().concat(parts)
    return joined
