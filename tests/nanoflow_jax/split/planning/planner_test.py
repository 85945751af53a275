import dataclasses
import itertools
import math
import random

import hypothesis
import pytest
import split_profiles
from hypothesis import strategies as st

from nanoflow_jax.split.planning import baselines, planner, problem, search, simulation
from nanoflow_jax.split.planning.asked import Policy, Prices, Request, Side
from nanoflow_jax.split.planning.costs import Accounting
from nanoflow_jax.split.planning.planner import VerdictKind

_MODEL = split_profiles.model()
_CLIENTS = {name: split_profiles.device(name) for name in split_profiles.CLIENTS}
_SERVERS = {name: split_profiles.device(name) for name in split_profiles.SERVERS}
_LINKS = {name: split_profiles.link(name) for name in split_profiles.LINKS}
_EXACT = Policy(guard=1.0)


@dataclasses.dataclass(frozen=True)
class _Case:
    client: object
    server: object
    link: object
    request: Request

    @property
    def ends(self):
        return _MODEL, self.client, self.server, self.link

    def plan(self, policy=_EXACT):
        return planner.plan(*self.ends, self.request, policy)


@st.composite
def _cases(draw, deadlines=("e2e", "two", "all")):
    """Requests whose deadlines are some times what the server alone takes."""
    ends = [draw(st.sampled_from(sorted(many.items())))[1] for many in (_CLIENTS, _SERVERS, _LINKS)]
    free = Request(
        prompt_len=draw(st.sampled_from((16, 256, 2048))),
        output_len=draw(st.sampled_from((1, 17, 60))),
    )
    alone = problem.build(_MODEL, *ends, free, _EXACT)
    alone = planner.as_plan(alone, baselines.all_on(alone, Side.SERVER))
    times = draw(st.floats(1.02, 4))
    kind = draw(st.sampled_from(deadlines))
    limits = {}
    if kind != "e2e":
        limits |= {"ttft_s": alone.ttft_s * times + 0.1, "tpot_s": alone.tpot_s * times + 0.02}
    if kind != "two":
        limits["e2e_s"] = alone.e2e_s * times
    return _Case(*ends, dataclasses.replace(free, **limits))


def _split_case():
    """One that is split: a fast machine on a slow line, which may take its time between tokens."""
    request = Request(prompt_len=1024, output_len=128, ttft_s=0.7, tpot_s=0.05)
    return _Case(_CLIENTS["mac"], _SERVERS["h100"], _LINKS["fibre"], request)


def test_a_phone_with_short_deadlines_leaves_all_to_the_server():
    request = Request(prompt_len=1024, output_len=64, ttft_s=0.3, tpot_s=0.02)
    found = _Case(_CLIENTS["phone"], _SERVERS["h100"], _LINKS["wifi"], request).plan()
    assert (found.kind, found.plan.round_trips) == (VerdictKind.ALL_SERVER, 0)
    assert found.plan.charge_s == found.all_server_charge_s > 0
    assert [(s.side, s.start, s.stop) for s in found.plan.decode] == [(Side.SERVER, 0, 66)]


def test_a_machine_that_meets_the_deadlines_by_itself_asks_no_server():
    request = Request(prompt_len=64, output_len=64, ttft_s=1.0, tpot_s=0.05)
    found = _Case(_CLIENTS["gpu"], _SERVERS["h100"], _LINKS["wifi"], request).plan()
    assert (found.kind, found.plan.charge_s) == (VerdictKind.ALL_CLIENT, 0.0)


def test_a_split_charges_less_and_costs_a_round_trip_for_each_token():
    found = _split_case().plan()
    assert found.kind is VerdictKind.SPLIT
    assert found.plan.charge_s < found.all_server_charge_s
    assert found.plan.round_trips >= 1
    assert found.plan.ttft_s <= 0.7
    assert found.plan.tpot_s <= 0.05
    assert found.plan.e2e_s == pytest.approx(found.plan.ttft_s + 127 * found.plan.tpot_s)


