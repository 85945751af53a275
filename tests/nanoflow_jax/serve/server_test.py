"""The server as a whole, started as its users start it."""

import os
import signal
import socket
import time
from concurrent import futures

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


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"prompt": [10**9]}, 400),
        ({"prompt": "x", "model": "other"}, 404),
        ({"prompt": "x", "n": 10**6}, 400),
        ({"prompt": "x " * 4000}, 400),
        ({"prompt": "x", "structured_outputs": {"regex": "("}}, 400),
        ({"prompt": "x", "stop": ["a"] * 10**5}, 400),
        ({"prompt": "x", "\ud800": 1}, 400),
        ({"prompt": "\ud800"}, 400),
        ({"prompt": "x", "y" * 10**6: 1}, 400),
    ],
)
def test_a_bad_body_is_refused_and_harms_nobody(server, body, status):
    known = server.ask("/v1/completions", _PROMPT)[1]["choices"]
    found, answer = server.ask("/v1/completions", body)
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    assert server.ask("/v1/completions", _PROMPT)[1]["choices"] == known


def test_a_hostile_grammar_is_refused_while_others_are_served(server):
    hostile = {"allOf": [{"type": "string", "pattern": f"^(a|b{i}){{1,60}}$"} for i in range(100)]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": hostile}}
    with futures.ThreadPoolExecutor(1) as pool:
        refused = pool.submit(server.ask, "/v1/completions", {**_PROMPT, "response_format": form})
        while not refused.done():
            began = time.monotonic()
            assert server.ask("/v1/completions", _PROMPT)[0] == 200
            assert time.monotonic() - began < 10  # compiling it would take minutes
        status, answer = refused.result()
    assert status == 400
    assert answer["error"]["param"] == "response_format"


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


def test_foreign_hosts_and_origins_are_refused(server):
    assert server.ask("/v1/models", host="evil.example")[0] == 403
    assert server.ask("/v1/models", origin="http://evil.example")[0] == 403
    assert server.ask("/v1/models")[0] == 200


def test_a_head_that_does_not_end_is_cut_off_and_large_ones_are_refused(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


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
