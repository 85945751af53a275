import dataclasses

import pytest
import split_choices
import split_problems
from split_problems import C, S

from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split.planning import choosing, cuts, planner
from nanoflow_jax.split.planning import problem as problems
from nanoflow_jax.split.planning.asked import Request
from nanoflow_jax.split.planning.choosing import Measured
from nanoflow_jax.split.planning.planner import VerdictKind

_REQUEST = Request(prompt_len=100, output_len=11, ttft_s=10.0, tpot_s=0.05)


def _cut(start, stop):
    return cut_lib.Cut(start=start, stop=stop, num_layers=6)


def _as_planned(choice, **changes):
    """What comes of a request that goes as it was planned."""
    plan, steps = choice.verdict.plan, choice.request.num_steps
    return dataclasses.replace(
        Measured(
            num_tokens=choice.request.most_output,
            ttft_s=plan.ttft_s,
            tpot_s=plan.tpot_s,
            client_s=plan.first_token.client_s + steps * plan.step.client_s,
            client_first_s=plan.first_token.client_s,
            server_s=plan.first_token.server_s + steps * plan.step.server_s,
            server_first_s=plan.first_token.server_s,
        ),
        **changes,
    )


def test_cuts_that_can_be_run_have_one_range_at_the_server_where_units_allow_it():
    model, policy = split_choices.model(), split_choices.policy()
    problem = problems.build(*split_choices.ends().in_order, _REQUEST, policy)
    found = {one.decode for one in cuts.runnable(problem)}
    assert found == {(S, S, S), (C, S, S), (S, S, C), (C, S, C)}
    plans = [planner.as_plan(problem, one) for one in cuts.runnable(problem)]
    assert {cuts.try_cut(model, plan) for plan in plans} == {
        _cut(0, 6),
        _cut(2, 6),
        _cut(0, 4),
        _cut(2, 4),
    }
    assert {cuts.placement(problem, plan).decode for plan in plans} == found


def test_layers_that_leave_no_single_range_are_refused():
    problem = split_problems.random_problem(0, mode="two", num_units=3)
    sides = ({S}, {C}, {S})
    units = [
        dataclasses.replace(unit, allowed=frozenset(allowed))
        for unit, allowed in zip(problem.units, sides, strict=True)
    ]
    with pytest.raises(ValueError, match="leaves no single range of layers to the server"):
        cuts.runnable(dataclasses.replace(problem, units=tuple(units)))


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all_cuts_that_can_be_run(seed):
    problem = split_problems.random_problem(seed, mode="all", num_units=5)
    problem = dataclasses.replace(
        problem,
        units=tuple(dataclasses.replace(u, allowed=frozenset({C, S})) for u in problem.units),
    )
    by_hand = []
    for one in split_problems.all_placements(problem):
        changes = "".join("CS"[side] for side in one.decode).strip("C")
        found = split_problems.by_hand(problem, one)
        if "C" not in changes and split_problems.is_within(problem, found):
            by_hand.append(found["rank"])
    chosen = planner.cheapest_of(problem, cuts.runnable(problem))
    if chosen is None:
        assert not by_hand
    else:
        assert problems.outcome(problem, chosen).rank == min(by_hand)


def test_a_client_that_holds_all_may_be_left_alone():
    choice = split_choices.chooser(split_choices.WHOLE).choose(_REQUEST)
    assert (choice.verdict.kind, choice.cut) == (VerdictKind.ALL_CLIENT, None)
    assert choice.expected.server_s == choice.expected.round_trips == 0


def test_a_request_that_is_rejected_is_told_the_best_of_the_cuts_that_can_be_run():
    chooser = split_choices.chooser(rtt_ms=40.0)
    choice = chooser.choose(Request(prompt_len=100, output_len=11, ttft_s=0.02))
    assert (choice.verdict.kind, choice.cut, choice.expected) == (VerdictKind.REJECT, None, None)
    # Two messages, and 6 layers and two ends of 10 us and 5 us.
    least_s = 0.04 + 100 * 6 * 1e-5 + 2 * 5e-6
    assert choice.verdict.best.ttft_s == pytest.approx(least_s, rel=1e-3)
    assert "the first token takes 46.0 ms at best" in choice.verdict.reason


def test_what_goes_as_planned_changes_nothing():
    chooser = split_choices.chooser()
    before = chooser.choose(_REQUEST)
    chooser.learn(before, _as_planned(before))
    after = chooser.corrections
    assert (after.client, after.server) == pytest.approx((1, 1))
    assert after.rtt_s == pytest.approx(1e-3)
    assert chooser.choose(_REQUEST).cut == before.cut == _cut(2, 4)


def test_a_machine_twice_as_slow_is_half_way_there_after_a_request():
    chooser = split_choices.chooser()
    choice = chooser.choose(_REQUEST)
    planned = _as_planned(choice)
    chooser.learn(choice, dataclasses.replace(planned, client_s=2 * planned.client_s))
    assert chooser.corrections.client == pytest.approx(1.5)
    again = chooser.choose(_REQUEST)
    assert again.verdict.plan.step.client_s == pytest.approx(
        1.5 * choice.verdict.plan.step.client_s
    )
    twice = dataclasses.replace(planned, client_s=2 * planned.client_s)
    chooser.learn(again, twice)
    assert chooser.corrections.client == pytest.approx(1.75)


