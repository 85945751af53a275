"""Says for one request which layers the client runs and which the server, or that none will do."""

import dataclasses
import enum
from collections.abc import Callable, Sequence

from nanoflow_jax.split.planning import baselines, search
from nanoflow_jax.split.planning import problem as problems
from nanoflow_jax.split.planning.asked import Policy, Request, Side
from nanoflow_jax.split.planning.costs import Model
from nanoflow_jax.split.planning.problem import PER_SECOND, Outcome, Placement, Problem
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile


class VerdictKind(enum.StrEnum):
    """What to do with a request."""

    SPLIT = "split"
    ALL_SERVER = "all_server"
    ALL_CLIENT = "all_client"
    REJECT = "reject"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """Nodes [start, stop) that run on one side."""

    side: Side
    start: int
    stop: int


def layers_of(model: Model, stretch: Stretch) -> tuple[int, int]:
    """Layers [start, stop) of a stretch, as an engine of pieces runs them.

    The embedding goes with layer 0, the head with the last.

    Raises:
        ValueError: It begins or ends within a layer, or between a layer and embedding or head.
    """
    ends = {0: 0, len(model.nodes): model.config.num_layers}
    borders = ends | {1 + 2 * layer: layer for layer in range(1, model.config.num_layers)}
    if stretch.start not in borders or stretch.stop not in borders:
        raise ValueError(
            f"nodes {stretch.start}:{stretch.stop} are no whole layers; plan with a grid of at "
            "least 1"
        )
    return borders[stretch.start], borders[stretch.stop]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Where a time goes, in seconds, one after the other.

    Attributes:
        client_s: Nodes on the client.
        up_s: Messages to the server.
        server_s: Nodes there.
        down_s: Messages to the client.
        moving_s: Cached tokens on their way.
    """

    client_s: float
    up_s: float
    server_s: float
    down_s: float
    moving_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Where a request's nodes run and what is expected of it.

    Times count messages as deadlines do, by their slow ones.

    Attributes:
        prefill: Where its prompt is done, stretch after stretch.
        decode: Where its further tokens are; the same unless cached tokens migrate.
        ttft_s: Until the client has the first token.
        tpot_s: Between two tokens.
        e2e_s: Until the client has the last one.
        first_token: What the first token waits for.
        step: What a further one does.
        charge_s: What it is charged of the server's time; with `priced` accounting its price.
        round_trips: Of each decode step.
        client_memory_bytes: Of weights and cached tokens that it needs there.
    """

    prefill: tuple[Stretch, ...]
    decode: tuple[Stretch, ...]
    ttft_s: float
    tpot_s: float
    e2e_s: float
    first_token: Parts
    step: Parts
    charge_s: float
    round_trips: int
    client_memory_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The least that any placement reaches, each by itself; the client's memory left aside."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer for one request.

    Attributes:
        kind: What to do.
        plan: How; None if it is rejected.
        meets_deadlines: False for a rejected request, and for a best effort.
        all_server_charge_s: What the server would be charged if it ran all that may run there.
        best: What could be had; worked out for requests whose deadlines are not met.
        reason: In words.
    """

    kind: VerdictKind
    plan: Plan | None
    meets_deadlines: bool
    all_server_charge_s: float
    best: Best | None
    reason: str


def plan(
    model: Model,
    client: DeviceProfile,
    server: DeviceProfile,
    link: LinkProfile,
    request: Request,
    policy: Policy,
    *,
    among: Callable[[Problem], Sequence[Placement]] | None = None,
    present: Placement | None = None,
) -> Verdict:
    """Places one request so that the server is charged least and its deadlines are met.

    Args:
        model: Whose layers; keep it from request to request, for it remembers its nodes.
        client: The machine that asks.
        server: The machine that serves.
        link: Between them.
        request: With its deadlines.
        policy: What placements may look like.
        among: The placements to choose from, which units allow; None is all.
        present: Where the request before ran: it stays so while deadlines hold, unless another
            placement is charged less by `least_saving`.

    Raises:
        ValueError: The policy contradicts itself or the model, or a profile lacks what is needed;
            or there is none to choose from.
    """
    problem = problems.build(model, client, server, link, request, policy)
    alone = baselines.all_on(problem, Side.SERVER)
    all_server = problems.outcome(problem, alone)
    choices = None if among is None else among(problem)
    if choices is None:
        placed = search.cheapest(problem, max_labels=policy.max_labels)
    else:
        placed = cheapest_of(problem, choices)
    if placed is None:
        return _not_met(problem, all_server, policy, choices)
    if kind_of(alone) is VerdictKind.ALL_SERVER and all_server.meets(problem.limits):
        charge = problems.outcome(problem, placed).charge
        if charge and charge > (1 - policy.least_saving) * all_server.charge:
            placed = alone
    if present is not None and _stays(problem, present, placed, policy):
        placed = present
    kind = kind_of(placed)
    return Verdict(
        kind=kind,
        plan=as_plan(problem, placed),
        meets_deadlines=True,
        all_server_charge_s=all_server.charge / PER_SECOND,
        best=None,
        reason=_REASONS[kind],
    )


def cheapest_of(problem: Problem, choices: Sequence[Placement]) -> Placement | None:
    """The placement of some, within the limits, of least charge; None if none is."""
    found = [(problems.outcome(problem, one), one) for one in choices]
    kept = [(result.rank, one) for result, one in found if result.meets(problem.limits)]
    return min(kept, key=lambda pair: pair[0])[1] if kept else None


def _stays(problem: Problem, present: Placement, placed: Placement, policy: Policy) -> bool:
    """Whether the present placement may still be kept, and another does not save enough."""
    if len(present.decode) != len(problem.units):
        return False
    both = zip(problem.units, present.prefill, present.decode, strict=True)
    now = problems.outcome(problem, present)
    if not all({at, then} <= unit.allowed for unit, at, then in both):
        return False
    least = problems.outcome(problem, placed).charge
    return now.meets(problem.limits) and least > (1 - policy.least_saving) * now.charge


_REASONS = {
    VerdictKind.SPLIT: "sharing the layers charges the server least within the deadlines",
    VerdictKind.ALL_CLIENT: "the client meets the deadlines by itself",
    VerdictKind.ALL_SERVER: "no placement with layers on the client is within the deadlines and "
    "charges the server enough less",
}


def _not_met(
    problem: Problem,
    all_server: Outcome,
    policy: Policy,
    choices: Sequence[Placement] | None,
) -> Verdict:
    best = _best(problem, choices)
    placed = baselines.all_on(problem, Side.SERVER)
    is_served = policy.best_effort and kind_of(placed) is VerdictKind.ALL_SERVER
    missed = _missed(problem, best)
    return Verdict(
        kind=VerdictKind.ALL_SERVER if is_served else VerdictKind.REJECT,
        plan=as_plan(problem, placed) if is_served else None,
        meets_deadlines=False,
        all_server_charge_s=all_server.charge / PER_SECOND,
        best=best,
        reason=f"no placement meets the deadlines: {missed}"
        + ("; served as well as it can be" if is_served else ""),
    )


def _missed(problem: Problem, best: Best) -> str:
    """Which deadlines nothing meets, in the request's own words."""
    limits = problem.limits
    pairs = (
        ("the first token", best.ttft_s, limits.ttft),
        ("a token", best.tpot_s, limits.tpot),
        ("the whole answer", best.e2e_s, limits.e2e),
    )
    late = [
        f"{name} takes {least * 1e3:.1f} ms at best, {limit / PER_SECOND * 1e3:.1f} are allowed "
        "after the guard"
        for name, least, limit in pairs
        if limit is not None and least * PER_SECOND > limit
    ]
    return "; ".join(late) or "each alone can be had, but not all together with the client's memory"


