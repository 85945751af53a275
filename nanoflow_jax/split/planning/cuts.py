"""Placements that two ends can run: one range of layers at the server, the rest at the client."""

from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split.planning import planner
from nanoflow_jax.split.planning.asked import Side
from nanoflow_jax.split.planning.costs import Model
from nanoflow_jax.split.planning.problem import Placement, Problem


def runnable(problem: Problem) -> list[Placement]:
    """Every placement of one range of units at the server, none included, that units allow.

    So many as pairs of borders: hundreds, where a whole search has exponentially many.

    Raises:
        ValueError: Units allow none.
    """
    units = problem.units
    found = [_placed(0, 0, len(units))]
    for start in range(len(units)):
        found += [_placed(start, stop, len(units)) for stop in range(start + 1, len(units) + 1)]
    kept = [
        one
        for one in found
        if all(side in unit.allowed for unit, side in zip(units, one.decode, strict=True))
    ]
    if not kept:
        raise ValueError(
            "what is pinned and held leaves no single range of layers to the server, which is all "
            "that sessions run; let the client hold the first layers, the last, or both"
        )
    return kept


def _placed(start: int, stop: int, count: int) -> Placement:
    sides = (Side.CLIENT,) * start + (Side.SERVER,) * (stop - start)
    sides += (Side.CLIENT,) * (count - stop)
    return Placement(sides, sides)


def try_cut(model: Model, plan: planner.Plan) -> cut_lib.Cut | None:
    """The cut of a plan that one of `runnable` gave; None if the client does all."""
    for stretch in plan.decode:
        if stretch.side is Side.SERVER:
            start, stop = planner.layers_of(model, stretch)
            return cut_lib.Cut(start=start, stop=stop, num_layers=model.config.num_layers)
    return None


def placement(problem: Problem, plan: planner.Plan) -> Placement:
    """A plan as a placement of a problem's units, whose stretches begin and end with units."""

    def sides(stretches: tuple[planner.Stretch, ...]) -> tuple[Side, ...]:
        return tuple(
            next(one.side for one in stretches if one.start <= unit.start < one.stop)
            for unit in problem.units
        )

    return Placement(sides(plan.prefill), sides(plan.decode))