def test_a_stall_counts_as_four_times_as_slow_and_is_forgotten_by_a_client_that_is_left_out():
    chooser = split_choices.chooser()
    choice = chooser.choose(_REQUEST)
    planned = _as_planned(choice)
    chooser.learn(choice, dataclasses.replace(planned, client_s=1000 * planned.client_s))
    assert chooser.corrections.client == pytest.approx(2.5)
    hurried = dataclasses.replace(_REQUEST, tpot_s=0.001)
    for _ in range(20):
        alone = chooser.choose(hurried)
        assert alone.cut == _cut(0, 6)
        chooser.learn(alone, _as_planned(alone, client_s=0.0))
    assert 1 < chooser.corrections.client < 1.15


def test_a_slower_server_is_learnt_of_it_alone():
    chooser = split_choices.chooser(rtt_ms=100.0)
    choice = chooser.choose(_REQUEST)
    assert choice.cut == _cut(0, 6)
    planned = _as_planned(choice, rtt_s=0.1)
    chooser.learn(choice, dataclasses.replace(planned, server_s=3 * planned.server_s, client_s=0.0))
    found = chooser.corrections
    assert (found.client, found.server, found.rtt_s) == (1.0, pytest.approx(2.0), 0.1)


def test_bytes_that_take_longer_than_promised_show_a_slower_link():
    chooser = split_choices.chooser(hidden_size=1024, mbyte_per_s=10.0)
    choice = chooser.choose(_REQUEST)
    assert choice.cut == _cut(2, 4)
    # 100 rows of 2 kB each way, at 10 MB/s.
    bytes_s = 2 * 100 * 2048 / 1e7
    slow = _as_planned(choice, ttft_s=choice.verdict.plan.ttft_s + 2 * bytes_s)
    chooser.learn(choice, slow)
    assert chooser.corrections.transfer == pytest.approx(2.0)
    assert chooser.ends.link.up_bytes_per_s == pytest.approx(5e6)
    # All of it came in a quarter of the time that bytes alone are now thought to take.
    quick = _as_planned(choice, ttft_s=0.5 * bytes_s)
    shown = chooser.learn(chooser.choose(_REQUEST), quick)
    assert shown.transfer == pytest.approx(0.25)


def test_few_bytes_show_nothing_of_a_link():
    chooser = split_choices.chooser()
    choice = chooser.choose(_REQUEST)
    slow = _as_planned(choice, ttft_s=1.0)
    assert chooser.learn(choice, slow).transfer is None


def test_a_request_keeps_the_cut_before_it_unless_another_saves_enough():
    for least_saving, expected in ((0.7, _cut(0, 6)), (0.1, _cut(2, 4))):
        chooser = split_choices.chooser(rtt_ms=1.0, changes={"least_saving": least_saving})
        # The first may not wait for a round trip, so that the server does all.
        hurried = dataclasses.replace(_REQUEST, tpot_s=0.001)
        assert chooser.choose(hurried).cut == _cut(0, 6)
        assert chooser.choose(_REQUEST).cut == expected


def test_a_cut_that_would_be_late_is_left_whatever_another_saves():
    chooser = split_choices.chooser()
    assert chooser.choose(_REQUEST).cut == _cut(2, 4)
    assert chooser.choose(dataclasses.replace(_REQUEST, tpot_s=0.001)).cut == _cut(0, 6)


def test_a_cut_just_dearer_than_the_best_is_kept():
    chooser = split_choices.chooser(changes={"least_saving": 0.0})
    model = chooser.ends.model
    problem = problems.build(
        *chooser.ends.in_order, _REQUEST, split_choices.policy(least_saving=0.5)
    )
    present = next(one for one in cuts.runnable(problem) if one.decode == (C, S, S))
    for least_saving, kept in ((0.0, False), (0.45, False), (0.55, True)):
        verdict = planner.plan(
            *chooser.ends.in_order,
            _REQUEST,
            split_choices.policy(least_saving=least_saving),
            among=cuts.runnable,
            present=present,
        )
        # (C, S, S) leaves four layers and the head to the server, (C, S, C) two.
        assert (cuts.try_cut(model, verdict.plan) == _cut(2, 6)) == kept


def test_what_cannot_be_chosen_with_is_refused():
    with pytest.raises(ValueError, match="sessions do not move cached tokens"):
        split_choices.chooser(changes={"migrates": True})
    with pytest.raises(ValueError, match="a sample's weight of 0 is outside"):
        split_choices.chooser(weight=0)
    with pytest.raises(ValueError, match=r"borders \[0, 9\] are not all within 0 to 6"):
        split_choices.chooser(changes={"borders": (0, 9)}).choose(_REQUEST)
    with pytest.raises(ValueError, match="placed together by borders before layers 0, 3, but some"):
        split_choices.chooser(
            changes={"borders": (0, 3), "pinned_first": 2}, held=((0, 2),)
        ).choose(_REQUEST)


def test_a_rejected_request_shows_nothing():
    chooser = split_choices.chooser(rtt_ms=40.0)
    choice = chooser.choose(dataclasses.replace(_REQUEST, ttft_s=0.001))
    measured = Measured(
        num_tokens=1,
        ttft_s=1.0,
        tpot_s=None,
        client_s=1.0,
        client_first_s=1.0,
        server_s=1.0,
        server_first_s=1.0,
    )
    assert choosing.sample(choice, measured, activation_bytes=2.0) == choosing.Sample()