def _best(problem: Problem, choices: Sequence[Placement] | None) -> Best:
    """Quickest placements under nothing but where units may run, which is never nowhere."""
    if choices is not None:
        found = [problems.outcome(problem, one) for one in choices]
        return Best(
            ttft_s=min(one.ttft for one in found) / PER_SECOND,
            tpot_s=min(one.tpot for one in found) / PER_SECOND,
            e2e_s=min(one.e2e for one in found) / PER_SECOND,
        )
    weights = {"ttft": (1, 0), "tpot": (0, 1), "e2e": (1, problem.num_steps)}
    least = {}
    for name, (first, second) in weights.items():
        placed = search.quickest(problem, first=first, second=second)
        assert placed is not None
        least[name] = getattr(problems.outcome(problem, placed), name) / PER_SECOND
    return Best(ttft_s=least["ttft"], tpot_s=least["tpot"], e2e_s=least["e2e"])


def kind_of(placed: Placement) -> VerdictKind:
    """All on one side, or split."""
    sides = {*placed.prefill, *placed.decode}
    if sides == {Side.SERVER}:
        return VerdictKind.ALL_SERVER
    return VerdictKind.ALL_CLIENT if sides == {Side.CLIENT} else VerdictKind.SPLIT


def as_plan(problem: Problem, placed: Placement) -> Plan:
    """A placement with what is expected of it."""
    found = problems.outcome(problem, placed)
    decode = placed.decode
    entered = sum(
        at is not before for before, at in zip((decode[-1], *decode), decode, strict=False)
    )
    return Plan(
        prefill=_stretches(problem, placed.prefill),
        decode=_stretches(problem, decode),
        ttft_s=found.ttft / PER_SECOND,
        tpot_s=found.tpot / PER_SECOND,
        e2e_s=found.e2e / PER_SECOND,
        first_token=_first_token(problem, placed),
        step=_step(problem, placed),
        charge_s=found.charge / PER_SECOND,
        round_trips=entered // 2,
        client_memory_bytes=found.memory,
    )


