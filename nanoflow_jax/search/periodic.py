"""The best order of tasks that repeat for layer after layer: a cyclic schedule.

Layer l runs every task once, one period after layer l - 1 did. What is sought is the shortest
period, which is the time per layer of the steady state, not the time of a layer by itself.

Divided by the period, start times turn the problem into a linear one: with t the throughput (1 /
period) and s a start in periods, a task that waits for another h layers back keeps

    s_second + h >= s_first + seconds_first * t

and two tasks that share a lane keep, for a whole number k that says how many layers ahead the one
runs,

    s_j >= s_i + seconds_i * t - k    and    s_i >= s_j + seconds_j * t - (1 - k).

Source: Hanen and Munier, A study of the cyclic scheduling problem on parallel processors, Discrete
Applied Mathematics 57 (1995); the form with 1 / period is theirs.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import optimize, sparse

from nanoflow_jax.search import standard_output

_MOST_AHEAD = 3  # layers under way at once
# Of each task, in periods, as a sum of variables.
Lengths = Mapping[str, Mapping[Hashable, float]]
# HiGHS of scipy 1.17 prints it whatever its options, where it mends a solution that rounding has
# moved off a row.
_SOLVER_LINE = "HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();"
_INFEASIBLE = 2  # a status of scipy.optimize.milp
_PREFER_EARLY = 1e-5  # of a period: among equal schedules, the one with fewer layers under way


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Something that each layer does once.

    Attributes:
        name: Unique.
        seconds: How long it takes.
        lane: Tasks of one lane run one after another; None is in no lane.
    """

    name: str
    seconds: float
    lane: Hashable | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wait:
    """A task that waits for another.

    Attributes:
        first: Of a layer.
        second: Of the layer `distance` later, waits for it.
        distance: At least 0.
    """

    first: str
    second: str
    distance: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Apart:
    """Two tasks of one layer of which either may run first, but not both at once."""

    one: str
    other: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A cyclic schedule.

    Attributes:
        period_s: From one layer to the next.
        starts: When each task of layer 0 starts, in periods.
        bound_s: No schedule has a shorter period than this.
        is_best: Whether that was proven.
    """

    period_s: float
    starts: dict[str, float]
    bound_s: float
    is_best: bool


class ProgramError(Exception):
    """No schedule was found."""


class NoScheduleError(ProgramError):
    """There is none."""


class Program:
    """A mixed-integer linear program, built name by name.

    Its rows say `low <= sum of coefficient * variable <= high`.
    """

    def __init__(self) -> None:
        self._number: dict[Hashable, int] = {}
        self._low: list[float] = []
        self._high: list[float] = []
        self._is_whole: list[bool] = []
        self._cost: list[float] = []
        self._rows: list[tuple[Mapping[Hashable, float], float, float]] = []

    def variable(
        self,
        name: Hashable,
        *,
        low: float = 0.0,
        high: float = math.inf,
        is_whole: bool = False,
        cost: float = 0.0,
    ) -> None:
        """Adds a variable; the sum of cost * variable is made least."""
        assert name not in self._number
        self._number[name] = len(self._low)
        self._low.append(low)
        self._high.append(high)
        self._is_whole.append(is_whole)
        self._cost.append(cost)

    def row(
        self, terms: Mapping[Hashable, float], *, low: float = -math.inf, high: float = math.inf
    ) -> None:
        """Adds a row."""
        self._rows.append((terms, low, high))

    def solve(self, *, seconds: float) -> tuple[dict[Hashable, float], float, bool]:
        """The best values found, the bound of the cost, and whether they were proven best.

        Args:
            seconds: After these the best values so far are taken.

        Raises:
            ProgramError: No values were found.
        """
        data, row_of, column_of = [], [], []
        for i, (terms, _, _) in enumerate(self._rows):
            for name, value in terms.items():
                data.append(value)
                row_of.append(i)
                column_of.append(self._number[name])
        shape = (len(self._rows), len(self._low))
        matrix = sparse.csr_array((data, (row_of, column_of)), shape=shape)
        lows, highs = np.array([[low, high] for _, low, high in self._rows]).T
        with standard_output.without(_SOLVER_LINE):
            found = optimize.milp(
                np.array(self._cost),
                integrality=np.array(self._is_whole, int),
                bounds=optimize.Bounds(np.array(self._low), np.array(self._high)),
                constraints=optimize.LinearConstraint(matrix, lows, highs),
                options={"time_limit": seconds, "mip_rel_gap": 1e-6},
            )
        if found.status == _INFEASIBLE:
            raise NoScheduleError("there is no such schedule")
        if found.x is None:
            raise ProgramError(f"no schedule was found within {seconds:g} s: {found.message}")
        values = {name: float(found.x[i]) for name, i in self._number.items()}
        # Without whole variables there is nothing to bound: the best is the bound.
        bound = found.fun if found.mip_dual_bound is None else found.mip_dual_bound
        return values, float(bound), bool(found.status == 0)


def best_schedule(
    tasks: Sequence[Task],
    waits: Sequence[Wait],
    *,
    apart: Sequence[Apart] = (),
    seconds: float = 60.0,
) -> Schedule:
    """The schedule with the shortest period.

    Args:
        tasks: Of a layer.
        waits: What waits for what.
        apart: What may not run at once, in the same layer.
        seconds: Time to search; then the best so far is given.

    Raises:
        ProgramError: None was found in time, or tasks wait for each other in a circle.
    """
    scale = sum(task.seconds for task in tasks)
    assert scale > 0, "tasks that take no time have no shortest period"
    program = Program()
    program.variable("rate", cost=-1.0)
    lengths: Lengths = {task.name: {"rate": task.seconds / scale} for task in tasks}
    add_starts(program, [task.name for task in tasks])
    add_waits(program, waits, lengths)
    for one, other in lane_pairs(tasks):
        add_order(program, one, other, lengths)
    for pair in apart:
        add_apart(program, pair, lengths)
    for lane in {task.lane for task in tasks} - {None}:  # implied, and a good bound
        busy = sum(task.seconds for task in tasks if task.lane == lane)
        program.row({"rate": busy / scale}, high=1.0)
    values, bound, is_best = program.solve(seconds=seconds)
    if values["rate"] < 1e-9:
        why = (
            "tasks wait for each other in a circle" if is_best else f"{seconds:.0f} s were too few"
        )
        raise ProgramError(f"no schedule was found: {why}")
    period_s = scale / values["rate"]
    return Schedule(
        period_s=period_s,
        starts={task.name: values["start", task.name] for task in tasks},
        bound_s=min(period_s, scale / highest_rate(bound)),
        is_best=is_best,
    )


def highest_rate(bound: float) -> float:
    """The most that the rate can be by the bound of the cost, which starts are a small part of."""
    return max(-bound + _PREFER_EARLY * _MOST_AHEAD, 1e-12)


def lane_pairs(tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Each two tasks that share a lane."""
    return [
        (one.name, other.name)
        for i, one in enumerate(tasks)
        for other in tasks[:i]
        if one.lane is not None and one.lane == other.lane
    ]