def test_what_nothing_meets_is_rejected_with_what_could_be_had():
    case = _split_case()
    late = dataclasses.replace(case.request, ttft_s=0.01, tpot_s=0.001)
    found = dataclasses.replace(case, request=late).plan()
    assert (found.kind, found.plan, found.meets_deadlines) == (VerdictKind.REJECT, None, False)
    assert found.reason.startswith("no placement meets the deadlines: the first token takes ")
    assert "at best, 10.0 are allowed after the guard; a token takes" in found.reason
    # Deadlines of what is best are met, one at a time.
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        free = dataclasses.replace(case.request, ttft_s=None, tpot_s=None)
        least = getattr(found.best, name)
        met = dataclasses.replace(case, request=dataclasses.replace(free, **{name: least + 1e-9}))
        assert met.plan().meets_deadlines
        missed = dataclasses.replace(
            case, request=dataclasses.replace(free, **{name: least * 0.99})
        )
        assert not missed.plan().meets_deadlines


def test_deadlines_that_are_met_one_at_a_time_alone_are_said_to_be():
    case = _split_case()
    small = dataclasses.replace(case.client, memory_bytes=1e6)
    request = dataclasses.replace(case.request, ttft_s=9.0, tpot_s=9.0)
    pinned = dataclasses.replace(_EXACT, pinned_first=4)
    found = dataclasses.replace(case, client=small, request=request).plan(pinned)
    assert found.kind is VerdictKind.REJECT
    assert found.reason.endswith(
        "each alone can be had, but not all together with the client's memory"
    )


def test_a_best_effort_is_all_server_and_says_that_it_is_late():
    case = _split_case()
    late = dataclasses.replace(case.request, ttft_s=0.01)
    found = dataclasses.replace(case, request=late).plan(
        dataclasses.replace(_EXACT, best_effort=True)
    )
    assert (found.kind, found.meets_deadlines) == (VerdictKind.ALL_SERVER, False)
    assert found.plan.ttft_s > 0.01
    assert found.reason.endswith("; served as well as it can be")


@hypothesis.settings(max_examples=12)
@hypothesis.given(case=_cases(), migrates=st.booleans(), seed=st.integers(0, 999))
def test_a_plan_that_is_played_meets_its_deadlines(case, migrates, seed):
    found = case.plan(dataclasses.replace(_EXACT, migrates=migrates))
    if found.plan is None:
        return
    draw, link = random.Random(seed), case.link

    def between(to):
        low, high = simulation.worst(link)(to), simulation.usual(link)(to)
        return simulation.Weather(
            rtt_s=draw.uniform(high.rtt_s, low.rtt_s),
            bytes_per_s=draw.uniform(low.bytes_per_s, high.bytes_per_s),
        )

    for weather in (simulation.worst(link), between):
        trip = simulation.play(*case.ends, case.request, found.plan, weather=weather)
        assert len(trip.token_s) == case.request.most_output
        for number, second in enumerate(trip.token_s):
            assert second <= found.plan.ttft_s + number * found.plan.tpot_s + 1e-9
        assert case.request.e2e_s is None or trip.token_s[-1] <= case.request.e2e_s + 1e-9


@hypothesis.settings(max_examples=15)
@hypothesis.given(case=_cases(), speed=st.floats(1, 8))
def test_a_faster_client_or_a_shorter_way_never_costs_more(case, speed):
    before = case.plan()
    near = dataclasses.replace(
        case.link,
        rtt_p50_s=case.link.rtt_p50_s / speed,
        rtt_p95_s=case.link.rtt_p95_s / speed,
    )
    for better in (
        dataclasses.replace(case, client=case.client.scaled(speed)),
        dataclasses.replace(case, link=near),
    ):
        after = better.plan()
        if before.plan is not None:
            assert after.plan.charge_s <= before.plan.charge_s * (1 + 1e-12)


@hypothesis.settings(max_examples=6)
@hypothesis.given(case=_cases())
def test_no_greedy_way_is_charged_less(case):
    found = case.plan()
    asked = problem.build(*case.ends, case.request, _EXACT)
    for way in (*baselines.GREEDY.values(), baselines.single_segment):
        placed = way(asked)
        if placed is not None:
            greedy = problem.outcome(asked, placed).charge / problem.PER_SECOND
            assert found.plan.charge_s <= greedy


