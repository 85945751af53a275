"""The cheapest way through a chain of states under limits, by labels that nothing dominates.

A label is a way through the first stages of a chain: two times, memory and a rank, all whole
numbers that add up along arcs. Of the labels of one state, one is dropped if another is no worse
in everything; and if it cannot end within the limits, even by the least that any way on adds. If
more are left than asked for they are thinned out: of those that are alike in times and memory, the
one of least rank stays. Numbers are never rounded, so that what is found keeps the limits; without
thinning it is the best there is.

Where a way of some rank is known, tolls on times say early that a label ends in none of less rank:
its rank and tolls with the least of both to come are more than that rank and the tolls of the
limits. Any tolls will do; `tolls` looks for those that say it of most.

Source: label setting for resource-constrained shortest paths (Irnich and Desaulniers, Shortest Path
Problems with Resource Constraints, 2005); tolls are Lagrange multipliers of the limits, found by
subgradient steps (Polyak, Minimization of unsmooth functionals, 1969).
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

Vector = tuple[int, int, int, int]  # first time, second time, memory, rank
# To a state, from each state, what it adds.
Stage = Mapping[int, Mapping[int, Vector]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """What ways there are.

    Attributes:
        start: The only state before the first stage.
        begin: What a way has before it.
        stages: One after the other; a way ends in any state of the last.
        limits: Most of the times and of memory; infinite where there is no limit.
        weight: The sum of the first time and this many of the second is limited as well,
        total: to this.
    """

    start: int
    begin: Vector
    stages: Sequence[Stage]
    limits: tuple[float, float, float]
    weight: int
    total: float


@dataclasses.dataclass(frozen=True)
class Way:
    """A whole way: what it adds up to, and its state after each stage."""

    vector: Vector
    states: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolls:
    """Rank that a unit of each limited time is taken to cost; 0 where there is no limit."""

    first: int = 0
    second: int = 0
    total: int = 0

    def weights(self, chain: Chain) -> Vector:
        """Of a vector, rank included."""
        return self.first + self.total, self.second + chain.weight * self.total, 0, 1

    def of_limits(self, chain: Chain) -> float:
        """What the limits cost."""
        pairs = ((self.first, chain.limits[0]), (self.second, chain.limits[1]))
        return sum(toll * limit for toll, limit in (*pairs, (self.total, chain.total)) if toll)


_FREE = Tolls()


# A vector, and how it was come to: (state, the label before it).
_Label = tuple[int, int, int, int, int, "_Label | None"]


@dataclasses.dataclass(frozen=True)
class Found:
    """All ways that nothing dominates, but for what was thinned out if anything was."""

    ways: tuple[Way, ...]
    is_complete: bool


def ways(
    chain: Chain,
    *,
    max_labels: int | None,
    rank_limit: float = math.inf,
    tolls: Tolls = _FREE,
) -> Found:
    """All ways within the limits that no other dominates, but for those thinned out.

    Args:
        chain: What ways there are.
        max_labels: Kept of each state; None keeps all.
        rank_limit: Ways of a higher rank are left out.
        tolls: Say sooner which those are.
    """
    bounds = _least_to_come(chain, tolls.weights(chain))
    labels: dict[int, list[_Label]] = {chain.start: [(*chain.begin, chain.start, None)]}
    is_complete = True
    for stage, bound in zip(chain.stages, bounds[1:], strict=True):
        after: dict[int, list[_Label]] = {}
        for state, sources in stage.items():
            if state not in bound:
                continue
            room = _Room(chain, bound[state], rank_limit, tolls)
            found: list[_Label] = []
            for before, added in sources.items():
                found += room.extended(labels.get(before, ()), added, state)
            kept = _undominated(found)
            after[state] = _thinned(kept, max_labels)
            is_complete = is_complete and len(after[state]) == len(kept)
        labels = after
    last = _undominated([label for found in labels.values() for label in found])
    return Found(tuple(Way(label[:4], _states(label)) for label in last), is_complete)


_TOLL_STEPS = 20


def tolls(chain: Chain, *, rank: int) -> Tolls:
    """Tolls for which the least of rank and tolls of any way is near a known rank.

    Args:
        chain: What ways there are.
        rank: Of a way within the limits.
    """
    limits = (chain.limits[0], chain.limits[1], chain.total)
    shares = [0.0, 0.0, 0.0]  # toll x limit
    best, highest, boldness = _FREE, -math.inf, 1.0
    for _ in range(_TOLL_STEPS):
        tried = Tolls(
            **{
                name: int(share / limit)
                for name, share, limit in zip(
                    ("first", "second", "total"), shares, limits, strict=True
                )
            }
        )
        way = least(chain, tried.weights(chain))
        if way is None:
            break
        bound = _weighted(way.vector, tried.weights(chain)) - tried.of_limits(chain)
        if bound > highest:
            best, highest = tried, bound
        else:
            boldness /= 2
        first, second, _, _ = way.vector
        used = (first, second, first + chain.weight * second)
        over = [
            0.0 if limit == math.inf else u / limit - 1
            for u, limit in zip(used, limits, strict=True)
        ]
        length = sum(one**2 for one in over)
        if not length or bound >= rank:
            break
        step = boldness * (rank - bound) / length
        shares = [max(0.0, share + step * one) for share, one in zip(shares, over, strict=True)]
    return best


def least(chain: Chain, weights: Vector) -> Way | None:
    """The way of least weighted sum, whatever the limits; None if the chain has none."""
    reached: dict[int, tuple[int, _Label]] = {
        chain.start: (_weighted(chain.begin, weights), (*chain.begin, chain.start, None))
    }
    for stage in chain.stages:
        after = {}
        for state, sources in stage.items():
            options = [
                (reached[before][0] + _weighted(added, weights), before, added)
                for before, added in sources.items()
                if before in reached
            ]
            if options:
                value, before, added = min(options)
                after[state] = (value, _extend(reached[before][1], added, state))
        reached = after
    if not reached:
        return None
    _, label = min(reached.values(), key=lambda one: one[0])
    return Way(label[:4], _states(label))


def _weighted(vector: Vector, weights: Vector) -> int:
    a, b, c, d = vector
    e, f, g, h = weights
    return a * e + b * f + c * g + d * h


def _extend(label: _Label, added: Vector, state: int) -> _Label:
    t1, t2, memory, rank, _, _ = label
    return (t1 + added[0], t2 + added[1], memory + added[2], rank + added[3], state, label)


def _states(label: _Label) -> tuple[int, ...]:
    """The start is left out."""
    found = []
    at: _Label | None = label
    while at is not None:
        found.append(at[4])
        at = at[5]
    return tuple(reversed(found[:-1]))


# Least of each time and of memory to come, of rank with tolls, and of the weighted total.
_Bound = tuple[int, int, int, int, int]


def _least_to_come(chain: Chain, weights: Vector) -> list[dict[int, _Bound]]:
    """For each state before and after each stage, each by itself; no entry where no way goes on."""
    weight = chain.weight
    last = dict.fromkeys(chain.stages[-1], (0, 0, 0, 0, 0))
    bounds: list[dict[int, _Bound]] = [last]
    for stage in reversed(chain.stages):
        here: dict[int, _Bound] = {}
        for state, sources in stage.items():
            if state not in bounds[-1]:
                continue
            t1, t2, memory, rank, total = bounds[-1][state]
            for before, a in sources.items():
                come = (
                    t1 + a[0],
                    t2 + a[1],
                    memory + a[2],
                    rank + _weighted(a, weights),
                    total + a[0] + weight * a[1],
                )
                here[before] = _least_of(here.get(before, come), come)
        bounds.append(here)
    return bounds[::-1]


def _least_of(a: _Bound, b: _Bound) -> _Bound:
    return (
        min(a[0], b[0]),
        min(a[1], b[1]),
        min(a[2], b[2]),
        min(a[3], b[3]),
        min(a[4], b[4]),
    )


class _Room:
    """What a label may have in one state so that it can still end within the limits."""

    def __init__(self, chain: Chain, bound: _Bound, rank_limit: float, tolls: Tolls) -> None:
        self._t1 = chain.limits[0] - bound[0]
        self._t2 = chain.limits[1] - bound[1]
        self._memory = chain.limits[2] - bound[2]
        self._rank = rank_limit + tolls.of_limits(chain) - bound[3]
        self._toll1, self._toll2, _, _ = tolls.weights(chain)
        self._total = chain.total - bound[4]
        self._weight = chain.weight

    def extended(self, labels: Sequence[_Label], added: Vector, state: int) -> list[_Label]:
        """Those that have room, each with the arc added."""
        a1, a2, a3, a4 = added
        toll1, toll2 = self._toll1, self._toll2
        found: list[_Label] = []
        for label in labels:
            t1, t2, memory, rank = label[0] + a1, label[1] + a2, label[2] + a3, label[3] + a4
            if (
                t1 <= self._t1
                and t2 <= self._t2
                and memory <= self._memory
                and rank + toll1 * t1 + toll2 * t2 <= self._rank
                and t1 + self._weight * t2 <= self._total
            ):
                found.append((t1, t2, memory, rank, state, label))
        return found


def _order(label: _Label) -> Vector:
    return label[:4]


def _undominated(labels: list[_Label]) -> list[_Label]:
    """Those that no other is as good as in everything; one of those that are equal."""
    ordered = sorted(labels, key=_order)
    if len({label[2] for label in labels}) > 1:
        return _undominated_with_memory(ordered)
    # Ascending in the first time: a label stays if its rank is under that of all with at most its
    # second time. `seconds` ascends, and `ranks` beside it descends.
    seconds: list[int] = []
    ranks: list[int] = []
    kept = []
    for label in ordered:
        _, second, _, rank, _, _ = label
        at = bisect.bisect_right(seconds, second)
        if at and ranks[at - 1] <= rank:
            continue
        end = at
        while end < len(ranks) and ranks[end] >= rank:
            end += 1
        if at and seconds[at - 1] == second:
            at -= 1
        seconds[at:end] = [second]
        ranks[at:end] = [rank]
        kept.append(label)
    return kept


def _undominated_with_memory(ordered: list[_Label]) -> list[_Label]:
    kept: list[_Label] = []
    for label in ordered:
        _, second, memory, rank, _, _ = label
        if not any(k[1] <= second and k[2] <= memory and k[3] <= rank for k in kept):
            kept.append(label)
    return kept


def _thinned(labels: list[_Label], max_labels: int | None) -> list[_Label]:
    """At most so many: a grid over times and memory, and the least rank of each cell."""
    if max_labels is None or len(labels) <= max_labels:
        return labels
    limited = [label[:3] for label in labels]
    spans = []
    for number in range(3):
        values = [one[number] for one in limited]
        spans.append((number, min(values), max(values) + 1 - min(values)))
    wide = [span for span in spans if span[2] > 1]
    side = max(2, int(max_labels ** (1 / len(wide)))) if wide else 1
    cells: dict[tuple[int, ...], _Label] = {}
    for label, one in zip(labels, limited, strict=True):
        cell = tuple((one[n] - low) * side // width for n, low, width in wide)
        best = cells.get(cell)
        if best is None or (label[3], one) < (best[3], best[:3]):
            cells[cell] = label
    return list(cells.values())
