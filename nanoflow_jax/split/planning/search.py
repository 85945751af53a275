"""Places the units of a problem: exactly, or with thinned labels, for each kind of limits.

States are pairs of sides: where a unit prefills and where it decodes. Without migration the two
are one. Decode is a cycle, for a token returns from the head to the embedding: the chain is
searched once for each side of the head. With migration, once more as if cached tokens moved, which
costs the link's latency once.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from nanoflow_jax.split.planning import labels
from nanoflow_jax.split.planning.asked import Side
from nanoflow_jax.split.planning.labels import Chain, Vector
from nanoflow_jax.split.planning.problem import Limits, Placement, Problem, Unit, outcome

# A rank is a charge, then crossings, then units on the server: one number that adds up.
_UNITS = 1 << 12
_CHARGES = _UNITS << 12
_SIDES = tuple(Side)
# Labels of a first search, which soon finds a placement; what is dearer is then left out.
_FEW = 64


def cheapest(
    problem: Problem, *, max_labels: int | None, known: Sequence[Placement] = ()
) -> Placement | None:
    """The placement within the limits of least charge; None if there is none.

    Of equal charge, the one of fewest crossings; of those, of fewest units on the server.

    Args:
        problem: What to place.
        max_labels: Kept at each unit and state; None keeps all, and the answer is the best.
        known: Placements that may be within the limits: what is dearer is not looked at.
    """
    best = min(
        (one for one in known if outcome(problem, one).meets(problem.limits)),
        key=lambda one: outcome(problem, one).rank,
        default=None,
    )
    limit = math.inf if best is None else _rank(problem, best)
    unfinished = []
    for chain in chains(problem):
        few = labels.ways(chain, max_labels=_FEW, rank_limit=limit)
        limit, best = _better(few, limit, best)
        if not few.is_complete and (max_labels is None or max_labels > _FEW):
            unfinished.append(chain)
    for chain in unfinished:
        tolls = labels.Tolls() if best is None else labels.tolls(chain, rank=int(limit))
        more = labels.ways(chain, max_labels=max_labels, rank_limit=limit, tolls=tolls)
        limit, best = _better(more, limit, best)
    return best


def _better(
    found: labels.Found, limit: float, best: Placement | None
) -> tuple[float, Placement | None]:
    way = min(found.ways, key=lambda one: one.vector[3], default=None)
    if way is None or (best is not None and way.vector[3] >= limit):
        return limit, best
    return way.vector[3], placement(way.states)


def undominated(problem: Problem, *, max_labels: int | None) -> list[Placement]:
    """Placements within the limits that no other beats in all times, memory and rank."""
    return [
        placement(way.states)
        for chain in chains(problem)
        for way in labels.ways(chain, max_labels=max_labels).ways
    ]


def quickest(problem: Problem, *, first: int, second: int) -> Placement | None:
    """The placement of the least weighted sum of the first token's time and that of a step.

    No limit is kept but where units may run; the client's memory neither.
    """
    found = [
        way
        for chain in chains(problem, keeps_times_apart=True)
        if (way := labels.least(chain, (first, second, 0, 0))) is not None
    ]
    if not found:
        return None
    best = min(found, key=lambda way: (first * way.vector[0] + second * way.vector[1], way.vector))
    return placement(best.states)


def chains(problem: Problem, *, keeps_times_apart: bool = False) -> Iterator[Chain]:
    """One for each side of the head, without and perhaps with migration.

    Args:
        problem: What to place.
        keeps_times_apart: Also where one time would do.
    """
    limits = problem.limits
    is_one_time = limits.ttft is None and limits.tpot is None and not keeps_times_apart
    for moves, head in itertools.product((False, True) if problem.migrates else (False,), Side):
        yield _chain(problem, head, moves=moves, is_one_time=is_one_time)


def placement(states: Sequence[int]) -> Placement:
    """What states say."""
    return Placement(
        prefill=tuple(_SIDES[state >> 1] for state in states),
        decode=tuple(_SIDES[state & 1] for state in states),
    )


def _state(prefill: Side, decode: Side) -> int:
    return prefill << 1 | decode


def _rank(problem: Problem, one: Placement) -> int:
    charge, crossings, units = outcome(problem, one).rank
    return charge * _CHARGES + crossings * _UNITS + units


def _chain(problem: Problem, head: Side, *, moves: bool, is_one_time: bool) -> Chain:
    """The chain of one side of the head."""
    memory_matters = (
        sum(unit.memory for unit in problem.units if Side.CLIENT in unit.allowed)
        > problem.limits.memory
    )
    shape = _Shape(problem, is_one_time=is_one_time, memory_matters=memory_matters)
    start = _state(Side.CLIENT, head)
    before = [start]
    stages = []
    for number, unit in enumerate(problem.units):
        is_last = number == len(problem.units) - 1
        states = [
            _state(at, then)
            for at, then in itertools.product(Side, Side)
            if {at, then} <= unit.allowed
            and (moves or at is then)
            and (then is head or not is_last)
        ]
        deliver = problem.deliver if is_last else 0
        stages.append(
            {
                state: {one: shape.arc(unit, one, state, deliver) for one in before}
                for state in states
            }
        )
        before = states
    return Chain(
        start=start,
        begin=(problem.latency if moves else 0, 0, 0, 0),
        stages=stages,
        limits=shape.limits,
        weight=0 if is_one_time else problem.num_steps,
        total=_most(problem.limits.e2e),
    )


class _Shape:
    """How a problem's numbers become a chain's."""

    def __init__(self, problem: Problem, *, is_one_time: bool, memory_matters: bool) -> None:
        self._steps = problem.num_steps
        self._is_one_time = is_one_time
        self._memory_matters = memory_matters
        self._limits = problem.limits

    @property
    def limits(self) -> tuple[float, float, float]:
        limits: Limits = self._limits
        memory = limits.memory if self._memory_matters else math.inf
        if self._is_one_time:
            return _most(limits.e2e), math.inf, memory
        return _most(limits.ttft), _most(limits.tpot), memory

    def arc(self, unit: Unit, before: int, state: int, deliver: int) -> Vector:
        """What a unit adds in a state after another."""
        at, then = Side(state >> 1), Side(state & 1)
        enters, returns = at != before >> 1, then != before & 1
        ttft = unit.prefill[at] + (unit.enter_prefill[at] if enters else 0)
        ttft += (unit.migrate[then] if at is not then else 0) + (deliver if at or then else 0)
        tpot = unit.decode[then] + (unit.enter_decode[then] if returns else 0)
        charge = (unit.prefill_charge if at else 0) + (unit.decode_charge if then else 0)
        rank = charge * _CHARGES + (enters + returns) * _UNITS + at + then
        on_client = self._memory_matters and Side.CLIENT in (at, then)
        memory = unit.memory if on_client else 0
        if self._is_one_time:
            return ttft + self._steps * tpot, 0, memory, rank
        return ttft, tpot, memory, rank


def _most(limit: int | None) -> float:
    return math.inf if limit is None else limit
