"""From a way of splitting operations to the plan in which they overlap best.

Stage I orders nano-operations, each at its best speed, so that the time per layer is least. Stage
II keeps that order, and shares the GPU out among those that run side by side.

Source: NanoFlow (arXiv 2408.12757v2), section 4.1; there a layer by itself is made short, here the
period of a pipeline over layers.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

from nanoflow_jax.nanobatch import legality, operations
from nanoflow_jax.nanobatch.dependencies import value_dependencies
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import NanoOperation, Plan, TokenRange, find_cells
from nanoflow_jax.search import periodic
from nanoflow_jax.search.interference import Speeds

# Shares that a nano-operation may be given.
LEVELS = tuple(level / 10 for level in range(1, 11))
_SHORT = frozenset({"rope", "append", "norm"})
# Starts nearer to each other than this, in periods, are the same.
_SAME = 1e-5

# Where the search for shares begins; and how often order and shares are sought in turn at most.
_FIRST_SHARES = {Resource.COMPUTE: 0.8, Resource.MEMORY: 0.4, Resource.NETWORK: 0.2}
_ROUNDS = 6
_LEAST_S = 1.0

# Seconds of an operation over some tokens, alone on the device.
Times = Callable[[str, int], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """How operations are split.

    Attributes:
        shape: Of a layer.
        num_tokens: Of the dense batch.
        ranges: Tokens of each nano-operation, by operation; operations of a way that is not taken
            are left out.
        granule: Ranges begin at its multiples.
    """

    shape: operations.LayerShape
    num_tokens: int
    ranges: Mapping[str, tuple[TokenRange, ...]]
    granule: int

    def unordered(self) -> Plan:
        """A plan of these nano-operations in the order of the layer, which nobody has checked."""
        graph = operations.layer_graph(self.shape)
        order = [
            NanoOperation(operation=op.name, tokens=tokens, lane=lane(op))
            for op in graph.operations
            for tokens in self.ranges.get(op.name, ())
        ]
        cells = find_cells([nano.tokens for nano in order], num_tokens=self.num_tokens)
        return Plan(
            name="unordered",
            shape=self.shape,
            num_tokens=self.num_tokens,
            granule=self.granule,
            decode_weights=tuple(cell.length for cell in cells),
            order=tuple(order),
        )


def lane(op: operations.Operation) -> Resource | None:
    """The lane of an operation; what XLA makes itself is short and in none."""
    return None if op.name in _SHORT else op.resource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A plan, and what is predicted of it.

    Attributes:
        plan: Legal.
        period_s: Time per layer.
        shares: Of each nano-operation in a lane, by its key in the plan.
        starts: When each starts, in periods.
    """

    plan: Plan
    period_s: float
    shares: dict[str, float]
    starts: dict[str, float]


def find(
    split: Split, times: Times, speeds: Speeds, *, num_sms: int, name: str, seconds: float = 60.0
) -> Pipeline:
    """The best plan for a way of splitting.

    Args:
        split: How operations are split.
        times: Of each, alone.
        speeds: Of shares.
        num_sms: Of the device.
        name: Of the plan.
        seconds: Time to search.

    Raises:
        ProgramError: None was found in time.
    """
    until = time.monotonic() + seconds
    draft = split.unordered()
    problem = _Problem(draft, times)
    best: _Shared | None = None
    shares = {key: _FIRST_SHARES[lane] for key, lane in problem.lanes.items() if lane is not None}
    for number in range(_ROUNDS):
        left = max(until - time.monotonic(), _LEAST_S)
        if number and left <= _LEAST_S:
            break
        each = left / 4  # two stages now, and another round
        try:
            found = _round(problem, shares, speeds, seconds=each)
        except periodic.ProgramError:
            if best is None:
                raise
            break
        if best is not None and found.period_s > best.period_s * (1 - _SAME):
            break
        best, shares = found, found.shares
    assert best is not None
    plan = _ordered(draft, problem, best, num_sms=num_sms, name=name)
    legality.check(plan)
    return Pipeline(plan=plan, period_s=best.period_s, shares=best.shares, starts=best.starts)


def _round(
    problem: "_Problem", shares: Mapping[str, float], speeds: Speeds, *, seconds: float
) -> "_Shared":
    """Stage I with tasks as long as some shares make them, then stage II."""
    slowed = problem.slowed(speeds, shares)
    order = periodic.best_schedule(slowed, problem.waits, apart=problem.apart, seconds=seconds)
    lengths = {task.name: task.seconds for task in slowed}
    return _share_out(problem, order, lengths, speeds, seconds=seconds)


