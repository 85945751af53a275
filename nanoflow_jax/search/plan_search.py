"""Searches the best plan among ways of splitting, and says what it gains."""

import dataclasses
import time
from collections.abc import Callable, Iterable

from nanoflow_jax.nanobatch import builders, operations
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.search import periodic, pipeline
from nanoflow_jax.search.interference import Speeds
from nanoflow_jax.search.pipeline import Pipeline, Split
from nanoflow_jax.search.profiles import Profile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way of splitting.

    Attributes:
        name: For people.
        bound_s: No plan of it has a shorter period.
        found: The best plan that was found; None if the bound or the time ruled it out.
    """

    name: str
    bound_s: float
    found: Pipeline | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found.

    Attributes:
        sequential_s: Period of the plan that splits nothing.
        plan: The best, which may be that one.
        period_s: Of it.
        candidates: All that were looked at, in order of their bounds.
    """

    sequential_s: float
    plan: Plan
    period_s: float
    candidates: tuple[Candidate, ...]


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
        candidates=(),
    )
    queue = sorted(((bound_s(split, profile), name, split) for name, split in candidates), key=_key)
    for number, (bound, name, split) in enumerate(queue):
        found = None
        left = until - time.monotonic()
        if bound < outcome.period_s and left > 0:
            each = max(left / (len(queue) - number), 1.0)
            found = _try(split, profile, speeds, num_sms=num_sms, name=name, seconds=each)
        if found is not None and found.period_s < outcome.period_s:
            outcome = dataclasses.replace(outcome, plan=found.plan, period_s=found.period_s)
        candidate = Candidate(name=name, bound_s=bound, found=found)
        outcome = dataclasses.replace(outcome, candidates=(*outcome.candidates, candidate))
        report(candidate)
    return outcome


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
