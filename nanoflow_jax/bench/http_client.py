"""Asks a server over HTTP; its clients may leave in mid-stream, or read slowly."""

import asyncio
import dataclasses
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httptools

_STREAM_END = b"data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
    """Which server.

    Attributes:
        url: Its root, such as http://127.0.0.1:8000.
        api_key: Sent along unless empty.
    """

    url: str
    api_key: str = ""

    def __post_init__(self) -> None:
        if not self.url.startswith("http://"):
            raise ValueError(f"--url={self.url} is not of the form http://HOST:PORT")

    @property
    def headers(self) -> dict[str, str]:
        """What every request needs."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def message(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The bytes of a GET, or of a POST that has a body."""
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"host": urllib.parse.urlsplit(self.url).netloc, **self.headers}
        if body is not None:
            headers |= {"content-type": "application/json", "content-length": str(len(data))}
        method = "GET" if body is None else "POST"
        lines = [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + data

    def stats(self) -> dict[str, Any]:
        """The server's own figures; nothing from one of another make.

        Raises:
            OSError: It cannot be reached.
        """
        request = urllib.request.Request(f"{self.url}/page/stats", headers=self.headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                found: dict[str, Any] = json.load(answer)
        except (urllib.error.HTTPError, ValueError):
            return {}
        return found

    @asynccontextmanager
    async def connected(self, *, receive_bytes: int = 0) -> AsyncIterator["Connection"]:
        """A connection, closed afterwards.

        Args:
            receive_bytes: What the system may hold for a client that does not read; 0: as usual.

        Raises:
            OSError: The server cannot be reached.
        """
        place = urllib.parse.urlsplit(self.url)
        made = Connection(receive_bytes)
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: made, place.hostname or "127.0.0.1", place.port or 80
        )
        try:
            yield made
        finally:
            transport.abort()
            await made.closed.wait()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server said.

    Attributes:
        status: Of HTTP.
        body: All of it, or what had come when the client left.
        first_s: From the request's sending to the first byte of the body.
        last_s: To the last.
    """

    status: int
    body: bytes
    first_s: float
    last_s: float

    def json(self) -> dict[str, Any]:
        """The body of an answer that is not a stream.

        Raises:
            ValueError: The server refused the request; the message is its own.
        """
        self._check()
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def is_whole_stream(self) -> bool:
        """Whether the body ends as a stream does."""
        return self.body.endswith(_STREAM_END)

    def events(self) -> list[dict[str, Any]]:
        """The events of a whole stream.

        Raises:
            ValueError: The server refused the request or broke the stream off.
        """
        self._check()
        if not self.is_whole_stream:
            raise ValueError(f"the stream ends with {self.body[-200:]!r}")
        events = [
            json.loads(part.removeprefix(b"data: "))
            for part in self.body.removesuffix(_STREAM_END).split(b"\n\n")
            if part and part[:1] != b":"
        ]
        if "error" in events[-1]:
            raise ValueError(f"the server answered {events[-1]['error']['message']}")
        return events

    def _check(self) -> None:
        if self.status != 200:
            raise ValueError(f"the server answered {self.body.decode(errors='replace')[:500]}")


class Connection(asyncio.Protocol):
    """One connection that is asked one thing after another."""

    def __init__(self, receive_bytes: int) -> None:
        self._receive_bytes = receive_bytes
        self.closed = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[None] | None = None
        self._body = bytearray()
        self._num_parts = 0
        self._first_at: float | None = None
        self._leave_after: int | None = None
        self._pause_s = 0.0

    def connection_made(self, transport: Any) -> None:
        """Keeps the transport."""
        self._transport = transport
        if self._receive_bytes:
            transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """Fails what is being asked."""
        self.closed.set()
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(ConnectionResetError("the server closed the connection"))

    async def ask(
        self, message: bytes, *, leave_after: int | None = None, pause_s: float = 0.0
    ) -> Answer:
        """Sends a request and waits for its answer.

        Args:
            message: From `Server.message`.
            leave_after: Parts of the body after which the client is gone; None: it stays.
            pause_s: Between reading one part and the next.

        Raises:
            ConnectionError: The server closed the connection.
        """
        assert self._transport is not None
        if self._transport.is_closing():
            raise ConnectionResetError("the server closed the connection")
        self._body.clear()
        self._num_parts = 0
        self._first_at = None
        self._leave_after, self._pause_s = leave_after, pause_s
        self._parser = httptools.HttpResponseParser(self)
        self._answered = asyncio.get_running_loop().create_future()
        start = time.perf_counter()
        self._transport.write(message)
        await self._answered
        end = time.perf_counter()
        return Answer(
            status=self._parser.get_status_code(),
            body=bytes(self._body),
            first_s=(self._first_at or end) - start,
            last_s=end - start,
        )

    def data_received(self, data: bytes) -> None:
        """Feeds the parser."""
        self._parser.feed_data(data)
        if self._pause_s and self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(self._pause_s, self._resume)

    def _resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def on_body(self, data: bytes) -> None:
        """Takes a part of the body; called by the parser."""
        if self._num_parts == self._leave_after:
            return  # came together with the last part that was wanted
        if self._first_at is None:
            self._first_at = time.perf_counter()
        self._body += data
        self._num_parts += 1
        if self._num_parts == self._leave_after:
            assert self._transport is not None
            self.on_message_complete()
            self._transport.abort()

    def on_message_complete(self) -> None:
        """Ends the answer; called by the parser."""
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)
