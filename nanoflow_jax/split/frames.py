"""Frames between the ends of a split session: a header, the bytes of a tensor, a checksum.

    magic 4 B | header length u32 | payload length u32 | header | payload | crc32c u32

All integers are little-endian; the checksum (RFC 3720, section 12.1) is of all that stands before
it. Lengths are checked against limits and against the bytes that came before anything is made of
them, and nothing in a frame is ever executed.
"""

import dataclasses
import struct

import google_crc32c

_MAGIC = b"NFSL"
_START = struct.Struct("<4sII")
_CRC = struct.Struct("<I")
OVERHEAD_BYTES = _START.size + _CRC.size


class FrameError(ValueError):
    """Bytes that are no frame, or not the whole of one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameLimits:
    """The largest frame that is taken.

    Attributes:
        header_bytes: Of its header.
        payload_bytes: Of its payload.
    """

    header_bytes: int = 256 << 10
    payload_bytes: int = 8 << 20

    @property
    def frame_bytes(self) -> int:
        """The most bytes of a whole frame."""
        return OVERHEAD_BYTES + self.header_bytes + self.payload_bytes


def pack(header: bytes, payload: bytes = b"") -> bytes:
    """The bytes of a frame."""
    start = _START.pack(_MAGIC, len(header), len(payload))
    crc = google_crc32c.extend(google_crc32c.value(start + header), payload)
    return b"".join((start, header, payload, _CRC.pack(crc)))


def parse(data: bytes, limits: FrameLimits) -> tuple[bytes, bytes]:
    """Header and payload of a frame.

    Raises:
        FrameError: It does not begin as a frame does, is larger than the limits, shorter or
            longer than it says, or was changed on its way.
    """
    if len(data) < OVERHEAD_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes is truncated: {OVERHEAD_BYTES} are least")
    magic, header_bytes, payload_bytes = _START.unpack_from(data)
    if magic != _MAGIC:
        raise FrameError(f"a frame begins with {magic!r}, not with {_MAGIC!r}")
    if header_bytes > limits.header_bytes or payload_bytes > limits.payload_bytes:
        raise FrameError(
            f"a frame of {header_bytes} + {payload_bytes} bytes is too large: at most "
            f"{limits.header_bytes} + {limits.payload_bytes} are taken"
        )
    wanted = OVERHEAD_BYTES + header_bytes + payload_bytes
    if len(data) != wanted:
        raise FrameError(f"a frame of {wanted} bytes came with {len(data)}: it was cut or joined")
    middle = _START.size + header_bytes
    # The checksum takes bytes and no views; so each is copied, once.
    start, payload = data[:middle], data[middle : -_CRC.size]
    (crc,) = _CRC.unpack_from(data, len(data) - _CRC.size)
    if google_crc32c.extend(google_crc32c.value(start), payload) != crc:
        raise FrameError("a frame's checksum does not fit: it was changed on its way")
    return start[_START.size :], payload
