"""From a way of splitting operations to the plan in which they overlap best.

Stage I orders nano-operations, each as fast as some shares of the GPU make it, so that the time per
layer is least. Stage II keeps that order, and shares the GPU out among those that run side by side.
Done in turn they are fast, and may end where neither alone has something better; done at once they
find the best plan of all, if there is time for it.

Source: NanoFlow (arXiv 2408.12757v2), section 4.1; there a layer by itself is made short, here the
period of a pipeline over layers.
"""

import dataclasses
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

from nanoflow_jax.nanobatch import legality, operations
from nanoflow_jax.nanobatch.dependencies import value_dependencies
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import NanoOperation, Plan, TokenRange, find_cells
from nanoflow_jax.search import interference, periodic
from nanoflow_jax.search.interference import Speeds
from nanoflow_jax.search.shares import LEVELS, SAME, Layer, Shared, search_all, share_out

_SHORT = frozenset({"rope", "append", "norm"})

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
    """A good plan for a way of splitting, soon: stages I and II in turn.

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
    speeds = speeds.rounded(LEVELS, num_sms)
    draft = split.unordered()
    layer = _layer(draft, times)
    best: Shared | None = None
    shares = {task.name: _FIRST_SHARES[Resource(str(task.lane))] for task in layer.in_lanes}
    for number in range(_ROUNDS):
        left = max(until - time.monotonic(), _LEAST_S)
        if number and left <= _LEAST_S:
            break
        each = left / 4  # two stages now, and another round
        try:
            found = _round(layer, shares, speeds, seconds=each)
        except periodic.ProgramError:
            if best is None:
                raise
            break
        if best is not None and found.period_s > best.period_s * (1 - SAME):
            break
        best, shares = found, found.shares
    assert best is not None
    return _pipeline(draft, layer, best, num_sms=num_sms, name=name)


def find_best(
    split: Split,
    times: Times,
    speeds: Speeds,
    *,
    num_sms: int,
    name: str,
    shorter_than_s: float,
    seconds: float,
) -> tuple[Pipeline, float]:
    """The best plan for a way of splitting: both stages at once, which takes much longer.

    Args:
        split: How operations are split.
        times: Of each, alone.
        speeds: Of shares.
        num_sms: Of the device.
        name: Of the plan.
        shorter_than_s: Only plans with a shorter period are looked for.
        seconds: Time to search; then the best so far is given.

    Returns:
        It, and a period than which none is shorter.

    Raises:
        NoScheduleError: None has a shorter period.
        ProgramError: None was found in time.
    """
    speeds = speeds.rounded(LEVELS, num_sms)
    draft = split.unordered()
    layer = _layer(draft, times)
    found, bound_s = search_all(layer, speeds, shorter_than_s=shorter_than_s, seconds=seconds)
    return _pipeline(draft, layer, found, num_sms=num_sms, name=name), bound_s


def _pipeline(draft: Plan, layer: Layer, found: Shared, *, num_sms: int, name: str) -> Pipeline:
    plan = _ordered(draft, layer, found, num_sms=num_sms, name=name)
    legality.check(plan)
    return Pipeline(plan=plan, period_s=found.period_s, shares=found.shares, starts=found.starts)


def _round(layer: Layer, shares: Mapping[str, float], speeds: Speeds, *, seconds: float) -> Shared:
    """Stage I with tasks as long as some shares make them, then stage II."""
    slowed = layer.slowed(speeds, shares)
    order = periodic.best_schedule(slowed, layer.waits, apart=layer.apart, seconds=seconds)
    lengths = {task.name: task.seconds for task in slowed}
    return share_out(layer, order, lengths, speeds, seconds=seconds)


def _layer(draft: Plan, times: Times) -> Layer:
    """The nano-operations of a draft as tasks; keys of the draft are their names."""
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
    waiting = {(wait.first, wait.second) for wait in found if wait.distance == 0}
    # The cache of a layer is one buffer, changed in place.
    apart = (
        periodic.Apart(one=writer, other=reader)
        for writer in _keys(draft, lambda op: op.writes == operations.CACHE)
        for reader in _keys(draft, lambda op: operations.CACHE in op.reads)
        if writer != reader and (writer, reader) not in waiting
    )
    return Layer(
        tasks=tuple(
            periodic.Task(
                name=key, seconds=times(nano.operation, nano.tokens.length), lane=nano.lane
            )
            for key, nano in zip(draft.keys, draft.order, strict=True)
        ),
        waits=tuple(sorted(found, key=lambda wait: (wait.first, wait.second, wait.distance))),
        apart=tuple(apart),
    )


def _keys(draft: Plan, wanted: Callable[[operations.Operation], bool]) -> list[str]:
    return [
        key
        for key, nano in zip(draft.keys, draft.order, strict=True)
        if wanted(draft.graph.by_name[nano.operation])
    ]


def _ordered(draft: Plan, layer: Layer, shared: Shared, *, num_sms: int, name: str) -> Plan:
    """The plan of a schedule: tasks in the order in which they start within a period."""
    place_of = {key: place for place, key in enumerate(draft.keys)}

    def when(key: str) -> tuple[int, float]:
        start = round(shared.starts[key] / SAME) * SAME
        turn = int(start)
        return turn, round(start - turn, 9)

    last_turn = max(when(key)[0] for key in draft.keys)
    shifts = {key: last_turn - when(key)[0] for key in draft.keys}
    keys = sorted(draft.keys, key=lambda key: (when(key)[1], place_of[key]))
    order = []
    for number, key in enumerate(keys):
        share = shared.shares.get(key)
        before = keys[:number][::-1], keys[number + 1 :][::-1]
        order.append(
            dataclasses.replace(
                draft.order[place_of[key]],
                shift=shifts[key],
                num_ctas=None if share is None else interference.num_ctas(share, num_sms),
                after=_after(key, before, shifts, layer, shared),
            )
        )
    return dataclasses.replace(draft, name=name, num_sms=num_sms, order=tuple(order))


def _after(
    key: str,
    before: tuple[Sequence[str], Sequence[str]],
    shifts: Mapping[str, int],
    layer: Layer,
    shared: Shared,
) -> tuple[str, ...]:
    """The last tasks of each other lane that a task must not run beside.

    One of each shift, of this turn and of the turn before: in the first and last turns of a model
    those of some shifts are missing, and waiting for one that is missing would not wait for those
    before it in its lane.

    Args:
        key: The task.
        before: Others of this turn, last first, and those of the turn before.
        shifts: Of every task.
        layer: Its lanes.
        shared: What may run beside what.
    """
    found: dict[tuple[int, Hashable, int], str] = {}
    for turn, others in enumerate(before):
        for other in others:
            lane = layer.lanes[other]
            if frozenset((key, other)) in shared.apart and lane != layer.lanes[key]:
                found.setdefault((turn, lane, shifts[other]), other)
    return tuple(sorted(found.values()))