@hypothesis.settings(max_examples=12)
@hypothesis.given(case=_cases(), migrates=st.booleans())
def test_thinned_labels_are_within_a_thousandth_of_the_best_of_66_nodes(case, migrates):
    policy = dataclasses.replace(_EXACT, migrates=migrates)
    asked = problem.build(*case.ends, case.request, policy)
    assert len(asked.units) == 66
    found, best = (search.cheapest(asked, max_labels=most) for most in (policy.max_labels, None))
    assert (found is None) == (best is None)
    if found is not None:
        charges = [problem.outcome(asked, one).charge for one in (found, best)]
        assert charges[0] <= 1.001 * charges[1]


def _sides(stretches):
    return [one.side for one in stretches for _ in range(one.start, one.stop)]


@hypothesis.settings(max_examples=12)
@hypothesis.given(case=_cases(), migrates=st.booleans())
def test_nodes_run_where_they_are_pinned_and_held(case, migrates):
    policy = dataclasses.replace(
        _EXACT, migrates=migrates, held_layers=((0, 8), (28, 32)), pinned_first=2, pinned_last=1
    )
    found = case.plan(policy)
    for sides in () if found.plan is None else map(_sides, (found.plan.prefill, found.plan.decode)):
        # Embedding and layers 0 and 1; layer 31 and the head.
        assert set(sides[:5]) == set(sides[63:]) == {Side.CLIENT}
        assert set(sides[17:57]) == {Side.SERVER}


@hypothesis.settings(max_examples=12)
@hypothesis.given(case=_cases(), gigabytes=st.floats(0.3, 6))
def test_the_clients_memory_is_kept(case, gigabytes):
    small = dataclasses.replace(case.client, memory_bytes=gigabytes * 1e9)
    found = dataclasses.replace(case, client=small).plan()
    assert found.plan.client_memory_bytes <= gigabytes * 1e9


@pytest.mark.parametrize("grid", [1, 4, 5])
@hypothesis.settings(max_examples=8)
@hypothesis.given(case=_cases())
def test_machines_change_on_the_grid_alone(grid, case):
    found = case.plan(dataclasses.replace(_EXACT, grid=grid))
    borders = {0, 66, *(1 + 2 * layer for layer in range(grid, 32, grid))}
    for one in found.plan.decode:
        assert {one.start, one.stop} <= borders
    pieces = [planner.layers_of(_MODEL, one) for one in found.plan.decode]
    assert pieces[0][0] == 0 and pieces[-1][1] == 32
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(pieces))
    assert all(stop % grid == 0 for _, stop in pieces[:-1])


@pytest.mark.parametrize("span", [(0, 1), (0, 4), (3, 65)])
def test_a_stretch_of_parts_of_layers_is_none_of_layers(span):
    stretch = planner.Stretch(side=Side.CLIENT, start=span[0], stop=span[1])
    with pytest.raises(ValueError, match=f"nodes {span[0]}:{span[1]} are no whole layers; plan"):
        planner.layers_of(_MODEL, stretch)


def test_head_and_embedding_stay_where_they_are_told():
    for head in Side:
        policy = dataclasses.replace(_EXACT, head=head, embedding=Side.CLIENT)
        case = _split_case()
        request = dataclasses.replace(case.request, ttft_s=1.5)
        found = dataclasses.replace(case, request=request).plan(policy)
        assert _sides(found.plan.decode)[0] is Side.CLIENT
        assert _sides(found.plan.decode)[-1] is head


def test_decode_placed_apart_from_prefill_never_costs_more_and_may_cost_less():
    # A phone takes 2 s for the prompt, but has the bandwidth for a token in 0.1 s.
    request = Request(prompt_len=256, output_len=128, ttft_s=1.0, tpot_s=0.15)
    case = _Case(_CLIENTS["phone"], _SERVERS["h100"], _LINKS["lan"], request)
    apart = case.plan(dataclasses.replace(_EXACT, migrates=True))
    assert apart.plan.charge_s < 0.9 * case.plan().plan.charge_s
    assert apart.plan.prefill != apart.plan.decode


