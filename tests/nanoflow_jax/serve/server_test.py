"""The server as a whole, started as its users start it."""

import contextlib
import http.client
import json
import os
import signal
import time
from typing import Any

import pytest
import served

_PROMPT = {"prompt": "def main():", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served.start(tmp_path_factory.mktemp("server"), *served.SMALL) as made:
        yield made


def test_a_stream_is_the_answer_in_pieces(server):
    body = {**_PROMPT, "logprobs": 1, "n": 2, "stream_options": {"include_usage": True}}
    events = server.events("/v1/completions", body)
    del body["stream_options"]
    status, whole = server.ask("/v1/completions", body)
    assert status == 200
    for choice in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        tokens = [token for part in parts for token in part["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]


def test_a_request_that_takes_too_long_ends_with_an_error_and_frees_its_pages(server):
    slow = {"prompt": "import", "max_tokens": 250, "ignore_eos": True, "timeout_s": 0.02}
    for body in (slow, {**slow, "prompt": ["import", "def"]}):
        status, answer = server.ask("/v1/completions", body)
        assert (status, answer["error"]["code"]) == (504, "timeout"), answer
        assert "s after it arrived, its time limit" in answer["error"]["message"]
        assert _error_in_stream(server, body)["code"] == "timeout"
    server.wait_idle()


def _error_in_stream(server: served.Served, body: dict[str, Any]) -> dict[str, Any]:
    """The error that ends a stream which has begun, however fast this machine is."""
    for times in range(1, 100):
        limit = {"timeout_s": 0.02 * 1.3**times}
        with server.streaming("/v1/completions", {**body, **limit}) as answer:
            if answer.status == 200:
                found: dict[str, Any] = served.read_events(answer)[-1]["error"]
                return found
            assert answer.status == 504, answer.read()  # the time was up before the first token
    raise AssertionError("no stream began")


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/v1/files", "GET, POST"), ("/v1/files/x", "DELETE, GET"), ("/v1/completions", "POST")],
)
def test_a_method_that_a_path_does_not_know_is_answered_with_those_it_knows(server, path, methods):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("PATCH", path)
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("allow")) == (405, methods)
        assert "Method Not Allowed" in json.load(answer)["error"]["message"]


def test_a_request_that_bans_all_tokens_is_at_fault_itself(server):
    body = {**_PROMPT, "allowed_token_ids": [100], "structured_outputs": {"regex": "0"}}
    status, answer = server.ask("/v1/completions", body)
    assert status == 400
    assert "every token was banned by allowed_token_ids" in answer["error"]["message"]


def test_a_forced_tool_is_called(server):
    tool = {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    }
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 100,
        "temperature": 0,
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
    }
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 200, answer
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    deltas = [
        part
        for event in server.events("/v1/chat/completions", body)
        for choice in event["choices"]
        for part in choice["delta"].get("tool_calls", ())
    ]
    streamed = "".join(part["function"].get("arguments", "") for part in deltas)
    assert streamed == call["function"]["arguments"]


def test_an_engine_that_is_killed_is_started_again(server):
    known = server.ask("/v1/completions", _PROMPT)[1]["choices"]
    os.kill(server.engine_pid(), signal.SIGKILL)
    deadline = time.monotonic() + 120
    status = 503
    while status == 503:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.2)
        status, answer = server.ask("/v1/completions", _PROMPT)
    assert answer["choices"] == known


def test_a_key_covers_every_route_but_health(tmp_path):
    key_file = tmp_path / "keys"
    key_file.write_text("secret-of-the-test\n")
    with served.start(tmp_path, *served.SMALL, f"--api_key_file={key_file}") as made:
        assert made.ask("/health")[0] == 200
        for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/page/stats", "/nothing"):
            assert made.ask(path)[0] == 401
        key = {"authorization": "Bearer secret-of-the-test"}
        assert made.ask("/v1/models", **key)[0] == 200
        assert "secret-of-the-test" not in made.log
