"""Frames are taken whole or refused with a reason."""

import struct

import hypothesis
import pytest
from hypothesis import strategies as st

from nanoflow_jax.split import frames

_LIMITS = frames.FrameLimits(header_bytes=64, payload_bytes=256)


@hypothesis.given(st.binary(max_size=64), st.binary(max_size=256))
def test_frame_gives_back_what_was_put_into_it(header: bytes, payload: bytes) -> None:
    read = frames.parse(frames.pack(header, payload), _LIMITS)
    assert read == (header, payload)


def test_frame_of_one_byte_each_is_as_the_format_says() -> None:
    data = frames.pack(b"h", b"p")
    assert data[:14] == b"NFSL" + struct.pack("<II", 1, 1) + b"hp"
    assert len(data) == 14 + 4


def test_checksum_is_crc32c() -> None:
    # RFC 3720, appendix B.4: 32 bytes of zeros give 0x8a9136aa.
    assert frames.google_crc32c.value(bytes(32)) == 0x8A9136AA


@hypothesis.given(st.binary(max_size=64), st.binary(max_size=256), st.data())
def test_frame_with_any_one_byte_changed_is_refused(
    header: bytes, payload: bytes, data: st.DataObject
) -> None:
    frame = bytearray(frames.pack(header, payload))
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(frames.FrameError):
        frames.parse(bytes(frame), _LIMITS)


@hypothesis.given(st.binary(max_size=64), st.binary(max_size=256), st.data())
def test_frame_cut_anywhere_is_refused(header: bytes, payload: bytes, data: st.DataObject) -> None:
    frame = frames.pack(header, payload)
    end = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(frames.FrameError, match=r"truncated|cut or joined"):
        frames.parse(frame[:end], _LIMITS)


@hypothesis.given(st.binary(max_size=400))
def test_any_bytes_give_a_frame_or_a_frame_error(data: bytes) -> None:
    try:
        header, payload = frames.parse(data, _LIMITS)
    except frames.FrameError:
        return
    assert frames.pack(header, payload) == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a frame of 0 bytes is truncated: 16 are least"),
        (b"JUNK" + bytes(12), "a frame begins with b'JUNK', not with b'NFSL'"),
        (frames.pack(b"h") + b"x", "a frame of 17 bytes came with 18"),
        (frames.pack(bytes(65)), r"65 \+ 0 bytes is too large: at most 64 \+ 256"),
        (frames.pack(b"", bytes(257)), r"0 \+ 257 bytes is too large"),
        # A length that nobody could allocate is refused for what it says.
        (b"NFSL" + b"\xff" * 8 + bytes(4), r"4294967295 \+ 4294967295 bytes is too large"),
        (frames.pack(b"h")[:-1] + b"x", "a frame's checksum does not fit"),
    ],
)
def test_message_says_what_is_wrong_with_a_frame(data: bytes, message: str) -> None:
    with pytest.raises(frames.FrameError, match=message):
        frames.parse(data, _LIMITS)
