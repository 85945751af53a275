"""Order and shares against all orders and all shares."""

import itertools
import math
import random

import pytest

from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.search import interference, periodic, shares
from nanoflow_jax.search.periodic import Task, Wait

_SPEEDS = interference.TABLE_3


def _layer(seed):
    """Two halves that attend and multiply, for one layer after another."""
    chance = random.Random(seed)
    tasks, waits = [], []
    for half in "01":
        for name, lane in (("attend", Resource.MEMORY), ("multiply", Resource.COMPUTE)):
            tasks.append(Task(name=name + half, seconds=float(chance.randint(1, 9)), lane=lane))
        waits.append(Wait(first=f"attend{half}", second=f"multiply{half}"))
        waits.append(Wait(first=f"multiply{half}", second=f"attend{half}", distance=1))
    return shares.Layer(tasks=tuple(tasks), waits=tuple(waits))


def _is_enough(edges, names, period):
    """Whether no circle of waits takes longer than its layers do."""
    at = dict.fromkeys(names, 0.0)
    for _ in range(len(names) + 1):
        changed = False
        for first, second, seconds, distance in edges:
            reached = at[first] + seconds - distance * period
            if reached > at[second] + 1e-12:
                at[second], changed = reached, True
        if not changed:
            return True
    return False


def _shortest(edges, names, best):
    """The least period, if it is shorter than the best."""
    low, high = 0.0, min(best * (1 - 1e-7), 1e3)
    if not _is_enough(edges, names, high):
        return best
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _is_enough(edges, names, middle) else (middle, high)
    return high


def _exhaustive(layer):
    """The shortest period over all shares and all orders of what may not run at once."""
    names, best = [task.name for task in layer.tasks], math.inf
    pairs = list(itertools.combinations(names, 2))
    for levels in itertools.product(shares.LEVELS, repeat=len(names)):
        share = dict(zip(names, levels, strict=True))
        seconds = {task.name: task.seconds for task in layer.slowed(_SPEEDS, share)}
        fixed = [(w.first, w.second, seconds[w.first], w.distance) for w in layer.waits]
        fixed += [(name, name, seconds[name], 1) for name in names]
        ordered = [
            (one, other)
            for one, other in pairs
            if layer.lanes[one] == layer.lanes[other] or share[one] + share[other] > 1 + 1e-9
        ]
        for ahead in itertools.product(range(-1, 3), repeat=len(ordered)):
            order = [
                edge
                for (one, other), k in zip(ordered, ahead, strict=True)
                for edge in ((one, other, seconds[one], k), (other, one, seconds[other], 1 - k))
            ]
            best = _shortest([*fixed, *order], names, best)
    return best


@pytest.mark.parametrize("seed", [0, 2])
def test_the_period_is_that_of_the_best_of_all_orders_and_all_shares(seed, monkeypatch):
    monkeypatch.setattr(shares, "LEVELS", (0.4, 0.6, 1.0))
    layer, wanted = _layer(seed), _exhaustive(_layer(seed))
    found, bound_s = shares.search_all(layer, _SPEEDS, shorter_than_s=1e3, seconds=600)
    assert found.period_s == pytest.approx(wanted, rel=1e-4)
    assert bound_s == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(periodic.NoScheduleError, match="there is no such schedule"):
        shares.search_all(layer, _SPEEDS, shorter_than_s=wanted * 0.999, seconds=600)