class _Problem:
    """The nano-operations of a draft as tasks; keys of the draft are their names."""

    def __init__(self, draft: Plan, times: Times) -> None:
        self.lanes = {key: nano.lane for key, nano in zip(draft.keys, draft.order, strict=True)}
        self.tasks = [
            periodic.Task(
                name=key, seconds=times(nano.operation, nano.tokens.length), lane=nano.lane
            )
            for key, nano in zip(draft.keys, draft.order, strict=True)
        ]
        self.seconds = {task.name: task.seconds for task in self.tasks}
        graph = draft.graph
        found = {
            periodic.Wait(
                first=draft.keys[writer.place],
                second=draft.keys[reader.place],
                distance=reader.layer - writer.layer,
            )
            for writer, reader in value_dependencies(draft, [graph, graph])
            if reader.layer == 1
        }
        self.waits = sorted(found, key=lambda wait: (wait.first, wait.second, wait.distance))
        waiting = {(wait.first, wait.second) for wait in self.waits if wait.distance == 0}
        # The cache of a layer is one buffer, changed in place.
        self.apart = [
            periodic.Apart(one=writer, other=reader)
            for writer in self._keys(draft, lambda op: op.writes == operations.CACHE)
            for reader in self._keys(draft, lambda op: operations.CACHE in op.reads)
            if writer != reader and (writer, reader) not in waiting
        ]

    @property
    def busiest_lane_s(self) -> float:
        """Least time per layer, whatever the order."""
        lanes = set(self.lanes.values()) - {None}
        return max(sum(t.seconds for t in self.tasks if t.lane == lane) for lane in lanes)

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

    @staticmethod
    def _keys(draft: Plan, wanted: Callable[[operations.Operation], bool]) -> list[str]:
        return [
            key
            for key, nano in zip(draft.keys, draft.order, strict=True)
            if wanted(draft.graph.by_name[nano.operation])
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shared:
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


def _share_out(
    problem: _Problem,
    order: periodic.Schedule,
    lengths_in_it: Mapping[str, float],
    speeds: Speeds,
    *,
    seconds: float,
) -> _Shared:
    """Stage II: shares for tasks in a given order; those that ran at once there may still do so.

    Args:
        problem: The tasks.
        order: A schedule of them.
        lengths_in_it: Seconds of each task in that schedule.
        speeds: Of shares.
        seconds: Time to search.
    """
    scale = sum(problem.seconds.values())
    program = periodic.Program()
    program.variable("rate", cost=-1.0)
    lengths: dict[str, Mapping[Hashable, float]] = {
        task.name: {"rate": task.seconds / scale} for task in problem.tasks
    }
    in_lanes = [task for task in problem.tasks if task.lane is not None]
    most = scale / max(problem.busiest_lane_s, 1e-12)
    for task in in_lanes:
        lengths[task.name] = _add_levels(program, task, speeds, scale, most)
    periodic.add_starts(program, list(problem.seconds))
    periodic.add_waits(program, problem.waits, lengths)
    length = {key: value / order.period_s for key, value in lengths_in_it.items()}
    for pair in problem.apart:
        first = _earlier(order, pair)
        periodic.add_waits(program, [first], lengths)
    together, apart = [], set()
    for one, other in [*periodic.lane_pairs(problem.tasks), *_cross_pairs(problem)]:
        if _run_at_once(order, length, one, other):
            together.append((one, other))
            program.row({("share", one): 1.0, ("share", other): 1.0}, high=1.0)
        else:
            ahead = _layers_ahead(order, length, one, other)
            periodic.add_fixed_order(program, one, other, ahead, lengths)
            apart.add(frozenset((one, other)))
    _add_triples(program, [task.name for task in in_lanes], together)
    values, _, _ = program.solve(seconds=seconds)
    if values["rate"] < 1e-9:  # that nothing ever runs is a solution too
        raise periodic.ProgramError(f"no shares were found: {seconds:.0f} s were too few")
    return _Shared(
        period_s=scale / values["rate"],
        shares={task.name: round(values["share", task.name], 3) for task in in_lanes},
        starts={task.name: values["start", task.name] for task in problem.tasks},
        apart=frozenset(apart),
    )


def _earlier(order: periodic.Schedule, pair: periodic.Apart) -> periodic.Wait:
    if order.starts[pair.one] <= order.starts[pair.other]:
        return periodic.Wait(first=pair.one, second=pair.other)
    return periodic.Wait(first=pair.other, second=pair.one)


def _run_at_once(
    order: periodic.Schedule, length: Mapping[str, float], one: str, other: str
) -> bool:
    """Whether two tasks, of whatever layers, run at once; lengths are in periods."""
    gap = (order.starts[other] - order.starts[one]) % 1.0
    return length[one] - gap > _SAME or gap + length[other] - 1.0 > _SAME


def _layers_ahead(
    order: periodic.Schedule, length: Mapping[str, float], one: str, other: str
) -> int:
    """See `periodic.add_order`; of two tasks that do not run at once."""
    return math.ceil(order.starts[one] + length[one] - order.starts[other] - 2 * _SAME)


def _add_levels(
    program: periodic.Program,
    task: periodic.Task,
    speeds: Speeds,
    scale: float,
    most: float,
) -> dict[Hashable, float]:
    """The share of a task, one of `LEVELS`, and its length by it."""
    assert isinstance(task.lane, Resource)
    share: Hashable = ("share", task.name)
    program.variable(share, high=1.0)
    length: dict[Hashable, float] = {}
    chosen: dict[Hashable, float] = {}
    rates: dict[Hashable, float] = {}
    levels: dict[Hashable, float] = {}
    for level in LEVELS:
        is_it: Hashable = ("is", task.name, level)
        rate: Hashable = ("rate", task.name, level)  # the rate if it is this one, else 0
        program.variable(is_it, high=1.0, is_whole=True)
        program.variable(rate, high=most)
        program.row({rate: 1.0, is_it: -most}, high=0.0)
        chosen[is_it], rates[rate], levels[is_it] = 1.0, 1.0, level
        length[rate] = task.seconds / scale / speeds.speed(task.lane, level)
    program.row(chosen, low=1.0, high=1.0)
    program.row({**rates, "rate": -1.0}, low=0.0, high=0.0)
    program.row({**levels, share: -1.0}, low=0.0, high=0.0)
    return length


def _cross_pairs(problem: _Problem) -> list[tuple[str, str]]:
    """Each two tasks of two lanes."""
    in_lanes = [task for task in problem.tasks if task.lane is not None]
    return [
        (one.name, other.name)
        for i, one in enumerate(in_lanes)
        for other in in_lanes[:i]
        if one.lane != other.lane
    ]


def _add_triples(
    program: periodic.Program, names: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> None:
    """Three tasks, each two of which run at once, share the device."""
    known = {frozenset(pair) for pair in pairs}
    for three in itertools.combinations(names, 3):
        if all(frozenset(pair) in known for pair in itertools.combinations(three, 2)):
            program.row({("share", key): 1.0 for key in three}, high=1.0)


def _ordered(draft: Plan, problem: _Problem, shared: _Shared, *, num_sms: int, name: str) -> Plan:
    """The plan of a schedule: tasks in the order in which they start within a period."""
    place_of = {key: place for place, key in enumerate(draft.keys)}

    def when(key: str) -> tuple[int, float]:
        start = round(shared.starts[key] / _SAME) * _SAME
        turn = int(start)
        return turn, round(start - turn, 9)

    last_turn = max(when(key)[0] for key in draft.keys)
    shifts = {key: last_turn - when(key)[0] for key in draft.keys}
    keys = sorted(draft.keys, key=lambda key: (when(key)[1], place_of[key]))
    order = []
    for number, key in enumerate(keys):
        share = shared.shares.get(key)
        before = [*keys[:number][::-1], *keys[number + 1 :][::-1]]
        order.append(
            dataclasses.replace(
                draft.order[place_of[key]],
                shift=shifts[key],
                num_ctas=None if share is None else max(1, int(share * num_sms + 1e-6)),
                after=_after(key, before, shifts, problem, shared),
            )
        )
    return dataclasses.replace(draft, name=name, num_sms=num_sms, order=tuple(order))


def _after(
    key: str,
    before: Sequence[str],
    shifts: Mapping[str, int],
    problem: _Problem,
    shared: _Shared,
) -> tuple[str, ...]:
    """The last tasks of each other lane that a task must not run beside.

    One of each shift: in the first and last turns of a model those of some shifts are missing, and
    waiting for one that is missing would not wait for those before it in its lane.

    Args:
        key: The task.
        before: All others, last first, those of the turn before at the end.
        shifts: Of every task.
        problem: Its lanes.
        shared: What may run beside what.
    """
    found: dict[tuple[Resource | None, int], str] = {}
    for other in before:
        lane = problem.lanes[other]
        if frozenset((key, other)) in shared.apart and lane != problem.lanes[key]:
            found.setdefault((lane, shifts[other]), other)
    return tuple(sorted(found.values()))
