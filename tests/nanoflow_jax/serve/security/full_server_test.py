"""C8, C13 over a whole server with a key and narrow limits; and its log."""

import contextlib
import http.client
import json
import socket
import time

import pytest
import served

from nanoflow_jax import config

_KEY = "the-key-of-this-test"
_SECRET = "a prompt that nobody else may read"
_AUTHORIZED = {"authorization": f"Bearer {_KEY}"}
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_LONG = {"prompt": "import", "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    flags = ("--max_queue=3", "--read_timeout_s=1", "--max_body_bytes=20000")
    with served.start(
        tmp_path_factory.mktemp("server"), *served.SMALL, *flags, NANOFLOW_API_KEY=_KEY
    ) as made:
        yield made


def _status_and_headers(server, body):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json", **_AUTHORIZED}
        connection.request("POST", _COMPLETIONS, json.dumps(body), headers)
        with connection.getresponse() as answer:
            return answer.status, answer.headers, json.load(answer)


def test_c13_a_full_queue_says_when_to_come_again_and_who_is_in_it_is_served(server):
    with server.streaming(_COMPLETIONS, {**_LONG, "n": 3}, **_AUTHORIZED) as stream:
        assert stream.status == 200
        assert stream.readline().startswith(b"data: ")
        stream.readline()
        status, headers, answer = _status_and_headers(server, _LONG)
        assert status == 429, answer
        assert int(headers["retry-after"]) > 0
        assert answer["error"]["code"] == "queue_full"
        assert "is busy with 3 choices and takes at most 3" in answer["error"]["message"]
        assert server.ask("/health") == (200, {"status": "ready"})
        events = served.read_events(stream)
    ends = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert ends == ["length"] * 3
    status, _, answer = _status_and_headers(server, {**_LONG, "n": 4})
    assert status == 429  # it never fits, which the message says
    assert (
        "4 choices, n for each prompt, and the server takes at most 3" in answer["error"]["message"]
    )
    assert _status_and_headers(server, {"prompt": "x", "max_tokens": 1, "n": 3})[0] == 200


def _raw(server, *lines):
    made = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = (b"Host: localhost", b"Authorization: Bearer " + _KEY.encode(), *lines)
    made.sendall(b"POST /v1/completions HTTP/1.1\r\n" + b"\r\n".join(head) + b"\r\n\r\n")
    return made


def test_c13_a_body_that_comes_too_slowly_is_given_up(server):
    with _raw(server, b"Content-Length: 100") as raw:
        raw.sendall(b"{")
        assert raw.recv(100).startswith(b"HTTP/1.1 408")


def test_c13_a_body_above_the_limit_is_refused_before_and_while_it_comes(server):
    with _raw(server, b"Content-Length: 20001") as raw:
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    with _raw(server, b"Transfer-Encoding: chunked") as raw:
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                raw.sendall(b"400\r\n" + b" " * 0x400 + b"\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def _ask_wrongly(server):
    """Requests of every kind that fails, with a secret wherever there is place for one."""
    message = {"role": "user", "content": _SECRET}
    for path, body in (
        (_COMPLETIONS, {"prompt": _SECRET, "max_tokens": 1}),
        (_COMPLETIONS, {"prompt": _SECRET, "stop": 5}),
        (_COMPLETIONS, {"prompt": [_SECRET, 5]}),
        (_COMPLETIONS, {"prompt": "x", _SECRET: 1}),
        (_COMPLETIONS, {"prompt": "x", "model": _SECRET}),
        (_COMPLETIONS, {"prompt": "x", "structured_outputs": {"regex": f"({_SECRET}"}}),
        (_CHAT, {"messages": [message], "max_tokens": 1}),
        (_CHAT, {"messages": [{**message, "role": 5}]}),
        ("/tokenize", {"prompt": _SECRET}),
        ("/v1/batches", {"input_file_id": _SECRET}),
    ):
        server.ask(path, body, **_AUTHORIZED)
        server.ask(path, body, authorization=f"Bearer {_KEY} wrong")
        server.ask(path, body, **{**_AUTHORIZED, "content-type": _SECRET})
        server.ask(path, body, **_AUTHORIZED, host=_SECRET)
    with _raw(server, b"Content-Length: 10", b"X: " + _SECRET.encode()) as raw:
        raw.sendall(_SECRET.encode())
        raw.recv(100)
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f"{_SECRET} {_KEY}\r\n\r\n".encode())
        raw.recv(100)


def test_c8_no_prompt_and_no_key_is_ever_in_the_log(server):
    for _ in range(3):
        assert server.ask("/page/stats", **_AUTHORIZED)[0] == 200
    _ask_wrongly(server)
    assert server.ask("/v1/models", **_AUTHORIZED)[0] == 200
    deadline = time.monotonic() + 60
    while "GET /v1/models 200" not in (log := server.log):  # written after the answer
        assert time.monotonic() < deadline, log
        time.sleep(0.02)
    assert "POST /v1/completions 400" in log
    assert "/page/stats" not in log
    assert _KEY not in log
    assert "prompt that nobody" not in log
    assert "File " not in log


def test_c8_a_key_comes_from_a_file_or_the_environment_and_never_from_an_argument():
    names = config.knob_names(config.ServeConfig)
    assert [name for name in names if "key" in name] == ["api_key_file"]
