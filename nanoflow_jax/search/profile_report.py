"""A profile in lines for people: times, their spread, and what is kept side by side."""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanoflow_jax.results.profile import LAUNCH, Point, Profile, by_operation
from nanoflow_jax.search import measured
from nanoflow_jax.search.profile_steps import ProfileSteps
from nanoflow_jax.simulator.step_time import StepWork

_MICRO = 1e6


def text(profile: Profile, path: Path) -> str:
    """What was measured.

    Args:
        profile: As it was read.
        path: Where it lies.
    """
    return "\n".join(_lines(profile, path))


def _lines(profile: Profile, path: Path) -> Iterator[str]:
    times = measured.Times(profile)
    yield f"{path}: {profile.model}, {profile.source}"
    yield f"a launch, {times.launch_s * _MICRO:,.0f} us, is taken off"
    yield f"{'operation':20}{'cached':>8}{'tokens: us, spread of samples':>34}"
    for name, points in by_operation(profile).items():
        if name == LAUNCH:
            continue
        for context in sorted({point.context for point in points}):
            tokens = sorted({point.tokens for point in points if point.context == context})
            row = "  ".join(_time(times, name, one, context) for one in tokens)
            yield f"{name:20}{context or '':>8}  {row}"
    if profile.num_sms is not None:
        for name, points in by_operation(profile).items():
            yield from _shares(profile, name, points)
    yield from measured.kept_lines(profile)
    yield from profile.notes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Steps that were measured beside what is predicted of them.

    Attributes:
        requests: Which, for people.
        work: Of a step.
        seconds: Of each.
    """

    requests: str
    work: StepWork
    seconds: Sequence[float]


def beside(steps: ProfileSteps, measured_steps: Sequence[Step], *, source: str) -> str:
    """Predicted times of steps beside measured ones.

    Args:
        steps: What predicts them.
        measured_steps: What was measured.
        source: Of the prediction.
    """
    lines = [
        f"predicted by operations {source}; without embedding, sampling and host",
        f"{'requests':>10}{'tokens':>8}{'decoded':>9}{'cached':>8}"
        f"{'predicted ms':>14}{'measured ms':>13}{'10 to 90 %':>18}{'error':>9}",
    ]
    for step in measured_steps:
        work, predicted = step.work, steps.predict(step.work).device_s
        median = statistics.median(step.seconds)
        low, *_, high = statistics.quantiles(step.seconds, n=10)
        context = work.decode_context / max(work.decode_rows, 1)
        spread = f"{1e3 * low:.2f} - {1e3 * high:.2f}"
        lines.append(
            f"{step.requests:>10}{work.tokens:>8,}{work.decode_rows:>9,}{context:>8.0f}"
            f"{1e3 * predicted:>14.2f}{1e3 * median:>13.2f}{spread:>18}"
            f"{100 * (predicted / median - 1):>+7.0f} %"
        )
    return "\n".join(lines)


def _time(times: measured.Times, name: str, tokens: int, context: int) -> str:
    seconds, spread = times.seconds(name, tokens, context), times.spread_s(name, tokens, context)
    return f"{tokens:,}: {seconds * _MICRO:,.0f} +- {spread * _MICRO:,.0f}"


def _shares(profile: Profile, name: str, points: list[Point]) -> Iterator[str]:
    """At the largest size: on which share of the SMs it takes how much longer."""
    largest = max((point.context, point.tokens) for point in points)
    some = [point for point in points if (point.context, point.tokens) == largest]
    found = measured.shares(profile, some)
    if len(found) > 1:
        speeds = ", ".join(f"{share:.2f}: {found[-1][1] / s:.2f}" for share, s in found)
        yield f"{name} of {largest[1]:,} tokens, speed by share of the SMs: {speeds}"
