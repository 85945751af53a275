import hypothesis
import jax
import pytest
from engine_runs import ask, build_small, run
from faulty_device import MESSAGE, FaultyDevice
from golden import cases
from hypothesis import strategies as st

from nanoflow_jax.engine import recovery
from nanoflow_jax.request import FinishReason, Grammar, GrammarKind

_CASE = cases.load("llama3")
_KNOBS = {
    "max_requests": 8,
    "dense_batch": 24,
    "buckets": "8:8:0,24:8:8",
    "cache_page_size": 5,
}


@pytest.fixture(scope="module")
def engine():
    made = build_small(_CASE.path, **_KNOBS)
    yield made
    made.close()


def _requests():
    """More requests than run at once, of every kind that leaves state on the device or here."""
    kinds = (
        {},
        {"prompt_logprobs": 2},
        {"temperature": 0.9, "seed": 4, "top_p": 0.9},
        {"repetition_penalty": 1.4, "presence_penalty": 0.3},
        {"logprobs": 3},
        {"grammar": Grammar(kind=GrammarKind.REGEX, text="[a-z]{30}")},
    )
    return [
        ask(str(i), prompt, max_tokens=8 + i, ignore_eos=True, **kinds[i % len(kinds)])
        for i, prompt in enumerate(_CASE.prompts[:11])
    ]


@pytest.fixture(scope="module")
def wanted(engine):
    return run(engine, _requests())


def _check_same(found, wanted):
    assert found.token_ids == wanted.token_ids
    assert found.finish_reason is wanted.finish_reason
    for name in ("logprobs", "prompt_logprobs"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert [e.token_id for e in ours] == [e.token_id for e in theirs]
        assert [e.logprob for e in ours] == pytest.approx([e.logprob for e in theirs], abs=1e-4)


def _check(engine, found, wanted, *, guilty=()):
    for i, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if str(i) in guilty:
            assert ours.finish_reason is FinishReason.ERROR
            assert ours.error == (
                f"the device failed on this request, also when it ran alone: {MESSAGE}"
            )
            assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
        else:
            _check_same(ours, theirs)
    assert engine.num_pages_used == engine.num_running == engine.num_waiting == 0


@pytest.mark.parametrize("where", ["forward", "sample", "collect"])
@pytest.mark.parametrize("guilty", [("0",), ("7",), ("2", "3", "10")])
def test_f7_an_xla_error_fails_only_the_requests_that_cause_it(
    engine, wanted, monkeypatch, where, guilty
):
    FaultyDevice(monkeypatch, engine, lambda names: not {*guilty}.isdisjoint(names), where=where)
    _check(engine, run(engine, _requests()), wanted, guilty=guilty)


def test_f7_an_xla_error_in_the_middle_of_a_request_keeps_the_tokens_before_it(
    engine, wanted, monkeypatch
):
    def is_late(names):
        made = {s.request.request_id: s for s in engine._sequences.values()}
        return "4" in names and made["4"].num_generated >= 5

    FaultyDevice(monkeypatch, engine, is_late)
    found = run(engine, _requests())
    _check(engine, found, wanted, guilty=("4",))
    assert len(found[4].token_ids) == 5


@pytest.mark.parametrize("where", ["forward", "collect"])
def test_f7_an_xla_error_that_does_not_come_again_fails_nobody(engine, wanted, monkeypatch, where):
    left = iter([False] * 4 + [True] + [False] * 5 + [True])
    device = FaultyDevice(monkeypatch, engine, lambda names: next(left, False), where=where)
    _check(engine, run(engine, _requests()), wanted)
    assert device.num_failed == 2


def test_f7_a_request_alone_in_the_engine_may_fail_and_the_next_is_served(
    engine, wanted, monkeypatch
):
    device = FaultyDevice(monkeypatch, engine, lambda names: "0" in names)
    for _ in range(4):
        (found,) = run(engine, _requests()[:1])
        assert found.finish_reason is FinishReason.ERROR
    assert device.num_failed == 8
    _check_same(*run(engine, _requests()[1:2]), wanted[1])


def test_f7_a_device_that_fails_without_requests_too_ends_the_engine(monkeypatch):
    broken = build_small(_CASE.path, **_KNOBS)
    FaultyDevice(monkeypatch, broken, lambda names: True)
    broken.add(_requests()[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="made up by the test"):
        broken.step()
    broken.close()


def test_f5_steps_without_room_for_all_their_requests_run_with_fewer(engine, wanted, monkeypatch):
    device = FaultyDevice(monkeypatch, engine, lambda names: len(names) > 3)
    _check(engine, run(engine, _requests()), wanted)
    assert 0 < device.num_failed < 12


def test_suspects_that_are_aborted_hold_up_nobody(engine, wanted, monkeypatch):
    FaultyDevice(monkeypatch, engine, lambda names: len(names) > 1)
    asked = _requests()
    for request in asked[:4]:
        engine.add(request)
    while engine._recovery.group is None:
        engine.step()
    for request in asked[:4]:
        engine.abort(request.request_id)
    monkeypatch.undo()
    _check_same(*run(engine, asked[4:5]), wanted[4])


_GUILTY = st.sets(st.integers(0, 15))


@hypothesis.given(size=st.integers(1, 16), guilty=_GUILTY, room=st.integers(1, 16))
def test_whoever_fails_alone_is_found_and_nobody_else(size, guilty, room):
    """Plays the engine: of those who may run the first `room` do."""
    tokens = {str(i): 1 for i in range(size)}
    found = recovery.Recovery(max_requests=16)
    blamed = []
    for _ in range(1000):
        allowed = [key for key in tokens if found.group is None or key in found.group]
        ran = {key: tokens[key] for key in allowed[: min(room, found.most_running)]}
        if not ran:
            break
        if guilty.isdisjoint(map(int, ran)):
            for key in ran:
                tokens[key] += 1
                if tokens[key] == 6:
                    del tokens[key]
            found.take_step(tokens)
        elif (one := found.blame(ran)) is not None:
            blamed.append(int(one))
            del tokens[one]
    assert not tokens
    assert sorted(blamed) == sorted(i for i in guilty if i < size)


def test_more_requests_run_again_after_enough_good_steps():
    found = recovery.Recovery(max_requests=8)
    tokens = {str(i): 1 for i in range(8)}
    assert not found.is_active
    while found.most_running == 8:
        ran = {key: tokens[key] for key in found.group or tokens}
        if len(ran) > 2:
            assert found.blame(ran) is None
        else:
            tokens.update((key, count + 1) for key, count in ran.items())
            found.take_step(tokens)
    assert (found.most_running, found.group) == (2, None)
    steps = 0
    while found.is_active:
        found.take_step({})
        steps += 1
    assert steps == 2 * 256
    assert found.most_running == 8
