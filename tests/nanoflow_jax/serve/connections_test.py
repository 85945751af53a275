"""Connections above their number, and answers that nobody reads, over an app of a few lines."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from nanoflow_jax.serve import guarded_protocol

_HEAD = b"GET /%s HTTP/1.1\r\nhost: localhost\r\n\r\n"
_LARGE = 8 << 20
_ENDED = (ConnectionError, asyncio.IncompleteReadError)


class _App:
    """Answers at once; `/wait` when it is told to, `/large` with more than buffers hold."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self.go_on = asyncio.Event()

    async def __call__(
        self,
        scope: Any,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        body = bytes(_LARGE) if scope["path"] == "/large" else b"hello"
        if scope["path"] == "/wait":
            self.num_waiting += 1
            await self.go_on.wait()
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})


class _Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def ask(self, path: bytes = b"") -> bytes:
        self.send(_HEAD % path)
        await self.head()
        return await self.reader.readexactly(5)


@contextlib.asynccontextmanager
async def _serving(
    app: _App, *, write_timeout_s: float = 60.0
) -> AsyncIterator[Callable[[], Awaitable[_Client]]]:
    """A server of two connections; yields what makes a client."""
    config = uvicorn.Config(app, lifespan="off", log_config=None)  # type: ignore[arg-type]
    config.load()
    state = ServerState()
    kind = guarded_protocol.guarded_protocol(
        max_connections=2, read_timeout_s=60, write_timeout_s=write_timeout_s
    )
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    server = await asyncio.get_running_loop().create_server(
        lambda: kind(config=config, server_state=state, app_state={}), sock=listener
    )
    clients: list[_Client] = []

    async def connect() -> _Client:
        port = listener.getsockname()[1]
        clients.append(_Client(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)))
        return clients[-1]

    async with server:
        try:
            yield connect
        finally:
            for client in clients:
                client.writer.transport.abort()
                with contextlib.suppress(ConnectionError):
                    await client.writer.wait_closed()
            while state.connections or state.tasks:
                await asyncio.sleep(0.001)


def _run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(bounded())


def test_f9_a_new_connection_takes_the_place_of_the_longest_idle_one():
    async def scenario() -> None:
        app = _App()
        async with _serving(app) as connect:
            first, second = await connect(), await connect()
            assert await first.ask() == await second.ask() == b"hello"
            assert await first.ask() == b"hello"  # so the second is idle for longer
            third = await connect()
            assert await third.ask() == b"hello"
            with pytest.raises(_ENDED):
                await second.ask()
            assert await first.ask() == b"hello"
            first.send(b"GET / HTTP/1.1\r\nhost:")  # a head that does not end is no request
            assert await third.ask() == b"hello"
            assert await (await connect()).ask() == b"hello"
            with pytest.raises(_ENDED):
                await first.head()

    _run(scenario)


def test_f9_where_all_connections_are_busy_more_are_refused():
    async def scenario() -> None:
        app = _App()
        async with _serving(app) as connect:
            busy = [await connect() for _ in range(2)]
            for client in busy:
                client.send(_HEAD % b"wait")
            while app.num_waiting < 2:
                await asyncio.sleep(0.001)
            with pytest.raises(_ENDED):
                await (await connect()).ask()
            app.go_on.set()
            for client in busy:
                await client.head()
                assert await client.reader.readexactly(5) == b"hello"

    _run(scenario)


def test_f8_a_client_that_stops_reading_is_dropped():
    async def scenario() -> None:
        async with _serving(_App(), write_timeout_s=0.2) as connect:
            client = await connect()
            client.send(_HEAD % b"large")
            await client.head()
            found = 0
            with contextlib.suppress(ConnectionError):
                await asyncio.sleep(1.5)
                while part := await client.reader.read(1 << 16):
                    found += len(part)
            assert found < _LARGE

    _run(scenario)


def test_f8_a_client_that_reads_slowly_gets_all():
    async def scenario() -> None:
        async with _serving(_App(), write_timeout_s=3.0) as connect:
            client = await connect()
            client.send(_HEAD % b"large")
            await client.head()
            found = 0
            began = asyncio.get_running_loop().time()
            while found < _LARGE:
                found += len(await client.reader.read(1 << 16))
                await asyncio.sleep(0.05)
            assert asyncio.get_running_loop().time() - began > 4

    _run(scenario)
