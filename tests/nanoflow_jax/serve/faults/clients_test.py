"""Clients that leave, do not read, or only hold a connection."""

import contextlib
import itertools
import json
import pathlib
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import served

_CANARY = {"prompt": [5, 9], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
# Streamed it is more than all buffers between the engine and a client hold.
_LARGE = {**_CANARY, "max_tokens": 240, "n": 8, "logprobs": 20, "seed": 1, "temperature": 1}
_WRITE_TIMEOUT_S = 10.0
_MOST_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
_MAX_CONNECTIONS = min(4096, _MOST_FILES // 3)
_NUM_IDLE = min(10_000, _MOST_FILES - 500)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    flags = (
        *served.TINY,
        "--noaccess_log",
        f"--write_timeout_s={_WRITE_TIMEOUT_S}",
        f"--max_connections={_MAX_CONNECTIONS}",
    )
    with served.start(tmp_path_factory.mktemp("clients"), *flags) as made:
        yield made


def _front_bytes(server: served.Served) -> int:
    pages = pathlib.Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def _complete(server: served.Served, body: dict[str, Any]) -> Any:
    status, found = server.ask("/v1/completions", body)
    assert status == 200, found
    return found["choices"]


def test_f1_a_client_that_leaves_frees_its_pages_long_before_its_end(server):
    known = _complete(server, _CANARY)
    for _ in range(3):
        before = server.stats()["totals"]["steps"]
        with server.streaming("/v1/completions", {**_CANARY, "max_tokens": 240, "n": 80}) as answer:
            assert answer.readline().startswith(b"data: ")
        server.wait_idle()
        # Four at a time: 4800 to the end. Of the engine alone, dropped_requests_test says one step.
        assert server.stats()["totals"]["steps"] - before < 1500
    assert _complete(server, _CANARY) == known


def _post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


@contextlib.contextmanager
def _slow_readers(server: served.Served, count: int) -> Iterator[list[socket.socket]]:
    """Clients that asked for much and have read nothing, with little room to receive it."""
    with contextlib.ExitStack() as stack:
        steps = server.stats()["totals"]["steps"]
        made = [stack.enter_context(socket.socket()) for _ in range(count)]
        for i, one in enumerate(made):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", server.port))
            one.sendall(_post({**_LARGE, "stream": i != 1}))
        server.wait_for(lambda stats: stats["totals"]["steps"] > steps)
        server.wait_idle()
        yield made


def _read_all(one: socket.socket) -> bytes:
    one.settimeout(120)
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := one.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def _texts(data: bytes) -> dict[int, str]:
    """The texts of the choices in the bytes of a streamed answer."""
    texts = dict.fromkeys(range(_LARGE["n"]), "")
    for line in data.split(b"\n"):
        if line.startswith(b"data: {"):
            for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
    return texts


def test_f8_a_slow_reader_gets_its_whole_answer_and_holds_up_nobody(server):
    wanted = _complete(server, _LARGE)
    known = _complete(server, _CANARY)
    with _slow_readers(server, 1) as (slow,):
        # Its answer waits in the front. The engine is done with it, and others are served.
        assert _complete(server, _CANARY) == known
        data = _read_all(slow)
    assert data.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
    assert _texts(data) == {choice["index"]: choice["text"] for choice in wanted}


def test_f8_clients_that_read_nothing_are_dropped_and_memory_is_flat(server):
    known = _complete(server, _CANARY)
    taken = []
    for i in range(3):
        with _slow_readers(server, 3) as slow:
            assert _complete(server, _CANARY) == known
            if i == 2:
                server.wait_for(lambda _: not _num_connections(server))
                assert all(len(_read_all(one)) < 1 << 20 for one in slow)
        taken.append(_front_bytes(server))
    # Three answers of 1.2 MB wait each time; what the first time took serves the others. If they
    # stayed, each of the others would take as much again; an allocator's pool may grow once.
    assert min(b - a for a, b in itertools.pairwise(taken)) < 3 << 20, taken
    assert "Traceback" not in server.log


def _num_connections(server: served.Served) -> int:
    """Of clients."""
    there = 0
    for line in pathlib.Path(f"/proc/{server.process.pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        there += state == "01" and local.endswith(f":{server.port:04X}")
    return there


def test_f9_ten_thousand_idle_connections_are_bounded_and_others_are_served(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    known = _complete(server, _CANARY)
    before = _front_bytes(server)
    busy = {**_CANARY, "max_tokens": 240, "n": 20}
    try:
        with contextlib.ExitStack() as stack:
            answer = stack.enter_context(server.streaming("/v1/completions", busy))
            for i in range(_NUM_IDLE):
                one = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                if i % 2:
                    one.sendall(b"GET /health HT")  # a request that does not go on is none
            assert server.ask("/health") == (200, {"status": "ready"})
            assert _complete(server, _CANARY) == known
            assert _num_connections(server) <= _MAX_CONNECTIONS
            assert _front_bytes(server) - before < 200 << 20
            ends = [c["finish_reason"] for e in served.read_events(answer) for c in e["choices"]]
            assert ends.count("length") == 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert server.ask("/health") == (200, {"status": "ready"})
    assert "Traceback" not in server.log
