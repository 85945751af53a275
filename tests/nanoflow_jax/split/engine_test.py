"""Sessions over two engines give what one process gives, alone and beside all others."""

import itertools
import re

import numpy as np
import piece_runs
import pytest
import random_folder
from engine_runs import Output, ask, build_small, run, take
from piece_runs import Session, build_split, greedy

from nanoflow_jax.models import loading
from nanoflow_jax.split import interface

_LAYERS, _VOCAB, _WIDTH = 4, 101, 32
_KNOBS = {
    "max_requests": 8,
    "dense_batch": 24,
    "buckets": "8:8:0,24:8:8",
    "cache_page_size": 5,
    "max_context_len": 64,
    "cache_num_pages": 60,
}
# The third one takes two steps.
_PROMPTS = [[7, 3, 50, 2, 91, 17, 33], [5], [i % _VOCAB for i in range(9, 99, 3)], [44, 45]]
_LENGTH = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_folder.write(
        tmp_path_factory.mktemp("model") / "llama", seed=3, num_hidden_layers=_LAYERS
    )


def _ordinary(count=_LENGTH):
    """Whole requests of every kind that leaves state on the device or here."""
    kinds = (
        {"prompt_logprobs": 2},
        {"temperature": 0.9, "seed": 4, "top_p": 0.9},
        {"repetition_penalty": 1.4, "presence_penalty": 0.3, "logprobs": 3},
        {},
    )
    return [
        ask(f"whole {i}", prompt, max_tokens=count + i, ignore_eos=True, **kinds[i % len(kinds)])
        for i, prompt in enumerate(_PROMPTS)
    ]


@pytest.fixture(scope="module")
def wanted(folder):
    """What one process says: to each prompt alone, and to the requests of every kind."""
    whole = build_small(folder, **_KNOBS)
    asked = [ask(str(i), p, max_tokens=_LENGTH, ignore_eos=True) for i, p in enumerate(_PROMPTS)]
    found = run(whole, asked), run(whole, _ordinary())
    whole.close()
    return [output.token_ids for output in found[0]], found[1]


