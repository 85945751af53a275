"""HTTP connections with bounds that uvicorn does not set: heads, their number, unread answers."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanoflow_jax.serve import lingering

MAX_HEADERS = 100
MAX_HEAD_BYTES = 64 << 10


class _HeadTooLargeError(Exception):
    """Ends the parsing of a head; uvicorn answers it with status 400."""


def guarded_protocol(
    *, max_connections: int, read_timeout_s: float, write_timeout_s: float
) -> type[HttpToolsProtocol]:
    """The protocol class of a server with these bounds.

    Args:
        max_connections: Open connections. One more takes the place of the one that has been idle
            for longest; where none is idle it is closed at once.
        read_timeout_s: From a connection or the first byte of a request to the end of its head;
            also from the first byte that follows an answer to the end of what belongs to its
            request.
        write_timeout_s: A client that takes nothing of what waits for it for so long is dropped.
    """
    # Connections that wait for the head of a request, those first that have done so for longest.
    idle: dict[HttpToolsProtocol, None] = {}

    class GuardedProtocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        _head_bytes = 0
        _stall: asyncio.TimerHandle | None = None
        _is_in_message = False

        def connection_made(self, transport: Any) -> None:
            if len(self.connections) >= max_connections and not self._try_make_room():
                self.transport = transport
                transport.abort()
                return
            heard_out = lingering.Lingering(
                transport, is_receiving=lambda: self._is_in_message, linger=self._await_rest
            )
            super().connection_made(heard_out)  # type: ignore[arg-type]
            idle[self] = None
            # Nothing waits here beside the piece that the kernel has no room for.
            transport.set_write_buffer_limits(high=0)
            self._await_rest()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_wait()
            self._end_stall()
            idle.pop(self, None)
            super().connection_lost(exc)

        def _try_make_room(self) -> bool:
            for oldest in idle:
                idle.pop(oldest)
                self.connections.discard(oldest)
                oldest.transport.abort()
                return True
            return False

        def pause_writing(self) -> None:
            super().pause_writing()
            self._await_reader()

        def resume_writing(self) -> None:
            self._end_stall()
            super().resume_writing()

        def _await_reader(self) -> None:
            left = self.transport.get_write_buffer_size()
            self._stall = self.loop.call_later(write_timeout_s, self._check_reader, left)

        def _check_reader(self, before: int) -> None:
            if self.transport.get_write_buffer_size() < before:
                self._await_reader()
            else:
                self.transport.abort()

        def _end_stall(self) -> None:
            if self._stall is not None:
                self._stall.cancel()
                self._stall = None

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            # Nothing else bounds how long a client may send what nobody waits for.
            if self.cycle is None or self.cycle.response_complete:
                self._await_rest()
            super().data_received(data)

        def on_message_begin(self) -> None:
            self._head_bytes = 0
            self._is_in_message = True
            self._await_rest()
            super().on_message_begin()

        def on_response_complete(self) -> None:
            if not self.pipeline and not self.transport.is_closing():
                idle[self] = None
            super().on_response_complete()

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value))
            super().on_header(name, value)
            if len(self.headers) > MAX_HEADERS:
                raise _HeadTooLargeError

        def on_headers_complete(self) -> None:
            self._end_wait()
            idle.pop(self, None)
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._is_in_message = False
            super().on_message_complete()
            if self.cycle.response_complete:
                self._end_wait()
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

        def _count(self, count: int) -> None:
            self._head_bytes += count
            if self._head_bytes > MAX_HEAD_BYTES:
                raise _HeadTooLargeError

        def _await_rest(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(read_timeout_s, self._give_up)

        def _end_wait(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            self.transport.abort()

    return GuardedProtocol
