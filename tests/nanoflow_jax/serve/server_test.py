"""The server as a whole, started as its users start it."""

import http.client
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent import futures
from typing import Any

import pytest
import served

_PROMPT = {"prompt": "def main():", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served.start(tmp_path_factory.mktemp("server"), *served.SMALL) as made:
        yield made


def _ask(
    server: served.Served, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        server.url + path, data=data, headers={"content-type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def _events(server: served.Served, path: str, body: dict[str, Any]) -> list[Any]:
    request = urllib.request.Request(
        server.url + path,
        data=json.dumps({**body, "stream": True}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def _wait_idle(server: served.Served) -> None:
    deadline = time.monotonic() + 20
    while True:
        stats = _ask(server, "/page/stats")[1]
        if stats["pages_used"] == stats["running"] == stats["waiting"] == 0:
            return
        assert time.monotonic() < deadline, stats
        time.sleep(0.05)


def test_a_stream_is_the_answer_in_pieces(server):
    body = {**_PROMPT, "logprobs": 1, "n": 2, "stream_options": {"include_usage": True}}
    events = _events(server, "/v1/completions", body)
    del body["stream_options"]
    status, whole = _ask(server, "/v1/completions", body)
    assert status == 200
    for choice in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        tokens = [token for part in parts for token in part["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]


def test_a_client_that_leaves_frees_its_pages(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"prompt": "import", "max_tokens": 200, "ignore_eos": True, "stream": True}
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    answer.close()
    connection.close()
    _wait_idle(server)


def test_a_request_that_takes_too_long_ends_with_an_error_and_frees_its_pages(server):
    slow = {"prompt": "import", "max_tokens": 250, "ignore_eos": True, "timeout_s": 0.02}
    for body in (slow, {**slow, "prompt": ["import", "def"]}):
        status, answer = _ask(server, "/v1/completions", body)
        assert (status, answer["error"]["code"]) == (504, "timeout"), answer
        assert "s after it arrived, its time limit" in answer["error"]["message"]
        assert _error_in_stream(server, body)["code"] == "timeout"
    _wait_idle(server)


def _error_in_stream(server: served.Served, body: dict[str, Any]) -> dict[str, Any]:
    """The error that ends a stream which has begun, however fast this machine is."""
    for times in range(1, 100):
        try:
            limit = {"timeout_s": 0.02 * 1.3**times}
            last = _events(server, "/v1/completions", {**body, **limit})[-1]
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 504:  # the time was up before the first token
                raise
        else:
            found: dict[str, Any] = last["error"]
            return found
    raise AssertionError("no stream began")


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
    known = _ask(server, "/v1/completions", _PROMPT)[1]["choices"]
    found, answer = _ask(server, "/v1/completions", body)
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    assert _ask(server, "/v1/completions", _PROMPT)[1]["choices"] == known


def test_a_hostile_grammar_is_refused_while_others_are_served(server):
    hostile = {"allOf": [{"type": "string", "pattern": f"^(a|b{i}){{1,60}}$"} for i in range(100)]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": hostile}}
    with futures.ThreadPoolExecutor(1) as pool:
        refused = pool.submit(_ask, server, "/v1/completions", {**_PROMPT, "response_format": form})
        while not refused.done():
            began = time.monotonic()
            assert _ask(server, "/v1/completions", _PROMPT)[0] == 200
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
    status, answer = _ask(server, "/v1/chat/completions", body)
    assert status == 200, answer
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    deltas = [
        part
        for event in _events(server, "/v1/chat/completions", body)
        for choice in event["choices"]
        for part in choice["delta"].get("tool_calls", ())
    ]
    streamed = "".join(part["function"].get("arguments", "") for part in deltas)
    assert streamed == call["function"]["arguments"]


def test_foreign_hosts_and_origins_are_refused(server):
    assert _ask(server, "/v1/models", host="evil.example")[0] == 403
    assert _ask(server, "/v1/models", origin="http://evil.example")[0] == 403
    assert _ask(server, "/v1/models")[0] == 200


def test_a_head_that_does_not_end_is_cut_off_and_large_ones_are_refused(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_an_engine_that_is_killed_is_started_again(server):
    known = _ask(server, "/v1/completions", _PROMPT)[1]["choices"]
    children = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    with open(children, encoding="ascii") as file:
        pids = [int(pid) for pid in file.read().split()]
    for pid in pids:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"nanoflow_jax.engine_process" in file.read():
                os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    status = 503
    while status == 503:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.2)
        status, answer = _ask(server, "/v1/completions", _PROMPT)
    assert answer["choices"] == known


def test_a_key_covers_every_route_but_health_and_a_signal_drains(tmp_path):
    key_file = tmp_path / "keys"
    key_file.write_text("secret-of-the-test\n")
    with served.start(tmp_path, *served.SMALL, f"--api_key_file={key_file}") as made:
        assert _ask(made, "/health")[0] == 200
        for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/page/stats", "/nothing"):
            assert _ask(made, path)[0] == 401
        key = {"authorization": "Bearer secret-of-the-test"}
        assert _ask(made, "/v1/models", **key)[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", made.port)
        body = {**_PROMPT, "max_tokens": 150, "ignore_eos": True, "stream": True}
        headers = {"content-type": "application/json", **key}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        answer.readline()
        assert made.stop() == 0
        assert answer.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        assert "secret-of-the-test" not in made.log


def test_a_port_in_use_is_a_message(server, tmp_path):
    second = served.launch(tmp_path, *served.SMALL, f"--port={server.port}")
    assert second.process.wait(timeout=60) == 2
    assert "cannot be used" in second.log
    assert "Traceback" not in second.log
