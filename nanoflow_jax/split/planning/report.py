"""A verdict and a frontier, in lines for people."""

import dataclasses
from collections.abc import Sequence

from nanoflow_jax.split.planning import simulation
from nanoflow_jax.split.planning.asked import Policy, Request
from nanoflow_jax.split.planning.costs import Model
from nanoflow_jax.split.planning.planner import (
    FrontierPoint,
    Parts,
    Plan,
    Stretch,
    Verdict,
    VerdictKind,
)
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile

_MOST_POINTS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a planner."""

    model: Model
    client: DeviceProfile
    server: DeviceProfile
    link: LinkProfile
    request: Request
    policy: Policy

    @property
    def ends(self) -> tuple[Model, DeviceProfile, DeviceProfile, LinkProfile]:
        """What does not change from request to request, in the order that planners take it."""
        return self.model, self.client, self.server, self.link


def title(asked: Question) -> str:
    """The question in a line."""
    request = asked.request
    return (
        f"{asked.model.name}, {request.prompt_len} tokens in and {request.output_len:g} out: "
        f"{asked.client.name} and {asked.server.name} over {asked.link.name}"
    )


def text(asked: Question, verdict: Verdict, points: Sequence[FrontierPoint]) -> str:
    """The answer as a user reads it."""
    lines = [title(asked), f"verdict: {verdict.kind}: {verdict.reason}"]
    if verdict.plan is not None:
        lines += ["", *_plan(asked, verdict, verdict.plan)]
    if verdict.best is not None:
        best = verdict.best
        lines.append(
            f"at best, each by itself: first token {_ms(best.ttft_s)}, each further one "
            f"{_ms(best.tpot_s)}, whole answer {_ms(best.e2e_s)}"
        )
    return "\n".join([*lines, "", *_frontier(asked, points)])


def stretch_name(model: Model, stretch: Stretch) -> str:
    """Its nodes, in words."""
    first, last = model.nodes[stretch.start].name, model.nodes[stretch.stop - 1].name
    return first if first == last else f"{first} to {last}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _placed(model: Model, stretches: Sequence[Stretch]) -> str:
    return " | ".join(f"{one.side.name.lower()}: {stretch_name(model, one)}" for one in stretches)


def _plan(asked: Question, verdict: Verdict, plan: Plan) -> list[str]:
    whole = verdict.all_server_charge_s
    saved = 100 * (1 - plan.charge_s / whole) if whole else 0.0
    placed = [f"all tokens  {_placed(asked.model, plan.decode)}"]
    if plan.prefill != plan.decode:
        placed = [
            f"prefill  {_placed(asked.model, plan.prefill)}",
            f"decode   {_placed(asked.model, plan.decode)}",
        ]
    unit = "server time" if asked.policy.accounting != "priced" else "price"
    return [
        *placed,
        f"{unit} ({asked.policy.accounting}): {_ms(plan.charge_s)}, {_ms(whole)} if the server did "
        f"all it may: {saved:.0f} % saved",
        f"round trips of a step: {plan.round_trips}; memory on the client: "
        f"{plan.client_memory_bytes / 1e9:.2f} GB",
        "",
        *_times(asked, plan),
        "",
        _parts("first token", plan.first_token),
        _parts("each further", plan.step),
    ]


def _times(asked: Question, plan: Plan) -> list[str]:
    """What deadlines count with, the same played on the link as it usually is, and deadlines."""
    trip = simulation.play(
        *asked.ends,
        asked.request,
        plan,
        weather=simulation.usual(asked.link),
        activation_bytes=asked.policy.activation_bytes,
    )
    first, last, steps = trip.token_s[0], trip.token_s[-1], asked.request.num_steps
    request, guard = asked.request, asked.policy.guard
    rows: list[tuple[str, ...]] = [("", "planned", "usual link", f"deadline x {guard:g}")]
    for name, planned, usual, limit in (
        ("first token", plan.ttft_s, first, request.ttft_s),
        ("each further", plan.tpot_s, (last - first) / steps if steps else None, request.tpot_s),
        ("whole answer", plan.e2e_s, last, request.e2e_s),
    ):
        cells = (planned, usual, None if limit is None else limit * guard)
        rows.append((name, *("-" if one is None else _ms(one) for one in cells)))
    table = ["".join((row[0].ljust(14), *(cell.rjust(15) for cell in row[1:]))) for row in rows]
    sent = f"sent in all: {trip.up_bytes / 1e6:.2f} MB up, {trip.down_bytes / 1e6:.2f} MB down"
    return [*table, sent]


def _parts(name: str, parts: Parts) -> str:
    named = {
        "client": parts.client_s,
        "up": parts.up_s,
        "server": parts.server_s,
        "down": parts.down_s,
        "cached tokens moving": parts.moving_s,
    }
    shown = " + ".join(f"{what} {_ms(seconds)}" for what, seconds in named.items() if seconds)
    return f"{name}: {shown}"


def has_deadline(request: Request) -> bool:
    """Whether there is any."""
    return any(one is not None for one in (request.ttft_s, request.tpot_s, request.e2e_s))


def _frontier(asked: Question, points: Sequence[FrontierPoint]) -> list[str]:
    if not points:
        return ["no deadlines up to four times as long can be met"]
    what = "deadlines x" if has_deadline(asked.request) else "answer in s"
    header = f"{what:>12}{'charged':>14}{'first token':>15}{'each further':>15}  decode"
    lines = ["what other deadlines would cost:", header]
    for one in _some(points):
        plan = one.plan
        where = (
            _placed(asked.model, plan.decode) if one.kind is VerdictKind.SPLIT else str(one.kind)
        )
        lines.append(
            f"{one.stretch:>12.2f}{_ms(plan.charge_s):>14}{_ms(plan.ttft_s):>15}"
            f"{_ms(plan.tpot_s):>15}  {where}"
        )
    return lines


def _some(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """A few of them, the first and the last always."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]
