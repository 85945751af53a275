"""Simpler ways to place a request, to say what a search is worth.

Each keeps what units allow and the client's memory, and places prefill and decode alike. None is
given where a way ends in no placement within the limits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from nanoflow_jax.split.planning.asked import Side
from nanoflow_jax.split.planning.problem import Placement, Problem, outcome

_C, _S = Side.CLIENT, Side.SERVER


def all_on(problem: Problem, side: Side) -> Placement:
    """All units on one side, but those that may not run there."""
    sides = tuple(side if side in unit.allowed else _other(side) for unit in problem.units)
    return Placement(sides, sides)


def forward(problem: Problem) -> Placement | None:
    """From all on the server, unit by unit: to the client if limits hold with the rest there."""
    return _flipped(problem, range(len(problem.units)))


def density(problem: Problem) -> Placement | None:
    """The same in order of charge saved per time lost, whatever crossings cost.

    A unit for which there is no room is passed over.
    """
    return _flipped(problem, sorted(range(len(problem.units)), key=_by_density(problem)))


def prefix(problem: Problem) -> Placement | None:
    """The first units on the client, as many as is best."""
    count = len(problem.units)
    return _best(problem, ([_C] * k + [_S] * (count - k) for k in range(count + 1)))


def suffix(problem: Problem) -> Placement | None:
    """The last units on the client, as many as is best."""
    count = len(problem.units)
    return _best(problem, ([_S] * (count - k) + [_C] * k for k in range(count + 1)))


def single_segment(problem: Problem) -> Placement | None:
    """One stretch of units on the server, the best of all."""
    count = len(problem.units)
    return _best(
        problem,
        (
            [_C] * start + [_S] * (stop - start) + [_C] * (count - stop)
            for start in range(count + 1)
            for stop in range(start, count + 1)
        ),
    )


GREEDY: Mapping[str, Callable[[Problem], Placement | None]] = {
    "forward": forward,
    "prefix": prefix,
    "suffix": suffix,
    "density": density,
}


def _other(side: Side) -> Side:
    return _S if side is _C else _C


def _flipped(problem: Problem, order: Iterable[int]) -> Placement | None:
    sides = list(all_on(problem, _S).decode)
    for number in order:
        if sides[number] is _S and _C in problem.units[number].allowed:
            sides[number] = _C
            if not outcome(problem, _alike(sides)).meets(problem.limits):
                sides[number] = _S
    return _best(problem, [sides])


def _by_density(problem: Problem) -> Callable[[int], tuple[int, float]]:
    """Units that lose no time come first."""

    def key(number: int) -> tuple[int, float]:
        unit, steps = problem.units[number], problem.num_steps
        lost = unit.prefill[_C] - unit.prefill[_S] + steps * (unit.decode[_C] - unit.decode[_S])
        charge = unit.prefill_charge + unit.decode_charge
        return (0, lost) if lost <= 0 else (1, -charge / lost)

    return key


def _best(problem: Problem, choices: Iterable[Sequence[Side]]) -> Placement | None:
    """Of choices in which units that may not run there run elsewhere, the best within limits."""
    found = []
    for choice in choices:
        pairs = zip(choice, problem.units, strict=True)
        placed = _alike([at if at in unit.allowed else _other(at) for at, unit in pairs])
        result = outcome(problem, placed)
        if result.meets(problem.limits):
            found.append((result.rank, placed.decode, placed))
    return min(found)[2] if found else None


def _alike(sides: Sequence[Side]) -> Placement:
    return Placement(tuple(sides), tuple(sides))
