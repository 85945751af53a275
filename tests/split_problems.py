"""Small problems of split planning, and what is best in them by trying everything."""

import dataclasses
import itertools
import random

from nanoflow_jax.split.planning.asked import Side
from nanoflow_jax.split.planning.problem import Limits, Placement, Problem, Unit

C, S = Side.CLIENT, Side.SERVER
SIDES = (frozenset({C, S}), frozenset({C}), frozenset({S}))


def random_problem(seed, *, mode, num_units=None, even=False, unit_of_time=1):
    """A problem with deadlines that some placements meet.

    Args:
        seed: Of what it is like.
        mode: "e2e", "two", "all" or "migrate".
        num_units: How many; None draws a few.
        even: All units are alike, as layers are.
        unit_of_time: Times are some tens of it; the larger, the fewer are alike.
    """
    draw = _Draw(seed, unit_of_time)
    count = num_units or draw.randint(1, 4 if mode == "migrate" else 7)
    first = _random_unit(draw, 0)
    units = tuple(
        dataclasses.replace(first, start=i, stop=i + 1) if even else _random_unit(draw, i)
        for i in range(count)
    )
    if draw.random() < 0.5:
        units = tuple(
            dataclasses.replace(unit, allowed=draw.choices(SIDES, (6, 1, 1))[0]) for unit in units
        )
    free = Problem(
        units=units,
        num_steps=draw.choice((0, 1, 5)),
        deliver=draw.time(0, 20),
        latency=draw.time(0, 20),
        limits=Limits(ttft=None, tpot=None, e2e=None, memory=10**9),
        migrates=mode == "migrate",
    )
    return dataclasses.replace(free, limits=_limits(draw, free, mode))


class _Draw(random.Random):
    """Draws times in a unit."""

    def __init__(self, seed, unit_of_time):
        super().__init__(seed)
        self._unit = unit_of_time

    def time(self, low, high):
        return self.randint(low * self._unit, high * self._unit)


def _random_unit(draw, index):
    def pair(most):
        return draw.time(0, most), draw.time(0, most)

    return Unit(
        start=index,
        stop=index + 1,
        allowed=SIDES[0],
        prefill=(draw.time(1, 60), draw.time(1, 15)),
        decode=(draw.time(1, 30), draw.time(1, 15)),
        prefill_charge=draw.time(0, 6),
        decode_charge=draw.time(0, 9),
        enter_prefill=pair(40),
        enter_decode=pair(15),
        migrate=pair(25),
        memory=draw.randint(0, 9),
    )


def _limits(draw, problem, mode):
    """Around what one random placement needs."""
    allowed = [tuple(unit.allowed) for unit in problem.units]
    chosen = tuple(draw.choice(sides) for sides in allowed)
    found = by_hand(problem, Placement(chosen, chosen))

    def about(value):
        return None if draw.random() < 0.15 else int(value * draw.uniform(0.7, 1.5))

    memory = sum(unit.memory for unit in problem.units)
    memory = int(memory * draw.uniform(0.2, 1.0)) if draw.random() < 0.5 else memory + 1
    return Limits(
        ttft=about(found["ttft"]) if mode != "e2e" else None,
        tpot=about(found["tpot"]) if mode != "e2e" else None,
        e2e=about(found["e2e"]) if mode in ("e2e", "all") else None,
        memory=memory,
    )


def by_hand(problem, placement):
    """What a placement comes to, from the definition: lists of what there is to pay, summed."""
    y, x = placement.prefill, placement.decode
    nodes = range(len(problem.units))
    u = problem.units
    before_prefill, before_decode = (C, *y[:-1]), (x[-1], *x[:-1])
    entered = [j for j in nodes if y[j] != before_prefill[j]]
    returned = [j for j in nodes if x[j] != before_decode[j]]
    moved = [j for j in nodes if y[j] != x[j]]
    ttft = (
        sum(u[j].prefill[y[j]] for j in nodes)
        + sum(u[j].enter_prefill[y[j]] for j in entered)
        + sum(u[j].migrate[x[j]] for j in moved)
        + (problem.latency if moved else 0)
        + (problem.deliver if S in (y[-1], x[-1]) else 0)
    )
    tpot = sum(u[j].decode[x[j]] for j in nodes) + sum(u[j].enter_decode[x[j]] for j in returned)
    charge = sum(u[j].prefill_charge for j in nodes if y[j] == S)
    charge += sum(u[j].decode_charge for j in nodes if x[j] == S)
    return {
        "ttft": ttft,
        "tpot": tpot,
        "e2e": ttft + problem.num_steps * tpot,
        "charge": charge,
        "rank": (charge, len(entered) + len(returned), y.count(S) + x.count(S)),
        "memory": sum(u[j].memory for j in nodes if C in (y[j], x[j])),
    }


def is_within(problem, found):
    limits = problem.limits
    return found["memory"] <= limits.memory and all(
        most is None or found[name] <= most
        for name, most in (("ttft", limits.ttft), ("tpot", limits.tpot), ("e2e", limits.e2e))
    )


def all_placements(problem):
    """Every one that units allow."""
    allowed = [sorted(unit.allowed) for unit in problem.units]
    for decode in itertools.product(*allowed):
        if not problem.migrates:
            yield Placement(decode, decode)
            continue
        for prefill in itertools.product(*allowed):
            yield Placement(prefill, decode)


def best_by_trying(problem):
    """The rank of the best placement within the limits; None if there is none."""
    ranks = [
        found["rank"]
        for one in all_placements(problem)
        if is_within(problem, found := by_hand(problem, one))
    ]
    return min(ranks, default=None)
