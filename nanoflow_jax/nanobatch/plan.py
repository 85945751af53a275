"""What a plan is: how each operation of a layer is split, ordered and given its share of a GPU.

A plan describes one turn of a pipeline over layers. In turn t it issues its nano-operations in
order, each for layer t + shift; with shifts of several values parts of one layer are issued beside
parts of the next:

    shift 1   attention of half A, layer t + 1       ......... of half B, layer t + 1
    shift 0   rest of half B, layer t

The plain forward pass is the plan in which nothing is split.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nanoflow_jax.nanobatch import operations
from nanoflow_jax.nanobatch.operations import Resource

GRANULE = 128
H200_SMS = 132


class TokenRange(NamedTuple):
    """Tokens [start, stop) of the dense batch."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens in it."""
        return self.stop - self.start

    def overlaps(self, other: "TokenRange") -> bool:
        """Whether a token lies in both."""
        return self.start < other.stop and other.start < self.stop

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NanoOperation:
    """An operation over some of the tokens.

    Attributes:
        operation: Name of the operation in the layer's graph.
        tokens: Which tokens of the dense batch.
        lane: Nano-operations of one lane run one after another, in order of issue. None for those
            that nothing but their dependencies orders: short ones, made by XLA, that have no cap.
        num_ctas: Most SMs it may use; None for all of them.
        shift: It is issued in turn t for layer t + shift.
        after: Keys of nano-operations (see `Plan.keys`); it waits for the last of each of them
            that was issued before it.
    """

    operation: str
    tokens: TokenRange
    lane: Resource | None = None
    num_ctas: int | None = None
    shift: int = 0
    after: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How one step's layers run. `legality.check` says whether they can.

    Attributes:
        name: For people.
        shape: Which operations a layer has. A plan for sparse layers runs a model's dense ones too.
        num_tokens: Tokens of the dense batch, padding included.
        granule: Ranges begin at its multiples.
        num_sms: SMs of the device that it is made for.
        decode_weights: One for each of `cells`: decode rows are dealt in these proportions.
        order: Nano-operations of one turn, in order of issue.
    """

    name: str
    shape: operations.LayerShape
    num_tokens: int
    granule: int = GRANULE
    num_sms: int = H200_SMS
    decode_weights: tuple[int, ...]
    order: tuple[NanoOperation, ...]

    @property
    def graph(self) -> operations.LayerGraph:
        """The layer that it is made for."""
        return operations.layer_graph(self.shape)

    @functools.cached_property
    def cells(self) -> tuple[TokenRange, ...]:
        """The coarsest cut of the dense batch of which every range is made: see `find_cells`."""
        return find_cells([nano.tokens for nano in self.order], num_tokens=self.num_tokens)

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """A name for each of `order`: its operation and which of that operation's ranges it is."""
        ranges: dict[str, list[TokenRange]] = {}
        for nano in self.order:
            ranges.setdefault(nano.operation, []).append(nano.tokens)
        for found in ranges.values():
            found.sort()
        return tuple(f"{n.operation}.{ranges[n.operation].index(n.tokens)}" for n in self.order)

    @functools.cached_property
    def by_operation(self) -> dict[str, tuple[int, ...]]:
        """Places in `order` of each operation's nano-operations, by range."""
        found: dict[str, list[int]] = {}
        for i, nano in enumerate(self.order):
            found.setdefault(nano.operation, []).append(i)
        return {
            name: tuple(sorted(places, key=lambda i: self.order[i].tokens))
            for name, places in found.items()
        }

    @functools.cached_property
    def ways(self) -> Mapping[str, frozenset[str]]:
        """By product of several ways, those that some of its tokens take; see `Choice`.

        A plan for one device says nothing; in a group of devices its products sum by themselves,
        as in the way `reduce`.
        """
        found: dict[str, set[str]] = {}
        for nano in self.order:
            choice = self.graph.by_name[nano.operation].choice
            if choice is not None:
                found.setdefault(choice.product, set()).add(choice.way)
        return {product: frozenset(ways) for product, ways in found.items()}

    @property
    def changes_bits(self) -> bool:
        """Whether a token's last bits may differ from those of the plain pass.

        They may where an operation that adds up has fewer rows, which XLA's kernels may add in
        another order, or is done in another way than the plain pass does it.
        """
        return any(
            (nano.tokens.length < self.num_tokens and (op.has_weights or not op.is_token_wise))
            or (op.choice is not None and op.choice.way != "reduce")
            for nano in self.order
            for op in (self.graph.by_name[nano.operation],)
        )

    @property
    def max_shift(self) -> int:
        """Layers that are under way at once, less one."""
        return max(nano.shift for nano in self.order)

    def decode_share(self, tokens: TokenRange) -> float:
        """Of a step's decode rows, the share that lies among some tokens: a row of `cells`."""
        inside = (
            weight
            for weight, cell in zip(self.decode_weights, self.cells, strict=True)
            if cell.overlaps(tokens)
        )
        return sum(inside) / sum(self.decode_weights)

    def num_ctas(self, place: int) -> int:
        """SMs that a nano-operation may use: its cap, or all."""
        cap = self.order[place].num_ctas
        return self.num_sms if cap is None else cap


def find_cells(ranges: Sequence[TokenRange], *, num_tokens: int) -> tuple[TokenRange, ...]:
    """The coarsest cut of [0, num_tokens) of which every range is a row of pieces."""
    borders = {0, num_tokens}
    for tokens in ranges:
        borders.update(tokens)
    return cut_at(sorted(borders))


def cut_at(borders: Sequence[int]) -> tuple[TokenRange, ...]:
    """Ranges between one border and the next."""
    return tuple(map(TokenRange, borders, borders[1:]))
