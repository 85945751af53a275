"""Bytes pass at a rate while something urgent goes on, and freely otherwise."""

import asyncio

import pytest

from nanoflow_jax.split.weights import pace


class _Clock:
    """Seconds that pass by sleeping alone."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.is_urgent = True
        self.calm_at_s = float("inf")

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        if self.now_s >= self.calm_at_s:
            self.is_urgent = False


@pytest.fixture
def clock(monkeypatch):
    made = _Clock()
    monkeypatch.setattr(asyncio, "sleep", made.sleep)
    return made


def _take(clock, *sizes):
    """When each may pass, 100 a second."""
    turn = pace.Pace(100, lambda: clock.is_urgent, clock=lambda: clock.now_s)
    times = []

    async def take():
        for size in sizes:
            await turn.take(size)
            times.append(clock.now_s)

    asyncio.run(take())
    return times


def test_bytes_wait_for_those_before_them(clock):
    assert _take(clock, 50, 50, 200, 1) == pytest.approx([0.0, 0.5, 1.0, 3.0])


def test_nothing_waits_where_nothing_is_urgent(clock):
    clock.is_urgent = False
    assert _take(clock, 5000, 5000, 1) == [0.0, 0.0, 0.0]


def test_who_waits_goes_on_when_nothing_is_urgent_any_more(clock):
    clock.calm_at_s = 0.2
    assert _take(clock, 5000, 5000, 5000) == pytest.approx([0.0, 0.2, 0.2])
