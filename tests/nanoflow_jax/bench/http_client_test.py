import asyncio
import contextlib

import pytest

from nanoflow_jax.bench import http_client

_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def _answer(body, status=200):
    return http_client.Answer(status=status, body=body, first_s=0.0, last_s=0.0)


def test_a_whole_stream_is_its_events_without_comments():
    body = b'data: {"a":1}\n\n: still here\n\ndata: {"a":2}\n\ndata: [DONE]\n\n'
    assert _answer(body).events() == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (_answer(b"full", status=429), "the server answered full"),
        (_answer(b'data: {"a":1}\n\n'), "the stream ends with"),
        (
            _answer(b'data: {"error":{"message":"too slow"}}\n\ndata: [DONE]\n\n'),
            "the server answered too slow",
        ),
    ],
)
def test_what_is_no_whole_stream_is_an_error(answer, message):
    with pytest.raises(ValueError, match=message):
        answer.events()


def test_a_refusal_is_not_taken_for_an_answer():
    with pytest.raises(ValueError, match="the server answered full"):
        _answer(b"full", status=429).json()


async def _close(writer):
    with contextlib.suppress(ConnectionError):
        writer.close()
        await writer.wait_closed()


def _chunk(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@contextlib.asynccontextmanager
async def _serving(parts):
    """A server that writes parts of an answer, each once the one before has left it."""
    left = asyncio.Event()

    async def answer(reader, writer):
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
            await reader.read()
        left.set()
        await _close(writer)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield http_client.Server(url=f"http://127.0.0.1:{port}"), left


def test_a_client_that_leaves_has_what_came_and_closes_the_connection():
    async def run():
        async with _serving([_HEAD, _chunk(b"a") + _chunk(b"b") + _chunk(b"c")]) as (server, left):
            async with server.connected() as connection:
                answer = await connection.ask(server.message("/"), leave_after=2)
                await left.wait()
                with pytest.raises(ConnectionResetError, match="closed the connection"):
                    await connection.ask(server.message("/"))
            return answer

    answer = asyncio.run(run())
    assert (answer.status, answer.body) == (200, b"ab")


def test_a_client_that_reads_slowly_gets_all_of_it():
    body = bytes(range(256)) * 100

    async def run():
        async with (
            _serving([_HEAD, _chunk(body), b"0\r\n\r\n"]) as (server, _),
            server.connected(receive_bytes=4096) as connection,
        ):
            return await connection.ask(server.message("/"), pause_s=0.001)

    answer = asyncio.run(run())
    assert answer.body == body
    assert answer.first_s <= answer.last_s


def test_a_connection_that_breaks_is_an_error():
    async def run():
        async def hang_up(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            await _close(writer)

        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            server = http_client.Server(url=f"http://127.0.0.1:{port}")
            async with server.connected() as connection:
                await connection.ask(server.message("/", {"prompt": "x"}))

    with pytest.raises(ConnectionResetError, match="the server closed the connection"):
        asyncio.run(run())
