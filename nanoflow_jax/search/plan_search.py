"""Searches the best plan among ways of splitting, and says what it gains."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable

from nanoflow_jax.cost import timeline
from nanoflow_jax.nanobatch import builders, operations
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.search import periodic, pipeline, shares
from nanoflow_jax.search.interference import Speeds
from nanoflow_jax.search.pipeline import Split
from nanoflow_jax.search.profiles import Profile

# Layers of the model of which a plan's period is told: the middle ones are in the steady state.
LAYERS = 24
# Of the time, what is for looking at many ways of splitting for a short time each.
_SHARE_OF_FIRST = 0.5
_LEAST_PROOF_S = 20.0
# A plan that is shorter by less is not worth a search.
_LEAST_GAIN = 1e-4
# Sums of the same times differ in their last bits.
_ROUNDING = 1e-9

# Ways of splitting, with a name each, near one.
Near = Callable[[Split], Iterable[tuple[str, Split]]]


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
        least_gain: See `search`.
    """

    sequential_s: float
    plan: Plan
    period_s: float
    bound_s: float
    candidates: tuple[Candidate, ...] = ()
    least_gain: float = 0.0

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


def bound_s(split: Split, profile: Profile, speeds: Speeds) -> float:
    """No order and no shares have a shorter period; see `shares.least_period_s`."""
    busy: dict[Resource, float] = {}
    beside_lanes = 0.0
    for op in operations.layer_graph(split.shape).operations:
        lane = pipeline.lane(op)
        for tokens in split.ranges.get(op.name, ()):
            seconds = profile.seconds(op.name, tokens.length)
            if lane is None:
                beside_lanes += seconds
            else:
                busy[lane] = busy.get(lane, 0.0) + seconds
    if speeds.gains_nothing:
        return sum(busy.values()) + beside_lanes
    return shares.least_period_s(busy, speeds)


def search(
    candidates: Iterable[tuple[str, Split]],
    profile: Profile,
    speeds: Speeds,
    *,
    shape: operations.LayerShape,
    num_tokens: int,
    num_sms: int,
    seconds: float,
    least_gain: float = 0.0,
    near: Near = lambda split: (),
    report: Callable[[Candidate], None] = lambda candidate: None,
) -> Outcome:
    """The best plan.

    Every way of splitting is tried for a short time; then, as long as that finds better plans, the
    ways near the best one. In the rest of the time the best plan of each way is sought, or proof
    that it has no better one.

    Args:
        candidates: Ways of splitting.
        profile: Times of operations.
        speeds: Of shares of a device.
        shape: Of a layer.
        num_tokens: Of the dense batch.
        num_sms: Of a device.
        seconds: Time to search, in all.
        least_gain: By which share of the time of the plan that splits nothing another has to be
            shorter: as much as times are uncertain by.
        near: Ways of splitting that differ a little from one.
        report: Called with each candidate when it was looked at; again when more is known of it.
    """
    best_s = sequential_s(shape, num_tokens, profile)
    start = Outcome(
        sequential_s=best_s,
        plan=builders.one(shape, num_tokens=num_tokens, num_sms=num_sms),
        period_s=best_s,
        bound_s=best_s,
        least_gain=least_gain,
    )
    found = _Search(start, profile, speeds, num_sms=num_sms, seconds=seconds, report=report)
    found.try_all(candidates)
    while (split := found.best_split) is not None:
        found.try_all(near(split))
        if found.best_split is split:
            break
    found.prove_all()
    return found.outcome


