"""A plan that was found, and why it is what it is, in lines for people."""

import dataclasses
import itertools
from collections.abc import Sequence

from nanoflow_jax.cost import timeline
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.results import gantt
from nanoflow_jax.search import plan_search
from nanoflow_jax.search.interference import Speeds
from nanoflow_jax.search.plan_search import Outcome
from nanoflow_jax.search.profiles import Profile

_SHOWN_PAIRS = 5
_MICRO = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reasons:
    """Why a plan takes as long as it does, per layer of the steady state.

    Attributes:
        busy_s: Of each lane, with the shares that the plan gives.
        together_s: Of each two operations of two lanes, while both run; longest first.
        critical: Keys of the longest chain of waits, those of one layer.
    """

    busy_s: dict[Resource, float]
    together_s: dict[tuple[str, str], float]
    critical: tuple[str, ...]


def reasons(plan: Plan, profile: Profile, speeds: Speeds) -> Reasons:
    """Works them out from when each nano-operation would run."""
    layers = plan_search.LAYERS
    durations_s = plan_search.durations_s(plan, profile, speeds)
    spans = plan_search.predict(plan, profile, speeds)
    begin = min(span.start_s for span in spans if span.layer == layers // 2)
    end = begin + timeline.period_s(spans)
    lanes = dict(zip(plan.keys, (nano.lane for nano in plan.order), strict=True))
    shown = [
        dataclasses.replace(s, start_s=max(s.start_s, begin), end_s=min(s.end_s, end))
        for s in spans
        if lanes[s.key] is not None and s.start_s < end and s.end_s > begin
    ]
    busy: dict[Resource, float] = {}
    for span in shown:
        busy[span.resource] = busy.get(span.resource, 0.0) + span.end_s - span.start_s
    chain = Dependencies(plan, [plan.graph] * layers).critical_path(durations_s).nodes
    critical = tuple(plan.keys[node.place] for node in chain if node.layer == layers // 2)
    return Reasons(busy_s=busy, together_s=_together(shown), critical=critical)


def _together(spans: Sequence[timeline.Span]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for one, other in itertools.combinations(spans, 2):
        seconds = min(one.end_s, other.end_s) - max(one.start_s, other.start_s)
        if seconds > 0 and one.resource is not other.resource:
            names = sorted(span.key.split(".")[0] for span in (one, other))
            pair = (names[0], names[1])
            found[pair] = found.get(pair, 0.0) + seconds
    return dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))


def draw(plan: Plan, profile: Profile, speeds: Speeds, *, title: str) -> str:
    """Three layers in the middle of the model, as SVG."""
    return gantt.draw(
        plan_search.predict(plan, profile, speeds),
        title=title,
        first_layer=plan_search.LAYERS // 2 - 1,
        num_layers=3,
        num_sms=plan.num_sms,
    )


def text(outcome: Outcome, profile: Profile, speeds: Speeds) -> str:
    """The plan, what it is predicted to gain, and why."""
    parts = [_sources(profile, speeds), _times(outcome, profile)]
    if outcome.plan.name != "one":
        parts += [_table(outcome.plan, profile, speeds), _why(outcome, profile, speeds)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _sources(profile: Profile, speeds: Speeds) -> list[str]:
    return [
        f"times of operations: {profile.source}",
        f"speeds on shares of a device: {speeds.source}",
        "all that follows is predicted from these, not measured",
    ]


def _times(outcome: Outcome, profile: Profile) -> list[str]:
    whole, period = outcome.sequential_s, outcome.period_s
    tried = sum(one.plan is not None for one in outcome.candidates)
    lines = [
        f"best plan: {outcome.plan.name}, {period * _MICRO:,.1f} us a layer",
        f"nothing split, one after another: {whole * _MICRO:,.1f} us, {whole / period:.3f} x",
    ]
    if outcome.plan.name == "one":
        more = f" by more than {100 * outcome.least_gain:.0f} %, the spread of what was measured"
        lines.append(
            "splitting does not pay here: no plan that splits is predicted to be shorter"
            + (more if outcome.least_gain else "")
        )
    else:
        split = plan_search.split_s(outcome.plan, profile)
        lines.append(
            f"split alike, one after another: {split * _MICRO:,.1f} us, {split / period:.3f} x"
        )
    lines.append(
        f"no plan of the {len(outcome.candidates)} ways of splitting, of which {tried} were tried, "
        f"takes less than {outcome.bound_s * _MICRO:,.1f} us: this one is at most "
        f"{100 * outcome.gap:.1f} % from the best"
    )
    return lines


def _table(plan: Plan, profile: Profile, speeds: Speeds) -> list[str]:
    slowed = plan_search.durations_s(plan, profile, speeds)
    lines = [
        f"{'in order of issue':24}{'tokens':>14}{'shift':>7}{'SMs':>6}{'alone us':>10}{'us':>9}"
    ]
    for key, nano in zip(plan.keys, plan.order, strict=True):
        alone = profile.seconds(nano.operation, nano.tokens.length)
        sms = "" if nano.num_ctas is None else f"{nano.num_ctas}"
        lines.append(
            f"{key:24}{nano.tokens!s:>14}{nano.shift:>7}{sms:>6}"
            f"{alone * _MICRO:>10.1f}{slowed[key] * _MICRO:>9.1f}"
        )
    return lines


def _why(outcome: Outcome, profile: Profile, speeds: Speeds) -> list[str]:
    plan, period = outcome.plan, outcome.period_s
    found = reasons(plan, profile, speeds)
    split = plan_search.split_s(plan, profile)
    slowed = sum(plan_search.durations_s(plan, profile, speeds).values())
    busiest = max(found.busy_s, key=lambda lane: found.busy_s[lane])
    busy = ", ".join(
        f"{lane.value} {100 * seconds / period:.0f} %" for lane, seconds in found.busy_s.items()
    )
    lines = [
        "why, in us a layer:",
        f"  splitting costs {(split - outcome.sequential_s) * _MICRO:,.1f}, sharing SMs "
        f"{(slowed - split) * _MICRO:,.1f}; running side by side hides "
        f"{(slowed - period) * _MICRO:,.1f}",
        f"  lanes are busy: {busy}; {busiest.value} bounds it",
        f"  longest chain of waits in a layer: {' > '.join(found.critical)}",
        "  what runs side by side:",
    ]
    pairs = itertools.islice(found.together_s.items(), _SHOWN_PAIRS)
    lines += [f"    {one} and {other}: {s * _MICRO:,.1f}" for (one, other), s in pairs]
    return lines
