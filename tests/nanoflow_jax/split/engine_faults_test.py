"""A device that fails takes along what it had cached of sessions, and nothing else."""

import jax
import piece_runs
import pytest
import random_folder
from engine_runs import ask, build_small, run
from faulty_device import MESSAGE, FaultyDevice
from piece_runs import Session, build_split, greedy

from nanoflow_jax.split import interface

_KNOBS = {
    "max_requests": 8,
    "dense_batch": 24,
    "buckets": "24:8:8",
    "cache_page_size": 5,
    "max_context_len": 64,
    "cache_num_pages": 60,
}
_PROMPTS = [[7, 3, 50, 2, 91, 17, 33], [5], list(range(40, 70)), [44, 45]]
_PARAMS = {"max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_folder.write(tmp_path_factory.mktemp("model") / "llama", seed=3)


@pytest.fixture(scope="module")
def wanted(folder):
    whole = build_small(folder, **_KNOBS)
    asked = [ask(str(i), prompt, **_PARAMS) for i, prompt in enumerate(_PROMPTS)]
    found = [output.token_ids for output in run(whole, asked)]
    whole.close()
    return found


@pytest.fixture(scope="module")
def engines(folder):
    made = [build_split(folder, grid=(1,), **_KNOBS) for _ in range(2)]
    yield made
    for engine in made:
        engine.close()


def _sessions(engines):
    client, server = engines
    return [
        Session(
            name=str(i),
            prompt=prompt,
            plan=[(client, 0, 1), (server, 1, 2)],
            params=greedy(max_tokens=8),
        )
        for i, prompt in enumerate(_PROMPTS[:2])
    ]


def _fails_once(monkeypatch, engine, where):
    def rule(names):
        return bool(names) and not device.num_failed

    device = FaultyDevice(monkeypatch, engine.engine, rule, where=where)
    return device


@pytest.mark.parametrize("where", ["forward", "sample", "collect"])
def test_a_step_that_fails_ends_sessions_and_computes_requests_again(
    monkeypatch, engines, wanted, where
):
    client, server = engines
    sessions = _sessions(engines)
    idle = interface.Piece(
        piece_id="idle", start=1, stop=2, params=greedy(), prompt_len=3, max_len=9
    )
    server.open(idle)
    for session in sessions:
        session.open()
    for i, prompt in enumerate(_PROMPTS):
        server.add(ask(str(i), prompt, **_PARAMS))
    updates = []
    while len(sessions[0].token_ids) < 2:
        updates += piece_runs.turn(engines, sessions)
    device = _fails_once(monkeypatch, server, where)
    while not device.num_failed:
        updates += piece_runs.turn(engines, sessions)
    monkeypatch.undo()
    while client.has_work or server.has_work:
        updates += piece_runs.turn(engines, sessions)
    message = f"the device failed, and with it went what was cached of this session: {MESSAGE}"
    for session in sessions:
        assert (session.finish_reason, session.error) == ("error", message)
    for i, tokens in enumerate(wanted):
        assert piece_runs.tokens_of(updates, str(i)) == tokens
    # The one of which nothing had been cached goes on.
    server.feed("idle", 0, hidden=piece_runs.rows(3, 32))
    outputs = [output for _ in range(3) for output in server.step()]
    assert [(output.piece_id, output.error) for output in outputs] == [("idle", None)]
    server.close_piece("idle")
    assert server.engine.num_pages_used == client.engine.num_pages_used == 0


def test_sessions_that_come_after_a_failed_step_are_served(monkeypatch, engines, wanted):
    _, server = engines
    sessions = _sessions(engines)
    device = FaultyDevice(monkeypatch, server.engine, lambda names: len(names) > 1)
    for i, prompt in enumerate(_PROMPTS):
        server.add(ask(str(i), prompt, **_PARAMS))
    server.step()
    assert device.num_failed == 1
    for session in sessions:  # they wait until the suspects have been cleared
        session.open()
    monkeypatch.undo()
    updates = piece_runs.finish(engines, sessions)
    assert [session.token_ids for session in sessions] == wanted[:2]
    for i, tokens in enumerate(wanted):
        assert piece_runs.tokens_of(updates, str(i)) == tokens


def test_a_device_that_fails_while_rows_are_cut_off_ends_the_session(monkeypatch, engines):
    _, server = engines
    piece = interface.Piece(piece_id="a", start=1, stop=2, params=greedy(), prompt_len=3, max_len=9)
    server.open(piece)
    server.feed("a", 0, hidden=piece_runs.rows(3, 32))
    _fails_once(monkeypatch, server, "collect")
    server.step()
    server.truncate("a", 1)
    monkeypatch.undo()
    [output] = server.step()
    assert (output.piece_id, output.finish_reason) == ("a", "error")
    with pytest.raises(ValueError, match=r"^piece 'a' has ended and takes no more rows; close it$"):
        server.feed("a", 1, hidden=piece_runs.rows(1, 32))
    server.close_piece("a")


def test_a_device_that_fails_without_rows_too_ends_the_engine(monkeypatch, folder):
    doomed = build_split(folder, grid=(1,), **_KNOBS)
    doomed.add(ask("a", [5], **_PARAMS))
    FaultyDevice(monkeypatch, doomed.engine, lambda names: True)
    with pytest.raises(jax.errors.JaxRuntimeError, match=MESSAGE):
        doomed.step()
    doomed.close()