def add_starts(program: Program, names: Sequence[str]) -> None:
    """Adds when each task of layer 0 starts, in periods."""
    for name in names:
        program.variable(("start", name), high=float(_MOST_AHEAD), cost=_PREFER_EARLY / len(names))


def add_waits(program: Program, waits: Sequence[Wait], lengths: Lengths) -> None:
    """Adds what waits for what.

    Args:
        program: Gets the rows.
        waits: What to add.
        lengths: Of the tasks.
    """
    for wait in waits:
        terms = _after(wait.first, wait.second, lengths)
        program.row(terms, low=-float(wait.distance))


def add_order(program: Program, one: str, other: str, lengths: Lengths) -> None:
    """Adds that two tasks never run at once, whatever their layers.

    Args:
        program: Gets the rows, and how many layers ahead `one` runs.
        one: A task.
        other: Another.
        lengths: Of the tasks.
    """
    most = 2.0 * _MOST_AHEAD
    ahead: Hashable = ("ahead", one, other)
    program.variable(ahead, low=-most, high=most, is_whole=True)
    program.row({**_after(one, other, lengths), ahead: 1.0}, low=0.0)
    program.row({**_after(other, one, lengths), ahead: -1.0}, low=-1.0)


def add_order_unless(
    program: Program, one: str, other: str, lengths: Lengths, *, unless: Hashable
) -> None:
    """Adds that two tasks never run at once unless a variable is 1, which is 0 or 1."""
    most = 2.0 * _MOST_AHEAD
    ahead: Hashable = ("ahead", one, other)
    program.variable(ahead, low=-most, high=most, is_whole=True)
    # For two that run at once some whole number is short of the rows by less than a period.
    program.row({**_after(one, other, lengths), ahead: 1.0, unless: 1.0}, low=0.0)
    program.row({**_after(other, one, lengths), ahead: -1.0, unless: 1.0}, low=-1.0)


def add_start(program: Program, name: str) -> None:
    """Adds when one task starts: a schedule may be shifted, and needs to be found in one place."""
    program.row({("start", name): 1.0}, low=1.0, high=1.0)


def add_fixed_order(program: Program, one: str, other: str, ahead: int, lengths: Lengths) -> None:
    """Adds the same for `one` so many layers ahead."""
    program.row(_after(one, other, lengths), low=-float(ahead))
    program.row(_after(other, one, lengths), low=float(ahead) - 1.0)


def add_apart(program: Program, pair: Apart, lengths: Lengths) -> None:
    """Adds that two tasks of one layer do not run at once."""
    most = 2.0 * _MOST_AHEAD
    first: Hashable = ("first", pair.one, pair.other)
    program.variable(first, high=1.0, is_whole=True)
    program.row({**_after(pair.one, pair.other, lengths), first: -most}, low=-most)
    program.row({**_after(pair.other, pair.one, lengths), first: most}, low=0.0)


def _after(first: str, second: str, lengths: Lengths) -> dict[Hashable, float]:
    """How long `second` starts after `first` has ended."""
    terms: dict[Hashable, float] = {("start", second): 1.0, ("start", first): -1.0}
    for name, value in lengths[first].items():
        terms[name] = terms.get(name, 0.0) - value
    return terms
