"""A profile in lines for people: times, their spread, and what is kept side by side."""

from collections.abc import Iterator
from pathlib import Path

from nanoflow_jax.results.profile import LAUNCH, Point, Profile, by_operation
from nanoflow_jax.search import measured

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
            yield from _shares(name, points, profile.num_sms)
    yield from measured.kept_lines(profile)
    yield from profile.notes


def _time(times: measured.Times, name: str, tokens: int, context: int) -> str:
    seconds, spread = times.seconds(name, tokens, context), times.spread_s(name, tokens, context)
    return f"{tokens:,}: {seconds * _MICRO:,.0f} +- {spread * _MICRO:,.0f}"


def _shares(name: str, points: list[Point], num_sms: int) -> Iterator[str]:
    """At the largest size: on which share of the SMs it takes how much longer."""
    largest = max((point.context, point.tokens) for point in points)
    some = [point for point in points if (point.context, point.tokens) == largest]
    found = measured.shares(some, num_sms)
    if len(found) > 1:
        speeds = ", ".join(f"{share:.2f}: {found[-1][1] / s:.2f}" for share, s in found)
        yield f"{name} of {largest[1]:,} tokens, speed by share of the SMs: {speeds}"
