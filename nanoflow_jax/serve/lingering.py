"""Ends connections so that clients which are still sending read their answer."""

from collections.abc import Callable
from typing import Any


class Lingering:
    """A transport that hears a client out before it is closed.

    To close while bytes arrive makes the system tell the client that the connection is broken,
    often before it has read the answer, such as that its body is too large.
    """

    def __init__(
        self, transport: Any, *, is_receiving: Callable[[], bool], linger: Callable[[], None]
    ) -> None:
        """Wraps a transport.

        Args:
            transport: Of a connection.
            is_receiving: Whether more of a request is to come.
            linger: Called when our half is closed; has to end the other in time.
        """
        self._transport = transport
        self._is_receiving = is_receiving
        self._linger = linger
        self._is_half_closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Sends bytes; nothing once our half is closed, as after `close` of any transport."""
        if not self._is_half_closed:
            self._transport.write(data)

    def is_closing(self) -> bool:
        """Whether nothing more may be written."""
        return self._is_half_closed or bool(self._transport.is_closing())

    def close(self) -> None:
        """Ends our half at once, and the other with the client's or when time is up."""
        if self.is_closing():
            return
        if not (self._is_receiving() and self._transport.can_write_eof()):
            self._transport.close()
            return
        self._is_half_closed = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self._linger()