def _first_token(problem: Problem, placed: Placement) -> Parts:
    units, sides = problem.units, placed.prefill
    entered = zip((Side.CLIENT, *sides), sides, units, strict=False)
    messages = dict.fromkeys(Side, 0)
    for before, at, unit in entered:
        messages[at] += unit.enter_prefill[at] if at is not before else 0
    if Side.SERVER in (sides[-1], placed.decode[-1]):
        messages[Side.CLIENT] += problem.deliver
    moving = problem.latency if placed.migrates else 0
    for at, then, unit in zip(sides, placed.decode, units, strict=True):
        moving += unit.migrate[then] if at is not then else 0
    busy = dict.fromkeys(Side, 0)
    for at, unit in zip(sides, units, strict=True):
        busy[at] += unit.prefill[at]
    return _parts(busy, messages, moving)


def _step(problem: Problem, placed: Placement) -> Parts:
    sides = placed.decode
    messages, busy = dict.fromkeys(Side, 0), dict.fromkeys(Side, 0)
    for before, at, unit in zip((sides[-1], *sides), sides, problem.units, strict=False):
        messages[at] += unit.enter_decode[at] if at is not before else 0
        busy[at] += unit.decode[at]
    return _parts(busy, messages, 0)


def _parts(busy: dict[Side, int], messages: dict[Side, int], moving: int) -> Parts:
    return Parts(
        client_s=busy[Side.CLIENT] / PER_SECOND,
        up_s=messages[Side.SERVER] / PER_SECOND,
        server_s=busy[Side.SERVER] / PER_SECOND,
        down_s=messages[Side.CLIENT] / PER_SECOND,
        moving_s=moving / PER_SECOND,
    )


def _stretches(problem: Problem, sides: Sequence[Side]) -> tuple[Stretch, ...]:
    found: list[Stretch] = []
    for unit, side in zip(problem.units, sides, strict=True):
        start = unit.start
        if found and found[-1].side is side:
            start = found.pop().start
        found.append(Stretch(side=side, start=start, stop=unit.stop))
    return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """What deadlines so many times as long would cost.

    Attributes:
        stretch: Times that a deadline must be longer or may be shorter; without any deadline,
            seconds of the whole answer.
        kind: All on one side, or split.
        plan: The cheapest.
    """

    stretch: float
    kind: VerdictKind
    plan: Plan


_FRONTIER_REACH = 4  # times the deadlines


def frontier(
    model: Model,
    client: DeviceProfile,
    server: DeviceProfile,
    link: LinkProfile,
    request: Request,
    policy: Policy,
) -> tuple[FrontierPoint, ...]:
    """The cheapest plan for all deadlines made shorter or up to four times as long alike.

    Each point is cheaper than all before it, which have shorter deadlines.

    Raises:
        ValueError: As of `plan`.
    """
    problem = problems.build(model, client, server, link, request, policy)
    limits = problem.limits
    wider = dataclasses.replace(
        limits,
        ttft=limits.ttft and _FRONTIER_REACH * limits.ttft,
        tpot=limits.tpot and _FRONTIER_REACH * limits.tpot,
        e2e=limits.e2e and _FRONTIER_REACH * limits.e2e,
    )
    reach = dataclasses.replace(problem, limits=wider)
    found = [
        (_needed(limits, result), result.rank, placed)
        for placed in search.undominated(reach, max_labels=policy.max_labels)
        for result in (problems.outcome(problem, placed),)
    ]
    points: list[FrontierPoint] = []
    least: tuple[int, int, int] | None = None
    for needed, rank, placed in sorted(found, key=lambda one: one[:2]):
        if least is None or rank[0] < least[0]:
            least = rank
            points.append(
                FrontierPoint(stretch=needed, kind=kind_of(placed), plan=as_plan(problem, placed))
            )
    return tuple(points)


def _needed(limits: problems.Limits, result: Outcome) -> float:
    """How many times as long deadlines must be for it."""
    pairs = ((result.ttft, limits.ttft), (result.tpot, limits.tpot), (result.e2e, limits.e2e))
    shares = [value / limit for value, limit in pairs if limit is not None]
    return max(shares, default=result.e2e / PER_SECOND)
