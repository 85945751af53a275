"""C13: what one connection, or many, may cost."""

import contextlib
import socket
import threading
import time

import pytest
import uvicorn

from nanoflow_jax.serve import guarded_protocol

_LONG_S = 60.0
_SHORT_S = 0.5
_GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
_OK = b"HTTP/1.1 200 OK"
_MOST = 6


async def _app(scope, receive, send):
    """Answers at once, or with the length of the body where there is one to read."""
    count = 0
    if scope["path"] == "/read":
        more = True
        while more:
            message = await receive()
            count += len(message.get("body", b""))
            more = message.get("more_body", False)
    text = f"{scope['path']} {count}".encode()
    headers = [(b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


@contextlib.contextmanager
def _served(read_timeout_s, keep_alive_s=_LONG_S):
    protocol = guarded_protocol.guarded_protocol(
        max_connections=_MOST, read_timeout_s=read_timeout_s, write_timeout_s=_LONG_S
    )
    made = uvicorn.Server(
        uvicorn.Config(
            _app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=keep_alive_s,
            timeout_graceful_shutdown=1,
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            made.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def patient():
    with _served(_LONG_S) as port:
        yield port


@pytest.fixture(scope="module")
def hasty():
    with _served(_SHORT_S) as port:
        yield port


def _open(port):
    made = socket.create_connection(("127.0.0.1", port), timeout=_LONG_S)
    made.settimeout(_LONG_S)
    return made


def _read_all(raw):
    """What comes until the server closes; a reset is an end too."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := raw.recv(1 << 16):
            found += part
    return found


def _answer(raw):
    """The status line of one answer, and its body."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += raw.recv(1)
    head = found.split(b"\r\n")
    (length,) = (int(line.split()[1]) for line in head if line.startswith(b"content-length"))
    body = b""
    while len(body) < length:
        body += raw.recv(length - len(body))
    return head[0], body


def _send_until_closed(raw, piece, pause_s=0.02):
    """Trickles, and reads what comes, until the server closes or time is up."""
    raw.settimeout(pause_s)
    found, deadline = b"", time.monotonic() + _LONG_S
    while time.monotonic() < deadline:
        try:
            raw.sendall(piece)
            part = raw.recv(1 << 16)
        except TimeoutError:
            continue
        except ConnectionError:
            return found
        if not part:
            return found
        found += part
    pytest.fail("the connection stayed open")


def _head(*lines):
    return b"\r\n".join((b"GET / HTTP/1.1", b"Host: x", *lines)) + b"\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        _head(*(b"X-%d: y" % i for i in range(guarded_protocol.MAX_HEADERS))),
        _head(b"X: " + b"y" * guarded_protocol.MAX_HEAD_BYTES),
        _head(b"X" * guarded_protocol.MAX_HEAD_BYTES + b": y"),
        b"GET /" + b"a" * guarded_protocol.MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_c13_a_head_with_too_many_headers_or_bytes_is_refused(patient, head):
    with _open(patient) as raw:
        raw.sendall(head)
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_c13_the_largest_head_is_taken(patient):
    lines = [b"X-%d: %s" % (i, b"y" * 600) for i in range(guarded_protocol.MAX_HEADERS - 1)]
    with _open(patient) as raw:
        raw.sendall(_head(*lines))
        assert _answer(raw)[0] == _OK


@pytest.mark.parametrize("begin", [b"", _GET], ids=["the first request", "the next request"])
@pytest.mark.parametrize("piece", [b"", b"X: y\r\n", b"X"])
def test_c13_a_head_that_does_not_end_is_cut_off(hasty, begin, piece):
    with _open(hasty) as raw:
        raw.sendall(begin + b"GET / HTTP/1.1\r\n")
        found = _send_until_closed(raw, piece) if piece else _read_all(raw)
    assert found.count(b"HTTP/1.1") == found.count(b"200") == bool(begin)


def test_c13_a_connection_that_never_asks_is_closed(hasty):
    with _open(hasty) as raw:
        assert _read_all(raw) == b""
    with _open(hasty) as raw:
        raw.sendall(_GET)
        # Line ends before a request are no request, and must not keep a connection open.
        assert _send_until_closed(raw, b"\r\n").count(b"200") == 1


@pytest.mark.parametrize(
    "head",
    [b"Transfer-Encoding: chunked", b"Content-Length: 1000000000"],
    ids=["chunks without end", "a long body"],
)
def test_c13_a_body_that_nobody_reads_may_not_go_on_for_ever(hasty, head):
    piece = b"5\r\nhello\r\n" if b"chunked" in head else b"hello"
    with _open(hasty) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        assert _send_until_closed(raw, piece).count(b"HTTP/1.1 200") == 1


def test_c13_a_client_that_sends_on_reads_the_answer_before_the_connection_ends(patient):
    with _open(patient) as raw:
        lines = (b"POST / HTTP/1.1", b"Host: x", b"Connection: close", b"Content-Length: 9000000")
        raw.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
        for _ in range(9):
            raw.sendall(b"a" * 1_000_000)
        assert _read_all(raw).endswith(b"\r\n\r\n/ 0")


def test_c13_a_body_that_ends_late_leaves_the_connection_of_use(patient):
    with _open(patient) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhe")
        assert _answer(raw) == (_OK, b"/ 0")
        raw.sendall(b"llo")
        raw.sendall(_GET)
        assert _answer(raw) == (_OK, b"/ 0")


def test_c13_pipelined_requests_are_answered_in_order(patient):
    with _open(patient) as raw:
        heads = [b"GET /%d HTTP/1.1\r\nHost: x\r\n" % i for i in range(300)]
        heads[7] = b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
        heads[-1] += b"Connection: close\r\n"
        bodies = [b"abc" if b"POST" in head else b"" for head in heads]
        pairs = zip(heads, bodies, strict=True)
        raw.sendall(b"".join(head + b"\r\n" + body for head, body in pairs))
        found = _read_all(raw)
    answers = [part.rpartition(b"\r\n\r\n")[2] for part in found.split(b"HTTP/1.1 200 OK")[1:]]
    wanted = [b"/%d 0" % i for i in range(300)]
    wanted[7] = b"/read 3"
    assert answers == wanted


def test_c13_a_connection_above_the_limit_is_closed_and_the_others_go_on(patient):
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(_open(patient)) for _ in range(_MOST)]
        for raw in held:
            raw.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
            assert _answer(raw)[0] == _OK
            raw.sendall(b"aPOST /read HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n")
            raw.sendall(b"Content-Length: 3\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 100")  # it is being served
        with _open(patient) as one_more:
            with contextlib.suppress(ConnectionError):
                one_more.sendall(_GET)
            assert _read_all(one_more) == b""
        for raw in held:
            raw.sendall(b"abc")
            assert _answer(raw) == (_OK, b"/read 3")
    with _open(patient) as raw:
        raw.sendall(_GET)
        assert _answer(raw)[0] == _OK


def test_c13_what_is_no_request_behind_a_request_ends_the_connection_with_one_answer(
    patient, caplog
):
    for _ in range(20):
        with _open(patient) as raw:
            head = b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"
            raw.sendall(head + b"abc no request\r\n")
            assert _read_all(raw).count(b"HTTP/1.1 ") == 1
    assert {record.getMessage() for record in caplog.records} <= {"Invalid HTTP request received."}