class _Search:
    """A search under way.

    Invariant: `_known` has every way of splitting that was looked at, by its name.
    """

    def __init__(
        self,
        start: Outcome,
        profile: Profile,
        speeds: Speeds,
        *,
        num_sms: int,
        seconds: float,
        report: Callable[[Candidate], None],
    ) -> None:
        self._start, self._profile, self._speeds = start, profile, speeds
        self._num_sms, self._report = num_sms, report
        begin = time.monotonic()
        self._soon, self._until = begin + _SHARE_OF_FIRST * seconds, begin + seconds
        self._known: dict[str, tuple[Split, Candidate]] = {}
        self._best: Candidate | None = None

    @property
    def best_split(self) -> Split | None:
        """Of the best plan; None if that splits nothing."""
        return None if self._best is None else self._known[self._best.name][0]

    @property
    def _period_s(self) -> float:
        best = self._best
        return self._start.period_s if best is None or best.period_s is None else best.period_s

    @property
    def _beaten_s(self) -> float:
        """What a plan has to be shorter than."""
        least_gain = max(self._start.least_gain, _ROUNDING)
        return min(self._period_s, self._start.sequential_s * (1 - least_gain))

    @property
    def outcome(self) -> Outcome:
        candidates = sorted((known[1] for known in self._known.values()), key=_key)
        best = self._best
        return dataclasses.replace(
            self._start,
            plan=self._start.plan if best is None or best.plan is None else best.plan,
            period_s=self._period_s,
            bound_s=min([self._period_s, *(one.bound_s for one in candidates)]),
            candidates=tuple(candidates),
        )

    def try_all(self, candidates: Iterable[tuple[str, Split]]) -> None:
        """Tries each that is not known yet, those of the lowest bounds first."""
        queue = [
            (bound_s(split, self._profile, self._speeds), name, split)
            for name, split in candidates
            if name not in self._known
        ]
        queue.sort(key=lambda entry: entry[:2])
        for number, (bound, name, split) in enumerate(queue):
            candidate = Candidate(name=name, bound_s=bound)
            left = self._soon - time.monotonic()
            if bound < self._beaten_s and left > 0:
                each = max(left / (len(queue) - number), 1.0)
                candidate = self._try(candidate, split, seconds=each)
            self._keep(candidate, split)

    def prove_all(self) -> None:
        """Seeks the best plan of each way of splitting, those of the shortest periods first."""
        queue = sorted(
            (known for known in self._known.values() if known[1].bound_s < self._beaten_s),
            key=lambda known: (known[1].period_s or math.inf, _key(known[1])),
        )
        for number, (split, candidate) in enumerate(queue):
            left = self._until - time.monotonic()
            if left > 0 and candidate.bound_s < self._wanted_s:
                each = max(left / (len(queue) - number), min(left, _LEAST_PROOF_S), 1.0)
                self._keep(self._prove(candidate, split, seconds=each), split)

    @property
    def _wanted_s(self) -> float:
        """A period that is worth a search."""
        return self._beaten_s * (1 - _LEAST_GAIN)

    def _try(self, candidate: Candidate, split: Split, *, seconds: float) -> Candidate:
        try:
            found = pipeline.find(
                split,
                self._profile.seconds,
                self._speeds,
                num_sms=self._num_sms,
                name=candidate.name,
                seconds=seconds,
            )
        except periodic.ProgramError:
            return candidate
        return self._with(candidate, found.plan)

    def _prove(self, candidate: Candidate, split: Split, *, seconds: float) -> Candidate:
        try:
            found, bound = pipeline.find_best(
                split,
                self._profile.seconds,
                self._speeds,
                num_sms=self._num_sms,
                name=candidate.name,
                shorter_than_s=self._wanted_s,
                seconds=seconds,
            )
        except periodic.NoScheduleError:
            return dataclasses.replace(candidate, bound_s=self._wanted_s)
        except periodic.ProgramError:
            return candidate
        better = self._with(candidate, found.plan)
        return dataclasses.replace(better, bound_s=max(candidate.bound_s, bound))

    def _with(self, candidate: Candidate, plan: Plan) -> Candidate:
        period = timeline.period_s(predict(plan, self._profile, self._speeds))
        if candidate.period_s is not None and candidate.period_s <= period:
            return candidate
        return dataclasses.replace(candidate, plan=plan, period_s=period)

    def _keep(self, candidate: Candidate, split: Split) -> None:
        self._known[candidate.name] = split, candidate
        if candidate.period_s is not None and candidate.period_s < self._beaten_s:
            self._best = candidate
        self._report(candidate)


def split_s(plan: Plan, profile: Profile) -> float:
    """Time per layer of a plan's nano-operations one after another, each with the whole device."""
    return sum(profile.seconds(nano.operation, nano.tokens.length) for nano in plan.order)


def _key(candidate: Candidate) -> tuple[float, str]:
    return candidate.bound_s, candidate.name