@pytest.fixture(scope="module")
def server(folder):
    made = build_split(folder, grid=(1, 2, 3), **_KNOBS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(folder):
    """It has all layers too, so that each plan can be had of it."""
    made = build_split(folder, grid=(1, 2, 3), **_KNOBS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def thin(folder):
    """It has the ends of the model alone."""
    made = build_split(folder, layers=[(0, 1), (3, 4)], **_KNOBS)
    yield made
    made.close()


def _session(name, index, plan, **more):
    chunk = more.pop("chunk", 1000)
    params = greedy(max_tokens=_LENGTH, **more)
    return Session(name=name, prompt=_PROMPTS[index], plan=plan, params=params, chunk=chunk)


def _cut(*borders, engines):
    """The plan that hands over at some borders, to the engines in turn."""
    edges = [0, *borders, _LAYERS]
    ranges = itertools.pairwise(edges)
    return [(engines[i % 2], start, stop) for i, (start, stop) in enumerate(ranges)]


@pytest.mark.parametrize("borders", [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3), ()])
def test_a_session_alone_gives_the_tokens_of_one_process(server, client, wanted, borders):
    for engines in ((client, server), (server, client)):
        for index in (0, 1, 2):
            session = _session("a", index, _cut(*borders, engines=engines), chunk=11)
            session.open()
            piece_runs.finish(engines, [session])
            assert session.token_ids == wanted[0][index]
            assert (session.finish_reason, session.error) == ("length", None)


def test_a_client_that_has_the_ends_alone_gives_the_tokens_of_one_process(server, thin, wanted):
    assert thin.held.spans == ((0, 1), (3, 4))
    weights = thin.engine._runner._segments
    held = sum(array.nbytes for segment in weights for array in segment.weights)
    assert held == loading.model_bytes(thin.held.config, thin.held.dtype, thin.held.spans)
    assert [len(segment.caches) for segment in weights] == [1, 1]
    sessions = [_session(str(i), i, _cut(1, 3, engines=(thin, server))) for i in range(4)]
    for session in sessions:
        session.open()
    piece_runs.finish((thin, server), sessions)
    assert [session.token_ids for session in sessions] == wanted[0]


class _Steps:
    """Notes the rows that each segment of an engine runs in each step."""

    def __init__(self, monkeypatch, engine):
        self.rows = []
        forward = engine.engine._runner.forward

        def note(inputs):
            most = engine.engine._runner._sizes.dense_batch
            self.rows.append({s.segment: int((s.rows < most).sum()) for s in inputs.steps})
            return forward(inputs)

        monkeypatch.setattr(engine.engine._runner, "forward", note)


def _run_beside(engines, server, sessions, requests):
    outputs = {asked.request_id: Output() for asked in requests}
    for session in sessions:
        session.open()
    for asked in requests:
        server.add(asked)
    for update in piece_runs.finish(engines, sessions):
        take(outputs[update.request_id], update)
    return list(outputs.values())


def test_sessions_of_all_plans_and_ordinary_requests_share_steps(
    monkeypatch, server, client, thin, wanted
):
    steps = _Steps(monkeypatch, server)
    plans = [
        _cut(1, engines=(client, server)),
        _cut(3, engines=(server, client)),
        _cut(1, 3, engines=(thin, server)),
        _cut(1, 2, engines=(server, client)),
    ]
    sessions = [_session(str(i), i, plan, chunk=7) for i, plan in enumerate(plans)]
    outputs = _run_beside((client, thin, server), server, sessions, _ordinary())
    assert [session.token_ids for session in sessions] == wanted[0]
    _check_same(outputs, wanted[1])
    # Each segment runs the rows alone that have it in their piece, and no segment runs idle.
    assert any(len(rows) == 4 and len(set(rows.values())) > 2 for rows in steps.rows)
    assert all(count for rows in steps.rows for count in rows.values())


def _check_same(outputs, wanted):
    for output, one in zip(outputs, wanted, strict=True):
        assert (output.token_ids, output.finish_reason) == (one.token_ids, one.finish_reason)
        for kind in ("logprobs", "prompt_logprobs"):
            for a, b in zip(getattr(output, kind), getattr(one, kind), strict=True):
                assert (a.token_id, a.rank) == (b.token_id, b.rank)
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_sessions_that_come_and_go_at_any_time_give_their_tokens(server, client, wanted, seed):
    random = np.random.default_rng(seed)
    engines = (client, server)
    later, running, cut_short = [], [], []
    for i in range(12):
        borders = sorted(random.choice([1, 2, 3], random.integers(1, 4), replace=False).tolist())
        plan = _cut(*borders, engines=engines[:: random.choice([1, -1])])
        chunk = int(random.integers(1, 12))
        later.append(_session(str(i), int(random.integers(len(_PROMPTS))), plan, chunk=chunk))
    for i, asked in enumerate(_ordinary()):
        engines[i % 2].add(asked)
    sessions = list(later)
    while later or client.has_work or server.has_work:
        if later and random.random() < 0.5:
            running.append(later.pop())
            running[-1].open()
        piece_runs.turn(engines, sessions)
        if running and random.random() < 0.05:
            cut_short.append(running.pop(int(random.integers(len(running)))))
            cut_short[-1].close()
    assert server.engine.num_pages_used == client.engine.num_pages_used == 0
    assert server.engine.num_late_compiles == client.engine.num_late_compiles == 0
    for session in sessions:
        tokens = wanted[0][_PROMPTS.index(session.prompt)]
        assert session.token_ids == tokens[: len(session.token_ids)]
        assert session in cut_short or len(session.token_ids) == _LENGTH
    assert len(cut_short) < len(sessions)


def test_layers_that_a_client_runs_cost_the_server_nothing(monkeypatch, server, client):
    steps = _Steps(monkeypatch, server)
    session = _session("a", 0, _cut(3, engines=(client, server)))
    session.open()
    piece_runs.finish((client, server), [session])
    assert steps.rows == [{3: 7}] + [{3: 1}] * (_LENGTH - 1)


def test_draws_of_a_split_session_know_the_features_of_ordinary_requests(server, client, folder):
    params = {
        "temperature": 0.8,
        "seed": 11,
        "frequency_penalty": 1.0,
        "logit_bias": {4: 3.0},
        "logprobs": 2,
    }
    whole = build_small(folder, **_KNOBS)
    [one] = run(whole, [ask("a", _PROMPTS[0], max_tokens=_LENGTH, ignore_eos=True, **params)])
    whole.close()
    session = _session("a", 0, _cut(2, engines=(client, server)), **params)
    session.open()
    piece_runs.finish((client, server), [session])
    assert session.token_ids == one.token_ids
    assert [entry.rank for entry in session.logprobs] == [entry.rank for entry in one.logprobs]


def test_a_stop_token_ends_a_session_and_frees_its_pages(server, client, wanted):
    stop = wanted[0][0][3]
    count = wanted[0][0].index(stop) + 1
    session = _session("a", 0, _cut(2, engines=(client, server)), stop_token_ids=(stop,))
    session.open()
    piece_runs.finish((client, server), [session])
    assert session.token_ids == wanted[0][0][:count]
    assert session.finish_reason == "stop"


def test_ordinary_requests_are_preempted_beside_pieces_and_pieces_never(folder, client, wanted):
    """The pieces hold most of a small cache while their client is slow."""
    knobs = _KNOBS | {"cache_num_pages": 19}
    small = build_split(folder, grid=(1, 2, 3), **knobs)
    sessions = [_session(str(i), i, _cut(2, engines=(client, small))) for i in (0, 2)]
    # They may end at any token, so that more are let in than there is room for in the end.
    requests = [
        ask(str(i), _PROMPTS[0], max_tokens=20, ignore_eos=True, stop=("x",)) for i in range(6)
    ]
    small.engine._scheduler._lengths._count = 100  # as if outputs had been short until now
    small.engine._scheduler._lengths._total = 100
    outputs = _run_beside((client, small), small, sessions, requests)
    assert [session.token_ids for session in sessions] == [wanted[0][0], wanted[0][2]]
    assert {tuple(output.token_ids[:_LENGTH]) for output in outputs} == {tuple(wanted[0][0])}
    assert small.engine.num_preemptions > 0
    small.close()


def _piece(name, start, stop, **changes):
    fields = {"params": greedy(max_tokens=4), "prompt_len": 3, "max_len": 9, **changes}
    return interface.Piece(piece_id=name, start=start, stop=stop, **fields)


def test_a_piece_holds_pages_for_its_life_and_waits_for_rows_without_work(server):
    server.open(_piece("a", 1, 3))
    server.step()
    assert server.engine.num_pages_used == 2  # of 5 positions each
    assert not server.has_work
    server.feed("a", 0, hidden=piece_runs.rows(3, _WIDTH))
    assert server.has_work
    outputs = []
    while server.has_work:
        outputs += server.step()
    [output] = outputs
    assert (output.piece_id, output.position, output.hidden.shape) == ("a", 0, (3, _WIDTH))
    assert server.engine.num_pages_used == 2
    server.close_piece("a")
    assert server.engine.num_pages_used == 0


def test_what_waits_for_pages_of_idle_pieces_is_no_work_until_they_are_free(server):
    for name in ("a", "b", "c", "d"):
        server.open(_piece(name, 1, 3, max_len=64))
    server.open(_piece("late", 1, 3, max_len=64))  # 13 pages each, of 60
    server.feed("late", 0, hidden=piece_runs.rows(2, _WIDTH))
    for _ in range(3):
        assert server.step() == []
    assert (server.engine.num_pages_used, server.has_work) == (52, False)
    server.close_piece("b")
    outputs = []
    while server.has_work:
        outputs += server.step()
    assert [output.piece_id for output in outputs] == ["late"]
    for name in ("a", "c", "d", "late"):
        server.close_piece(name)
    assert server.engine.num_pages_used == 0


def test_rows_that_were_cut_off_are_computed_again_and_not_told(server):
    hidden = piece_runs.rows(8, _WIDTH)
    server.open(_piece("a", 1, 3))
    server.feed("a", 0, hidden=hidden)
    [first] = [output for _ in range(2) for output in server.step()]
    server.truncate("a", 5)
    server.feed("a", 5, hidden=hidden[5:7])
    server.step()  # now it is in flight
    server.truncate("a", 6)
    server.feed("a", 6, hidden=hidden[6:])
    outputs = []
    while server.has_work:
        outputs += server.step()
    assert [(output.position, len(output.hidden)) for output in outputs] == [(5, 1), (6, 2)]
    again = np.concatenate([output.hidden for output in outputs])
    np.testing.assert_allclose(again, first.hidden[5:], rtol=1e-4, atol=1e-4)
    server.truncate("a", 0)
    server.close_piece("a")


def test_a_draw_that_was_cut_off_is_drawn_again(server, client, wanted):
    session = _session("a", 0, _cut(2, engines=(client, server)))
    session.open()
    while len(session.token_ids) < 3:
        piece_runs.turn((client, server), [session])
    known = len(_PROMPTS[0]) + len(session.token_ids)
    while client.has_work or not server.has_work:
        piece_runs.turn([client], [session])
    server.step()  # the row after the third token is on its way, and is forgotten
    server.truncate("a 1", known - 1)
    client.truncate("a 0", known - 1)
    client.feed("a 0", known - 1, token_ids=session.token_ids[-1:])
    piece_runs.finish((client, server), [session])
    assert session.token_ids == wanted[0][0]


def test_a_closed_piece_says_nothing_more_and_its_name_can_be_used_again(server):
    server.open(_piece("a", 1, 3))
    server.feed("a", 0, hidden=piece_runs.rows(3, _WIDTH))
    server.step()
    server.close_piece("a")
    server.close_piece("a")
    server.open(_piece("a", 1, 3))
    while server.has_work:
        assert server.step() == []
    server.close_piece("a")
    server.check()


def test_programs_of_equal_segments_are_compiled_once(server, thin):
    buckets = ("8:8:0", "24:8:8")
    kinds = ("layers 0-1", "layers 1-2", "layers 3-4")
    assert set(server.engine.compile_seconds) == {
        *(f"{kind} {bucket}" for kind in kinds for bucket in buckets),
        *(f"{way} {count}" for way in ("enter", "leave") for count in (8, 24)),
        *(f"sample 8 {variant}" for variant in ("greedy", "filtered", "full")),
        "prompt_logprobs",
        "reset_penalties",
    }
    assert {name for name in thin.engine.compile_seconds if name.startswith("layers")} == {
        f"{kind} {bucket}" for kind in ("layers 0-1", "layers 3-4") for bucket in buckets
    }


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (
            {"start": 1, "stop": 2},
            "layers 1:2 are not made of the segments that are here, 0:1, 3:4; take borders of the "
            "grid, and layers that are held",
        ),
        (
            {"start": 0, "stop": 4},
            "layers 0:4 are not made of the segments that are here, 0:1, 3:4; take borders of the "
            "grid, and layers that are held",
        ),
        (
            {"start": 0, "stop": 1, "prompt_len": 0},
            "prompt_len=0 and max_len=9 are not 1 or more, ascending and at most 64, which the "
            "context holds",
        ),
        (
            {"start": 0, "stop": 1, "max_len": 65},
            "prompt_len=3 and max_len=65 are not 1 or more, ascending and at most 64, which the "
            "context holds",
        ),
        (
            {"start": 3, "stop": 4, "params": greedy(repetition_penalty=1.5)},
            "repetition_penalty=1.5 cannot be had of a session whose layers are split; leave it "
            "out, or send an ordinary request",
        ),
        (
            {"start": 3, "stop": 4, "params": greedy(bad_words=("x",))},
            "bad_words=('x',) cannot be had of a session whose layers are split; leave it out, or "
            "send an ordinary request",
        ),
    ],
)
def test_a_piece_that_cannot_be_served_is_refused(thin, piece, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        thin.open(_piece("a", **piece))
    assert not thin.has_work


def _bad(value, row):
    found = piece_runs.rows(3, _WIDTH)
    found[row, 5] = value
    return found


@pytest.mark.parametrize(
    ("name", "position", "rows", "message"),
    [
        ("b", 0, {"hidden": piece_runs.rows(1, _WIDTH)}, "no piece 'b' is open; open it first"),
        (
            "a",
            1,
            {"hidden": piece_runs.rows(1, _WIDTH)},
            "rows of piece 'a' begin at position 1, and 0 is the next",
        ),
        (
            "a",
            0,
            {"token_ids": [1]},
            "piece 'a' begins between layers: feed hidden states alone",
        ),
        (
            "first",
            0,
            {"hidden": piece_runs.rows(1, _WIDTH)},
            "piece 'first' begins with the embedding: feed token ids alone",
        ),
        ("first", 0, {"token_ids": [_VOCAB]}, "101 is not a token id of this model, 0 to 100"),
        (
            "a",
            0,
            {"hidden": piece_runs.rows(3, _WIDTH - 1)},
            "hidden states have shape (3, 31), not (rows, 32)",
        ),
        (
            "a",
            0,
            {"hidden": piece_runs.rows(3, _WIDTH).astype(np.float16)},
            "hidden states are float16; send float32, the model's, or float32",
        ),
        ("a", 0, {"hidden": _bad(np.nan, 1)}, "hidden states of row 1 of 3 are not finite"),
        ("a", 0, {"hidden": _bad(-np.inf, 2)}, "hidden states of row 2 of 3 are not finite"),
        (
            "a",
            0,
            {"hidden": piece_runs.rows(10, _WIDTH)},
            "piece 'a' was opened for 9 positions, and these rows end at 10",
        ),
        (
            "last",
            0,
            {"hidden": piece_runs.rows(4, _WIDTH)},
            "piece 'last' draws: after the 3 rows of its prompt they come one at a time, and not "
            "as 0 to 4",
        ),
        (
            "all",
            0,
            {"token_ids": [1, 2, 3, 4]},
            "piece 'all' has all layers and goes on by itself after the 3 rows of its prompt; "
            "these end at 4",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_change_nothing(server, name, position, rows, message):
    spans = {"a": (1, 3), "first": (0, 2), "last": (2, 4), "all": (0, 4)}
    for key, span in spans.items():
        server.open(_piece(key, *span))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        server.feed(name, position, **rows)
    server.step()
    assert not server.has_work
    for key in spans:
        server.close_piece(key)


def test_calls_that_come_at_the_wrong_time_are_refused(server):
    server.open(_piece("a", 2, 4, params=greedy(max_tokens=4, presence_penalty=0.5)))
    with pytest.raises(ValueError, match=r"^piece id 'a' is already in use$"):
        server.open(_piece("a", 1, 3))
    server.feed("a", 0, hidden=piece_runs.rows(3, _WIDTH))
    message = "piece 'a' draws, and no token was drawn of row 2 yet; send the next row after it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        server.feed("a", 3, hidden=piece_runs.rows(1, _WIDTH))
    with pytest.raises(ValueError, match=r"^piece 'a' has 3 rows and cannot be cut at 4$"):
        server.truncate("a", 4)
    message = (
        "piece 'a' draws with penalties or a grammar, which cannot take tokens back; open another"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        server.truncate("a", 2)
    server.truncate("a", 3)
    server.open(_piece("whole", 0, 4))
    server.feed("whole", 0, token_ids=[1, 2])
    server.truncate("whole", 1)
    server.feed("whole", 1, token_ids=[2, 3])
    message = "piece 'whole' has all layers and its prompt is running; open another"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        server.truncate("whole", 1)
    outputs = []
    while server.has_work:
        outputs += server.step()
    assert [o.position for o in outputs if o.piece_id == "whole"] == [2, 3, 4, 5]
    message = "piece 'whole' has ended and takes no more rows; close it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        server.truncate("whole", 0)
    server.close_piece("a")
    server.close_piece("whole")


def test_a_piece_that_memory_can_never_hold_is_refused(folder):
    small = build_split(folder, grid=(2,), **(_KNOBS | {"cache_num_pages": 2}))
    message = "no memory for this request: it may grow to 11 tokens and the cache holds 10"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        small.open(_piece("a", 2, 4, max_len=11))
    small.open(_piece("a", 2, 4, max_len=10))
    small.close()


@pytest.mark.parametrize(
    ("layers", "text"),
    [([], "none"), ([(2, 2)], "2:2"), ([(2, 4), (0, 1)], "2:4, 0:1"), ([(0, 5)], "0:5")],
)
def test_ranges_of_layers_that_are_none_are_refused(folder, layers, text):
    message = (
        f"layers {text} are no ascending ranges within 0:4, the model's; give START:STOP for each"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_split(folder, layers=layers, **_KNOBS)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("--data_parallel", {"data_parallel": 2}),
        ("--batch_invariant", {"batch_invariant": True, "buckets": ""}),
        ("--plan_watch", {"plan_watch": True}),
    ],
)
def test_knobs_for_engines_of_whole_models_are_refused(folder, name, knobs):
    message = f"{name} is for engines that run whole models; leave it out here"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_split(folder, grid=(2,), **(_KNOBS | knobs))
