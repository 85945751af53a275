"""Messages come through frames as they were, and nothing else does."""

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st

from nanoflow_jax import request
from nanoflow_jax.split import frames, messages
from nanoflow_jax.split.codecs import Codec

_LIMITS = frames.FrameLimits()
_IDENTITY = messages.Identity(
    model="toy",
    parts=(("embedding", "a" * 64), ("layer 0", "d" * 64)),
    config_sha256="b" * 64,
    tokenizer_sha256="c" * 64,
    num_layers=6,
    hidden_size=8,
    vocab_size=50,
    hidden_dtype="float32",
)
_ALL = [
    messages.Hello(
        major=1,
        minor=0,
        build="0.1.0",
        identity=_IDENTITY,
        client_layers=((0, 2), (4, 6)),
        start=2,
        stop=4,
        codecs=("f32", "of the future"),
        params=request.SamplingParams(stop_token_ids=(3,), seed=2**64 - 1),
        prompt_len=5,
        max_len=20,
        resume=messages.Resume(session_id="s", token="t", epoch="e", position=7),
    ),
    messages.Welcome(
        session_id="s",
        token="t",
        epoch="e",
        minor=0,
        codec=Codec.BF16,
        credits=4,
        max_rows=64,
        heartbeat_s=5.0,
        lease_s=20.0,
        position=0,
    ),
    messages.Reject(code=messages.Code.MODEL, reason="another model", retry_after_s=1.5),
    messages.Act(step=1, border=2, position=0, num_rows=3, width=8, codec=Codec.INT8_OUTLIERS),
    messages.Tok(
        step=2,
        position=9,
        token_ids=(4,),
        logprobs=(request.TokenLogprobs(token_id=4, logprob=-0.5, rank=1, top=((4, -0.5),)),),
        finish_reason=request.FinishReason.STOP,
        server_s=0.25,
    ),
    messages.Trunc(step=3, position=4),
    messages.AskBlobs(major=2, minor=0, layers=((0, 2),)),
    messages.Blobs(
        model="toy", blobs=(messages.Blob(name="layer 0", sha256="e" * 64, nbytes=1 << 40),)
    ),
    messages.Want(sha256="e" * 64, offset=7),
    messages.Chunk(offset=7),
    messages.Credit(steps=2),
    messages.Ping(sent_s=12.5, answer_bytes=100),
    messages.Pong(sent_s=12.5),
    messages.Ask(),
    messages.Offer(build="1.0", borders=(0, 2, 4), max_rows=64, max_len=100),
    messages.Err(code=messages.Code.BAD_STEP, detail="a gap", retryable=True),
    messages.Close(reason="done"),
]


@pytest.mark.parametrize("message", _ALL, ids=lambda message: type(message).__name__)
def test_message_comes_through_a_frame_as_it_was(message: messages.Message) -> None:
    read, payload = messages.from_frame(messages.to_frame(message, b"xyz"), _LIMITS)
    assert read == message
    assert payload == b"xyz"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 0),
        ("step", -1),
        ("num_rows", 0),
        ("num_rows", messages.MAX_ROWS + 1),
        ("width", 1 << 17),
        ("position", 1 << 31),
        ("codec", "pickle"),
        ("border", "2"),
    ],
)
def test_number_outside_its_bounds_is_no_message(name: str, value: object) -> None:
    fields = msgspec.to_builtins(_ALL[3]) | {name: value}
    with pytest.raises(frames.FrameError, match=rf"header is no message: .*\$\.{name}"):
        messages.from_frame(frames.pack(msgspec.msgpack.encode(fields)), _LIMITS)


def test_sampling_that_the_engine_refuses_is_no_message() -> None:
    fields = msgspec.to_builtins(_ALL[0])
    fields["params"]["top_p"] = 7.0
    with pytest.raises(frames.FrameError, match=r"top_p=7\.0 is not a number in"):
        messages.from_frame(frames.pack(msgspec.msgpack.encode(fields)), _LIMITS)


def test_more_token_ids_than_rows_are_no_message() -> None:
    fields = {"type": "Tok", "step": 1, "position": 0, "token_ids": [1] * (messages.MAX_ROWS + 1)}
    with pytest.raises(frames.FrameError, match=r"header is no message: .*8192"):
        messages.from_frame(frames.pack(msgspec.msgpack.encode(fields)), _LIMITS)


@hypothesis.given(st.binary(max_size=300))
@hypothesis.settings(max_examples=200)
def test_any_header_gives_a_message_or_a_frame_error(header: bytes) -> None:
    try:
        read, _ = messages.from_frame(frames.pack(header), _LIMITS)
    except frames.FrameError:
        return
    assert isinstance(read, messages.Message)


@hypothesis.given(st.sampled_from(_ALL), st.data())
@hypothesis.settings(max_examples=300)
def test_any_change_of_a_header_gives_a_message_or_a_frame_error(
    message: messages.Message, data: st.DataObject
) -> None:
    header = bytearray(msgspec.msgpack.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        read, _ = messages.from_frame(frames.pack(bytes(header)), _LIMITS)
    except frames.FrameError:
        return
    assert isinstance(read, messages.Message)


def test_header_of_ten_thousand_nested_lists_is_refused() -> None:
    header = b"\x91" * 100_000
    with pytest.raises(frames.FrameError, match="no message"):
        messages.from_frame(frames.pack(header), _LIMITS)
