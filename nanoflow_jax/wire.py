"""Frames on a socket between processes of ours: a length of four bytes, then msgpack."""

import socket
import struct
from typing import Any

import msgspec

_LENGTH = struct.Struct("<I")
HEADER_BYTES = _LENGTH.size


class Codec:
    """Encodes messages of one direction and decodes those of the other."""

    def __init__(self, incoming: Any) -> None:
        """Makes a codec.

        Args:
            incoming: The union of message types that arrive.
        """
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)

    def frame(self, message: msgspec.Struct) -> bytes:
        """The bytes of a message, its length first."""
        data = self._encoder.encode(message)
        return _LENGTH.pack(len(data)) + data

    def decode(self, data: bytes) -> Any:
        """The message in the bytes after a length."""
        return self._decoder.decode(data)


def body_bytes(header: bytes) -> int:
    """How many bytes follow a length."""
    return int(_LENGTH.unpack(header)[0])


def read_frame(sock: socket.socket) -> bytes | None:
    """Waits for one message; None when the other end is gone."""
    header = _read_exactly(sock, HEADER_BYTES)
    return None if header is None else _read_exactly(sock, body_bytes(header))


def _read_exactly(sock: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        try:
            part = sock.recv(min(count, 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
