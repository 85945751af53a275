"""Stage II: shares of a GPU for the tasks of a layer, so that those that run at once fit.

What a share is, and how fast a task is on it, is said in `interference`. At every moment the shares
of what runs add up to at most one. So over a period, shares times durations add up to at most the
period, whatever the order: that is `least_period_s`, together with lanes, in which one task runs
after another.

Source: NanoFlow (arXiv 2408.12757v2), section 4.1.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence

from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.search import periodic
from nanoflow_jax.search.interference import Speeds

# Shares that a task may be given.
LEVELS = tuple(level / 10 for level in range(1, 11))
# Starts nearer to each other than this, in periods, are the same.
SAME = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What a layer does, over and over.

    Attributes:
        tasks: As long as they take alone on the device; lanes are resources.
        waits: What waits for what.
        apart: What may not run at once, in the same layer.
    """

    tasks: tuple[periodic.Task, ...]
    waits: tuple[periodic.Wait, ...]
    apart: tuple[periodic.Apart, ...] = ()

    @functools.cached_property
    def lanes(self) -> dict[str, Hashable | None]:
        """Of each task, by its name."""
        return {task.name: task.lane for task in self.tasks}

    @property
    def in_lanes(self) -> list[periodic.Task]:
        """Tasks that get a share."""
        return [task for task in self.tasks if task.lane is not None]

    def slowed(self, speeds: Speeds, shares: Mapping[str, float]) -> list[periodic.Task]:
        """The tasks, each as long as its share makes it."""
        return [
            task
            if not isinstance(task.lane, Resource)
            else dataclasses.replace(
                task, seconds=task.seconds / speeds.speed(task.lane, shares[task.name])
            )
            for task in self.tasks
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """A schedule with shares.

    Attributes:
        period_s: Time per layer.
        shares: Of each task in a lane.
        starts: In periods.
        apart: Tasks of two lanes that do not run at once.
    """

    period_s: float
    shares: dict[str, float]
    starts: dict[str, float]
    apart: frozenset[frozenset[str]]


def least_period_s(seconds: Mapping[Resource, float], speeds: Speeds) -> float:
    """No order and no shares have a shorter period.

    Args:
        seconds: Of all tasks of each lane, alone on the device.
        speeds: Of shares.
    """
    whole = sum(
        alone * min(level / speeds.speed(lane, level) for level in LEVELS)
        for lane, alone in seconds.items()
    )
    return max([whole, *seconds.values()])


def share_out(
    layer: Layer,
    order: periodic.Schedule,
    lengths_in_it: Mapping[str, float],
    speeds: Speeds,
    *,
    seconds: float,
) -> Shared:
    """The best shares for tasks in a given order; those that ran at once there may still do so.

    Args:
        layer: The tasks.
        order: A schedule of them.
        lengths_in_it: Seconds of each task in that schedule.
        speeds: Of shares.
        seconds: Time to search.

    Raises:
        ProgramError: None were found in time.
    """
    model = _Model(layer, speeds)
    length = {key: value / order.period_s for key, value in lengths_in_it.items()}
    periodic.add_waits(
        model.program, [_earlier(order, pair) for pair in layer.apart], model.lengths
    )
    together, apart = [], set()
    for one, other in [*periodic.lane_pairs(layer.tasks), *_cross_pairs(layer)]:
        if _run_at_once(order, length, one, other):
            together.append((one, other))
            model.program.row({("share", one): 1.0, ("share", other): 1.0}, high=1.0)
        else:
            ahead = _layers_ahead(order, length, one, other)
            periodic.add_fixed_order(model.program, one, other, ahead, model.lengths)
            apart.add(frozenset((one, other)))
    for three in _triples(layer, together):
        model.program.row({("share", key): 1.0 for key in three}, high=1.0)
    values, _ = model.solve(seconds=seconds)
    return model.shared(values, apart)


class _Model:
    """A program with a share and a start for each task.

    Invariant: `lengths` are in periods, by the shares that the program has chosen.
    """

    def __init__(self, layer: Layer, speeds: Speeds) -> None:
        self.program = periodic.Program()
        self._layer = layer
        self._scale = sum(task.seconds for task in layer.tasks)
        lane_s: dict[Resource, float] = {}
        for task in layer.in_lanes:
            assert isinstance(task.lane, Resource)
            lane_s[task.lane] = lane_s.get(task.lane, 0.0) + task.seconds
        self._most = self._scale / max(least_period_s(lane_s, speeds), 1e-12)
        self.program.variable("rate", high=self._most, cost=-1.0)
        self.lengths: dict[str, Mapping[Hashable, float]] = {
            task.name: {"rate": task.seconds / self._scale} for task in layer.tasks
        }
        area: dict[Hashable, float] = {}
        for task in layer.in_lanes:
            self.lengths[task.name] = self._add_levels(task, speeds, area)
        self.program.row(area, high=1.0)
        for lane in lane_s:
            busy: dict[Hashable, float] = {}
            for task in layer.in_lanes:
                if task.lane == lane:
                    busy.update(self.lengths[task.name])
            self.program.row(busy, high=1.0)
        periodic.add_starts(self.program, [task.name for task in layer.tasks])
        periodic.add_waits(self.program, layer.waits, self.lengths)

    def _add_levels(
        self, task: periodic.Task, speeds: Speeds, area: dict[Hashable, float]
    ) -> dict[Hashable, float]:
        """The share of a task, one of `LEVELS`, and its length by it; adds share times length."""
        assert isinstance(task.lane, Resource)
        program, share = self.program, ("share", task.name)
        program.variable(share, high=1.0)
        length: dict[Hashable, float] = {}
        chosen: dict[Hashable, float] = {}
        rates: dict[Hashable, float] = {}
        levels: dict[Hashable, float] = {}
        for level in LEVELS:
            is_it: Hashable = ("is", task.name, level)
            rate: Hashable = ("rate", task.name, level)  # the rate if it is this one, else 0
            program.variable(is_it, high=1.0, is_whole=True)
            program.variable(rate, high=self._most)
            program.row({rate: 1.0, is_it: -self._most}, high=0.0)
            chosen[is_it], rates[rate], levels[is_it] = 1.0, 1.0, level
            length[rate] = task.seconds / self._scale / speeds.speed(task.lane, level)
            area[rate] = level * length[rate]
        program.row(chosen, low=1.0, high=1.0)
        program.row({**rates, "rate": -1.0}, low=0.0, high=0.0)
        program.row({**levels, share: -1.0}, low=0.0, high=0.0)
        return length

    def ask_for(self, shorter_than_s: float) -> None:
        """Rules out all schedules of a longer period."""
        self.program.row({"rate": 1.0}, low=self._scale / shorter_than_s)

    def solve(self, *, seconds: float) -> tuple[dict[Hashable, float], float]:
        """Values, and a period than which none is shorter."""
        values, bound, _ = self.program.solve(seconds=seconds)
        if values["rate"] < 1e-9:  # that nothing ever runs is a solution too
            raise periodic.ProgramError(f"no shares were found: {seconds:.0f} s were too few")
        highest = min(max(periodic.highest_rate(bound), values["rate"]), self._most)
        return values, self._scale / highest

    def shared(self, values: Mapping[Hashable, float], apart: set[frozenset[str]]) -> Shared:
        return Shared(
            period_s=self._scale / values["rate"],
            shares={
                task.name: round(values["share", task.name], 3) for task in self._layer.in_lanes
            },
            starts={task.name: values["start", task.name] for task in self._layer.tasks},
            apart=frozenset(apart),
        )


def search_all(
    layer: Layer, speeds: Speeds, *, shorter_than_s: float, seconds: float
) -> tuple[Shared, float]:
    """The best order and the best shares, sought at once: the best of all.

    Args:
        layer: The tasks.
        speeds: Of shares.
        shorter_than_s: Only schedules with a shorter period are looked for.
        seconds: Time to search; then the best so far is given.

    Returns:
        It, and a period than which none is shorter.

    Raises:
        NoScheduleError: None has a shorter period.
        ProgramError: None was found in time.
    """
    model = _Model(layer, speeds)
    program, pairs = model.program, _cross_pairs(layer)
    model.ask_for(shorter_than_s)
    periodic.add_start(program, layer.in_lanes[0].name)
    for pair in layer.apart:
        periodic.add_apart(program, pair, model.lengths)
    for one, other in periodic.lane_pairs(layer.tasks):
        periodic.add_order(program, one, other, model.lengths)
    for one, other in pairs:
        at_once = _at_once(one, other)
        program.variable(at_once, high=1.0, is_whole=True)
        periodic.add_order_unless(program, one, other, model.lengths, unless=at_once)
        program.row({("share", one): 1.0, ("share", other): 1.0, at_once: 1.0}, high=2.0)
    for three in _triples(layer, pairs):
        shares: dict[Hashable, float] = {("share", key): 1.0 for key in three}
        each_two = {_at_once(*two): 1.0 for two in itertools.combinations(three, 2)}
        program.row({**shares, **each_two}, high=1.0 + len(each_two))
    values, bound_s = model.solve(seconds=seconds)
    apart = {frozenset(pair) for pair in pairs if values[_at_once(*pair)] < 0.5}
    return model.shared(values, apart), bound_s


def _at_once(one: str, other: str) -> Hashable:
    return "at once", frozenset((one, other))


def _earlier(order: periodic.Schedule, pair: periodic.Apart) -> periodic.Wait:
    if order.starts[pair.one] <= order.starts[pair.other]:
        return periodic.Wait(first=pair.one, second=pair.other)
    return periodic.Wait(first=pair.other, second=pair.one)


def _run_at_once(
    order: periodic.Schedule, length: Mapping[str, float], one: str, other: str
) -> bool:
    """Whether two tasks, of whatever layers, run at once; lengths are in periods."""
    gap = (order.starts[other] - order.starts[one]) % 1.0
    return length[one] - gap > SAME or gap + length[other] - 1.0 > SAME


def _layers_ahead(
    order: periodic.Schedule, length: Mapping[str, float], one: str, other: str
) -> int:
    """See `periodic.add_order`; of two tasks that do not run at once."""
    return math.ceil(order.starts[one] + length[one] - order.starts[other] - 2 * SAME)


def _cross_pairs(layer: Layer) -> list[tuple[str, str]]:
    """Each two tasks of two lanes."""
    return [
        (one.name, other.name)
        for i, one in enumerate(layer.in_lanes)
        for other in layer.in_lanes[:i]
        if one.lane != other.lane
    ]


def _triples(layer: Layer, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Three tasks, each two of which are a pair; their names."""
    known = {frozenset(pair) for pair in pairs}
    names = [task.name for task in layer.in_lanes]
    return [
        three
        for three in itertools.combinations(names, 3)
        if all(frozenset(pair) in known for pair in itertools.combinations(three, 2))
    ]
