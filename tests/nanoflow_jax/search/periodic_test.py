import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanoflow_jax.search import periodic
from nanoflow_jax.search.periodic import Apart, Task, Wait


def _longest_ratio(edges, names):
    """The least period: for every circle, its seconds over its layers (binary search)."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        at = dict.fromkeys(names, 0.0)
        for _ in range(len(names) + 1):
            changed = False
            for first, second, seconds, distance in edges:
                reached = at[first] + seconds - distance * middle
                if reached > at[second] + 1e-12:
                    at[second], changed = reached, True
            if not changed:
                break
        low, high = (middle, high) if changed else (low, middle)
    return high


def _exhaustive(tasks, waits):
    """The shortest period over all orders of every lane, with all numbers of layers ahead."""
    seconds = {task.name: task.seconds for task in tasks}
    fixed = [(w.first, w.second, seconds[w.first], w.distance) for w in waits]
    fixed += [(name, name, seconds[name], 1) for name in seconds]
    pairs = periodic.lane_pairs(tasks)
    best = math.inf
    for ahead in itertools.product(range(-2, 4), repeat=len(pairs)):
        order = [
            edge
            for (one, other), k in zip(pairs, ahead, strict=True)
            for edge in ((one, other, seconds[one], k), (other, one, seconds[other], 1 - k))
        ]
        best = min(best, _longest_ratio([*fixed, *order], list(seconds)))
    return best


@st.composite
def _instances(draw):
    count = draw(st.integers(2, 4))
    lanes = [draw(st.sampled_from(["a", "b"])) for _ in range(count)]
    tasks = [
        Task(name=str(i), seconds=float(draw(st.integers(1, 9))), lane=lanes[i])
        for i in range(count)
    ]
    assume(len(periodic.lane_pairs(tasks)) <= 3)
    waits = [
        Wait(first=str(i), second=str(j))
        for i, j in itertools.combinations(range(count), 2)
        if draw(st.booleans())
    ]
    waits.append(Wait(first=str(count - 1), second="0", distance=draw(st.integers(1, 2))))
    return tasks, waits


@given(_instances())
def test_the_period_is_that_of_the_best_of_all_orders(instance):
    tasks, waits = instance
    found = periodic.best_schedule(tasks, waits)
    assert found.is_best
    assert found.period_s == pytest.approx(_exhaustive(tasks, waits), rel=1e-3)
    assert found.bound_s == pytest.approx(found.period_s, rel=1e-3)


@given(_instances())
def test_a_schedule_keeps_what_waits_and_what_shares_a_lane(instance):
    tasks, waits = instance
    found = periodic.best_schedule(tasks, waits)
    seconds = {task.name: task.seconds / found.period_s for task in tasks}
    for wait in waits:
        ready = found.starts[wait.first] + seconds[wait.first]
        assert found.starts[wait.second] + wait.distance >= ready - 1e-6
    for one, other in periodic.lane_pairs(tasks):
        gap = (found.starts[other] - found.starts[one]) % 1.0
        room = 1.0 - seconds[other] + 1e-6
        assert seconds[one] - 1e-6 <= gap <= room or gap > 1.0 - 1e-6 >= seconds[one]


def test_two_halves_overlap_across_layers_as_one_half_alone_cannot():
    """Attention beside products needs another half to multiply."""

    def period(halves):
        tasks, waits = [], []
        for half in halves:
            tasks += [
                Task(name=f"attend{half}", seconds=1.0, lane="memory"),
                Task(name=f"multiply{half}", seconds=1.0, lane="compute"),
            ]
            waits += [
                Wait(first=f"attend{half}", second=f"multiply{half}"),
                Wait(first=f"multiply{half}", second=f"attend{half}", distance=1),
            ]
        return periodic.best_schedule(tasks, waits).period_s

    assert period("A") == pytest.approx(2.0, rel=1e-3)
    assert period("AB") == pytest.approx(2.0, rel=1e-3)  # of twice as many tokens


def test_tasks_apart_run_one_after_the_other_in_their_layer():
    tasks = [Task(name="one", seconds=1.0), Task(name="other", seconds=2.0)]
    ring = [Wait(first=a, second=b, distance=1) for a in ("one", "other") for b in ("one", "other")]
    assert periodic.best_schedule(tasks, ring).period_s == pytest.approx(2.0, rel=1e-3)
    apart = periodic.best_schedule(tasks, ring, apart=[Apart(one="one", other="other")])
    assert apart.period_s == pytest.approx(3.0, rel=1e-3)


def test_tasks_that_wait_in_a_circle_have_no_schedule():
    tasks = [Task(name="one", seconds=1.0), Task(name="other", seconds=2.0)]
    ring = [Wait(first="one", second="other"), Wait(first="other", second="one")]
    found = periodic.best_schedule
    with pytest.raises(periodic.ProgramError, match="no schedule was found"):
        found(tasks, ring)
