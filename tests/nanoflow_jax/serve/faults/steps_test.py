"""A server whose device gives up some steps, whose weights hold NaN, and whose clock jumps."""

import os
import pathlib
import re
import time
import urllib.request
from concurrent import futures
from typing import Any

import batch_runs
import pytest
import served
from poisoned_model import copy_with_nan

_NAN = 77
_PROMPTS = [
    (prompt, tokens.tolist())
    for prompt, tokens in zip(served.TINY_CASE.prompts, served.TINY_CASE.tokens, strict=True)
    if _NAN not in [*prompt, *tokens]
]
_BAD = min(set(range(10, 353)) - {token for p, t in _PROMPTS for token in [*p, *t]} - {_NAN})
_FLAGS = (*served.TINY, "--cache_num_pages=32")  # room for one request of the whole context
_CANARIES = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    here = pathlib.Path(served.__file__).parent
    environment = {
        "PYTHONPATH": os.pathsep.join([str(here / "faulty_process"), str(here.parent)]),
        "NANOFLOW_TEST_BAD_TOKEN": str(_BAD),
    }
    model = copy_with_nan(served.TINY_CASE.path, folder / "model", token=_NAN)
    with served.start(folder, *_FLAGS, f"--model={model}", **environment) as made:
        yield made


def _body(prompt: list[int], count: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def _complete(server: served.Served, body: dict[str, Any]) -> tuple[int, Any]:
    return server.ask("/v1/completions", body)


@pytest.fixture
def canaries(server):
    """Requests beside what a test does: each must get its known tokens."""
    with futures.ThreadPoolExecutor(_CANARIES) as pool:
        asked = [(tokens, _body(prompt, len(tokens))) for prompt, tokens in _PROMPTS[:_CANARIES]]
        running = [(t, pool.submit(_complete, server, body)) for t, body in asked]
        yield
        for tokens, answer in running:
            status, found = answer.result()
            assert status == 200, found
            assert found["choices"][0]["token_ids"] == tokens
    server.wait_idle()
    assert server.ask("/health") == (200, {"status": "ready"})


def test_f7_logits_that_are_no_numbers_fail_their_request_alone(server, canaries):
    for prompt in ([3, 1, _NAN, 4], [3, 1, 4, _NAN]):
        status, found = _complete(server, _body(prompt, 20))
        assert (status, found["error"]["code"]) == (500, "generation_failed")
        assert "the logits were not finite" in found["error"]["message"]


def test_f7_an_xla_error_fails_its_request_alone(server, canaries):
    pid = server.engine_pid()
    for prompt in ([3, 1, _BAD, 4], [_BAD]):
        status, found = _complete(server, _body(prompt, 20))
        assert (status, found["error"]["code"]) == (500, "generation_failed")
        assert (
            "the device failed on this request, also when it ran alone"
            in (found["error"]["message"])
        )
    assert server.engine_pid() == pid, "the engine was started again"
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        found = re.search(
            r"^nanoflow_engine_failed_steps_total (\d+)", answer.read().decode(), re.M
        )
    assert found is not None
    assert int(found[1]) >= 4


def test_f7_an_xla_error_ends_a_stream_with_an_error_and_the_others_go_on(server, canaries):
    # It says the bad token again and again. The device sees it once the step of another request
    # failed and what this one said is computed again; unless it is done before.
    body = _body([5, 6], 240, logit_bias={_BAD: 100}, n=4)
    last: dict[str, Any] = {}
    while "error" not in last:
        with server.streaming("/v1/completions", body) as answer:
            assert answer.status == 200
            assert answer.readline().startswith(b"data: ")
            assert _complete(server, _body([_BAD], 20))[0] == 500
            *told, last = served.read_events(answer)
        assert all(token == _BAD for event in told for token in event["choices"][0]["token_ids"])
    assert last["error"]["code"] == "generation_failed"
    assert "also when it ran alone" in last["error"]["message"]


def test_f6_prompts_that_the_pool_cannot_hold_at_once_wait_and_finish(server):
    prompts = [[(7 * i + j) % 60 + 100 for j in range(170)] for i in range(6)]
    prompts = [[t for t in prompt if t not in (_NAN, _BAD)] for prompt in prompts]
    settings = server.stats()["settings"]
    assert settings["num_pages"] * settings["page_size"] < 2 * len(prompts[0]), "two fit"
    alone = [_complete(server, _body(prompt, 30)) for prompt in prompts]
    with futures.ThreadPoolExecutor(len(prompts)) as pool:
        together = [pool.submit(_complete, server, _body(prompt, 30)) for prompt in prompts]
        for (status, wanted), answer in zip(alone, together, strict=True):
            assert status == 200, wanted
            assert answer.result()[1]["choices"] == wanted["choices"]
    server.wait_idle()


def test_a_request_past_its_time_is_ended_and_the_others_go_on(server, canaries):
    body = _body([9, 4], 240, timeout_s=0.05)
    status, found = _complete(server, body)
    assert (status, found["error"]["code"]) == (504, "timeout")
    assert "its time limit" in found["error"]["message"]
    last = server.events("/v1/completions", {**body, "n": 128, "timeout_s": 2})[-1]
    assert last["error"]["code"] == "timeout"


def test_f13_deadlines_hold_though_the_wall_clock_jumps(server, canaries):
    created = {_complete(server, _body([9, 4], 1))[1]["created"]}
    while max(created) - min(created) < 80_000:  # the clock does jump
        assert len(created) < 100
        created.add(_complete(server, _body([9, 4], 1))[1]["created"])
    status, found = _complete(server, _body([9, 4], 60, timeout_s=600))
    assert status == 200, found
    began = time.monotonic()
    status, _ = _complete(server, _body([9, 4], 240, timeout_s=0.05))
    assert status == 504
    assert time.monotonic() - began < 30
    rows = [batch_runs.batch_row(str(i), **_body([9, i], 3)) for i in range(20, 30)]
    batch = server.wait_for_batch(
        server.begin_batch(rows), lambda batch: batch["status"] == "completed"
    )
    assert sorted(row["custom_id"] for row in server.rows_of(batch)) == list(
        map(str, range(20, 30))
    )
    ages = [server.stats()["uptime_s"] for _ in range(4)]
    assert ages == sorted(ages)
    assert ages[-1] < 10_000


def test_a_request_of_lower_priority_number_passes_those_that_wait(server):
    with futures.ThreadPoolExecutor(1) as pool:
        # The pool holds one of its choices at a time.
        many = pool.submit(_complete, server, _body([9, 4], 240, n=30))
        server.wait_for(lambda stats: stats["waiting"])
        assert _complete(server, _body([9, 4], 50, priority=-5))[0] == 200
        assert server.stats()["waiting"] > 0
        assert many.result()[0] == 200