def test_a_split_that_saves_too_little_is_left_to_the_server():
    case = _split_case()
    found = case.plan()
    saved = 1 - found.plan.charge_s / found.all_server_charge_s
    for least, kind in ((0.99 * saved, VerdictKind.SPLIT), (1.01 * saved, VerdictKind.ALL_SERVER)):
        asked = dataclasses.replace(_EXACT, least_saving=least)
        assert case.plan(asked).kind is kind
        pinned = dataclasses.replace(asked, pinned_first=1)
        assert case.plan(pinned).kind is not VerdictKind.ALL_SERVER
    slow = dataclasses.replace(case.request, ttft_s=9.0, tpot_s=9.0)
    asked = dataclasses.replace(_EXACT, least_saving=0.999)
    assert dataclasses.replace(case, request=slow).plan(asked).kind is VerdictKind.ALL_CLIENT


def test_the_same_question_has_the_same_answer():
    assert _split_case().plan() == _split_case().plan()


def test_the_guard_keeps_a_share_of_the_deadlines():
    case = _split_case()
    found = case.plan(dataclasses.replace(_EXACT, guard=0.8))
    assert found.plan.ttft_s <= 0.8 * case.request.ttft_s
    assert found.plan.tpot_s <= 0.8 * case.request.tpot_s
    assert found.plan.charge_s > case.plan().plan.charge_s


def test_each_accounting_charges_what_it_says():
    case = _split_case()
    marginal, average = (
        case.plan(dataclasses.replace(_EXACT, accounting=one)).all_server_charge_s
        for one in (Accounting.MARGINAL, Accounting.AVERAGE)
    )
    assert 0 < marginal < average
    doubled = dataclasses.replace(
        _EXACT, accounting=Accounting.PRICED, prices=Prices(second=2.0, gigabyte_second=0.0)
    )
    assert case.plan(doubled).all_server_charge_s == pytest.approx(2 * marginal, rel=1e-6)
    held = dataclasses.replace(
        _EXACT, accounting=Accounting.PRICED, prices=Prices(second=0.0, gigabyte_second=1.0)
    )
    # 2 x 8 x 128 numbers of 2 bytes in 32 layers, of the prompt and half of the output, until the
    # deadlines end.
    gigabytes = 32 * 2 * 8 * 128 * 2 * (1024 + 127 / 2) / 1e9
    assert case.plan(held).all_server_charge_s == pytest.approx(
        gigabytes * (0.7 + 127 * 0.05), rel=1e-6
    )


def test_prices_rise_where_more_is_used_than_should_be():
    before = Prices(second=1.0, gigabyte_second=0.01)
    after = before.updated(busy_fraction=1.0, memory_fraction=0.5, target=0.9, rate=0.5)
    assert (after.second, after.gigabyte_second) == (pytest.approx(1.05), 0.0)


def test_a_frontier_is_cheaper_with_longer_deadlines_and_has_the_plan_of_these():
    case = _split_case()
    points = planner.frontier(*case.ends, case.request, _EXACT)
    stretches, charges = zip(*((one.stretch, one.plan.charge_s) for one in points), strict=True)
    assert list(stretches) == sorted(stretches)
    assert list(charges) == sorted(charges, reverse=True)
    assert len(points) > 3
    at = [one.plan.charge_s for one in points if one.stretch <= 1][-1]
    assert at == pytest.approx(case.plan().plan.charge_s, rel=0.05)
    for one in points[:3]:
        longer = dataclasses.replace(
            case.request,
            ttft_s=case.request.ttft_s * one.stretch * (1 + 1e-9),
            tpot_s=case.request.tpot_s * one.stretch * (1 + 1e-9),
        )
        asked = dataclasses.replace(case, request=longer)
        assert asked.plan().plan.charge_s <= one.plan.charge_s


def test_without_deadlines_a_client_that_has_room_does_all():
    case = _split_case()
    free = dataclasses.replace(case.request, ttft_s=None, tpot_s=None)
    found = dataclasses.replace(case, request=free).plan()
    assert found.kind is VerdictKind.ALL_CLIENT
    points = planner.frontier(*case.ends, free, _EXACT)
    assert points[-1].stretch == pytest.approx(found.plan.e2e_s)
    assert math.isfinite(points[0].stretch)
