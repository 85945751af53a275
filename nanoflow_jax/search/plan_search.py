"""Searches the best plan among ways of splitting, and says what it gains."""

import dataclasses
import time
from collections.abc import Callable, Iterable

from nanoflow_jax.cost import timeline
from nanoflow_jax.nanobatch import builders, operations
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.search import periodic, pipeline
from nanoflow_jax.search.interference import Speeds
from nanoflow_jax.search.pipeline import Pipeline, Split
from nanoflow_jax.search.profiles import Profile

# Layers of the model of which a plan's period is told: the middle ones are in the steady state.
LAYERS = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way of splitting.

    Attributes:
        name: For people.
        bound_s: No plan of it has a shorter period.
        plan: The best that was found; None if the bound or the time ruled the way out.
        period_s: Of that plan.
    """

    name: str
    bound_s: float
    plan: Plan | None = None
    period_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found.

    Attributes:
        sequential_s: Period of the plan that splits nothing.
        plan: The best, which may be that one.
        period_s: Of it.
        bound_s: No plan of the ways that were asked for has a shorter period.
        candidates: All that were looked at, in order of their bounds.
    """

    sequential_s: float
    plan: Plan
    period_s: float
    bound_s: float
    candidates: tuple[Candidate, ...] = ()

    @property
    def gap(self) -> float:
        """By how much of the bound the plan may be longer than the best one."""
        return self.period_s / self.bound_s - 1.0


def durations_s(plan: Plan, profile: Profile, speeds: Speeds) -> dict[str, float]:
    """How long each nano-operation takes on its share of the device, by its key."""
    found = {}
    for place, (key, nano) in enumerate(zip(plan.keys, plan.order, strict=True)):
        seconds = profile.seconds(nano.operation, nano.tokens.length)
        found[key] = seconds / speed(plan, place, speeds)
    return found


def speed(plan: Plan, place: int, speeds: Speeds) -> float:
    """Of a nano-operation on its share of the device, as a share of that on all of it."""
    lane = plan.order[place].lane
    return 1.0 if lane is None else speeds.speed(lane, plan.num_ctas(place) / plan.num_sms)


def predict(
    plan: Plan, profile: Profile, speeds: Speeds, *, num_layers: int = LAYERS
) -> tuple[timeline.Span, ...]:
    """When each nano-operation of a plan would run."""
    dependencies = Dependencies(plan, [plan.graph] * num_layers)
    return timeline.predict(dependencies, durations_s(plan, profile, speeds))


def sequential_s(shape: operations.LayerShape, num_tokens: int, profile: Profile) -> float:
    """Time per layer when nothing is split and one operation runs after another."""
    plan = builders.one(shape, num_tokens=num_tokens)
    return sum(profile.seconds(nano.operation, nano.tokens.length) for nano in plan.order)


def bound_s(split: Split, profile: Profile) -> float:
    """The busiest lane: no order and no sharing has a shorter period."""
    busy: dict[object, float] = {}
    for op in operations.layer_graph(split.shape).operations:
        for tokens in split.ranges.get(op.name, ()):
            lane = pipeline.lane(op)
            seconds = profile.seconds(op.name, tokens.length)
            busy[lane] = busy.get(lane, 0.0) + seconds
    busy.pop(None, None)
    return max(busy.values())


def search(
    candidates: Iterable[tuple[str, Split]],
    profile: Profile,
    speeds: Speeds,
    *,
    shape: operations.LayerShape,
    num_tokens: int,
    num_sms: int,
    seconds: float,
    report: Callable[[Candidate], None] = lambda candidate: None,
) -> Outcome:
    """The best plan.

    Args:
        candidates: Ways of splitting.
        profile: Times of operations.
        speeds: Of shares of a device.
        shape: Of a layer.
        num_tokens: Of the dense batch.
        num_sms: Of a device.
        seconds: Time to search, in all.
        report: Called with each candidate that was looked at.
    """
    until = time.monotonic() + seconds
    best_s = sequential_s(shape, num_tokens, profile)
    outcome = Outcome(
        sequential_s=best_s,
        plan=builders.one(shape, num_tokens=num_tokens, num_sms=num_sms),
        period_s=best_s,
        bound_s=best_s,
    )
    queue = sorted(((bound_s(split, profile), name, split) for name, split in candidates), key=_key)
    for number, (bound, name, split) in enumerate(queue):
        candidate = Candidate(name=name, bound_s=bound)
        left = until - time.monotonic()
        if bound < outcome.period_s and left > 0:
            each = max(left / (len(queue) - number), 1.0)
            found = _try(split, profile, speeds, num_sms=num_sms, name=name, seconds=each)
            if found is not None:
                period_s = timeline.period_s(predict(found.plan, profile, speeds))
                candidate = dataclasses.replace(candidate, plan=found.plan, period_s=period_s)
                if period_s < outcome.period_s:
                    outcome = dataclasses.replace(outcome, plan=found.plan, period_s=period_s)
        outcome = dataclasses.replace(
            outcome,
            bound_s=min(outcome.bound_s, bound),
            candidates=(*outcome.candidates, candidate),
        )
        report(candidate)
    return outcome


def split_s(plan: Plan, profile: Profile) -> float:
    """Time per layer of a plan's nano-operations one after another, each with the whole device."""
    return sum(profile.seconds(nano.operation, nano.tokens.length) for nano in plan.order)


def _key(entry: tuple[float, str, Split]) -> tuple[float, str]:
    return entry[:2]


def _try(
    split: Split, profile: Profile, speeds: Speeds, *, num_sms: int, name: str, seconds: float
) -> Pipeline | None:
    try:
        return pipeline.find(
            split, profile.seconds, speeds, num_sms=num_sms, name=name, seconds=seconds
        )
    except periodic.ProgramError:
        return None
