"""What the ends of a split session say to each other, and its way into frames and back.

The client sends `Hello` and gets `Welcome` or `Reject`. Then it sends steps, numbered 1, 2, 3...:
`Act` (hidden states), `Tok` (token ids) or `Trunc`; and gets `Act`, `Tok` or `Trunc` that name the
last step that is in them. A stream for weights has one question, `AskBlobs` or `Want`.
Every length and number is bounded where it is declared.
"""

import enum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nanoflow_jax import request
from nanoflow_jax.split import codecs, frames

PROTOCOL_MAJOR = 2
PROTOCOL_MINOR = 0
MAX_ROWS = 8192

Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Step = Annotated[int, Meta(ge=1, lt=1 << 48)]
Size = Annotated[int, Meta(ge=0, lt=1 << 62)]
# The length too: in a pattern `$` may have a line's end behind it.
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
Rows = Annotated[int, Meta(ge=1, le=MAX_ROWS)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Credits = Annotated[int, Meta(ge=0, le=1024)]
Name = Annotated[str, Meta(max_length=256)]
Reason = Annotated[str, Meta(max_length=4096)]
Secret = Annotated[str, Meta(max_length=128)]
# Names and hex sha256 of a model's parts; see `identity`.
Parts = Annotated[tuple[tuple[Name, Secret], ...], Meta(max_length=2048)]
TokenIds = Annotated[tuple[Count, ...], Meta(max_length=MAX_ROWS)]
Ranges = Annotated[tuple[tuple[Count, Count], ...], Meta(max_length=1024)]


class Code(enum.StrEnum):
    """What went wrong, for programs; the text beside it is for people."""

    BAD_ACT = "bad_act"
    BAD_FRAME = "bad_frame"
    BAD_STEP = "bad_step"
    ENGINE = "engine"
    EPOCH = "epoch"
    LAYERS = "layers"
    LIMIT = "limit"
    LINK = "link"
    MODEL = "model"
    OVERLOADED = "overloaded"
    PROTOCOL = "protocol"
    REFUSED = "refused"
    SESSION = "session"
    SHUTDOWN = "shutdown"
    UNAUTHORIZED = "unauthorized"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Which model an end holds; two ends that differ in any of it would produce fluent garbage.

    A client may hold fewer parts than its gateway.

    Attributes:
        model: A name for people.
        parts: Of the parts that it holds, in the order in which a token meets them.
        config_sha256: Of everything else that changes results: sizes, RoPE, norms, scaling.
        tokenizer_sha256: Of the tokenizer.
        num_layers: L.
        hidden_size: D.
        vocab_size: V.
        hidden_dtype: Of hidden states inside the model; a key of `codecs.HIDDEN_DTYPES`.
    """

    model: Name
    parts: Parts
    config_sha256: Secret
    tokenizer_sha256: Secret
    num_layers: Annotated[int, Meta(ge=1, le=4096)]
    hidden_size: Annotated[int, Meta(ge=1, le=1 << 16)]
    vocab_size: Annotated[int, Meta(ge=1, lt=1 << 31)]
    hidden_dtype: Literal["float32", "bfloat16"]


class Resume(msgspec.Struct, frozen=True, kw_only=True):
    """A session that a client comes back to.

    Attributes:
        session_id: From its `Welcome`.
        token: From its `Welcome`.
        epoch: From its `Welcome`.
        position: Rows [0, position) whose results the client has.
    """

    session_id: Secret
    token: Secret
    epoch: Secret
    position: Count


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message of a stream.

    Attributes:
        major: Ends of different major versions do not talk.
        minor: The lower of both ends' is spoken.
        build: Of the client, for logs.
        identity: Its model.
        client_layers: Ranges [start, stop) of layers that it holds.
        start: First layer that the server is to run.
        stop: The layer after the last.
        codecs: It can read and write, best first.
        params: How to draw, where the server does.
        prompt_len: Tokens of the prompt.
        max_len: Most positions, the prompt's included.
        resume: Which session it comes back to, if it does.
    """

    major: Count
    minor: Count
    build: Name
    identity: Identity
    client_layers: Ranges
    start: Count
    stop: Count
    # Names, since a client may know codecs that this end does not.
    codecs: Annotated[tuple[Name, ...], Meta(max_length=16)]
    params: request.SamplingParams
    prompt_len: Annotated[int, Meta(ge=1, lt=1 << 31)]
    max_len: Annotated[int, Meta(ge=1, lt=1 << 31)]
    resume: Resume | None = None


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The session is open.

    Attributes:
        session_id: Its name.
        token: Opens it again after the stream is lost.
        epoch: Changes whenever the server starts; sessions do not outlive it.
        minor: Version of the protocol that both ends speak.
        codec: How hidden states are written, in both directions.
        credits: Steps that may be under way before the first `Credit`.
        max_rows: Most rows of a step.
        heartbeat_s: Time between pings; an end that is silent for two of them is gone.
        lease_s: How long the session waits for its client to come back.
        position: Rows [0, position) are kept; the next step, number 1, begins there.
    """

    session_id: Secret
    token: Secret
    epoch: Secret
    minor: Count
    codec: codecs.Codec
    credits: Annotated[int, Meta(ge=1, le=1024)]
    max_rows: Rows
    heartbeat_s: Annotated[float, Meta(gt=0.0, le=3600.0)]
    lease_s: Seconds
    position: Count


class Reject(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The session is not opened.

    Attributes:
        code: Why.
        reason: Why, in words.
        retry_after_s: When another try may help; None if none would.
    """

    code: Code
    reason: Reason
    retry_after_s: Seconds | None = None


class Act(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Hidden states of rows [position, position + num_rows), which are the payload.

    Attributes:
        step: Its number; in an answer, the last step that is in it.
        border: The layer that they enter.
        position: Of the first row.
        num_rows: n.
        width: D.
        codec: How they are written.
        server_s: In an answer: from the step's arrival to its result.
        credits: In an answer: so many more steps may be sent, as if a `Credit` came with it.
    """

    step: Step
    border: Count
    position: Count
    num_rows: Rows
    width: Annotated[int, Meta(ge=1, le=1 << 16)]
    codec: codecs.Codec
    server_s: Seconds = 0.0
    credits: Credits = 0


class Tok(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Token ids: of rows to be computed, or, in an answer, drawn.

    Attributes:
        step: As in `Act`.
        position: Of the first id's row; in an answer, of the row that was drawn from.
        token_ids: In an answer none if the piece ends without one.
        logprobs: Of drawn tokens, where asked for.
        finish_reason: With the last answer of a session.
        server_s: As in `Act`.
        credits: As in `Act`.
    """

    step: Step
    position: Count
    token_ids: TokenIds
    logprobs: Annotated[tuple[request.TokenLogprobs, ...], Meta(max_length=MAX_ROWS)] = ()
    finish_reason: request.FinishReason | None = None
    server_s: Seconds = 0.0
    credits: Credits = 0


class Trunc(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rows at and after a position are forgotten; the answer says that they are.

    Attributes:
        step: As in `Act`.
        position: Where the next rows begin.
    """

    step: Step
    position: Count


class Credit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """So many more steps may be sent."""

    steps: Annotated[int, Meta(ge=1, le=1024)]


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks for a `Pong`.

    Attributes:
        sent_s: By the asker's clock.
        answer_bytes: Length of the payload that the answer shall have, to measure a link.
    """

    sent_s: Seconds
    answer_bytes: Annotated[int, Meta(ge=0, le=8 << 20)] = 0


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answers a `Ping`.

    Attributes:
        sent_s: As it came.
    """

    sent_s: Seconds


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks a gateway, on a probe's stream, for its `Offer`."""


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a gateway grants sessions.

    Attributes:
        build: Of the gateway.
        borders: Layers at which sessions may enter and leave, ascending, 0 and L included.
        max_rows: Most rows of a step.
        max_len: Most positions of a session.
    """

    build: Name
    borders: Annotated[tuple[Count, ...], Meta(min_length=2, max_length=4097)]
    max_rows: Rows
    max_len: Count


class Err(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The stream ends with this.

    Attributes:
        code: What went wrong.
        detail: The same in words.
        retryable: Whether the session is kept, for its lease, and may be resumed.
    """

    code: Code
    detail: Reason
    retryable: bool


class Close(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The session is over and frees its room; the other end answers with the same.

    Attributes:
        reason: In words.
    """

    reason: Reason = ""


class AskBlobs(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks what it takes to run some layers; see `Blobs`.

    Attributes:
        major: As in `Hello`.
        minor: As in `Hello`.
        layers: Ranges [start, stop).
    """

    major: Count
    minor: Count
    layers: Ranges


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a gateway gives, by their hash.

    Attributes:
        name: Of a part of the model, whose bytes are a safetensors file, or of a text file.
        sha256: Of all bytes.
        nbytes: How many they are.
    """

    name: Name
    sha256: Sha256
    nbytes: Size


class Blobs(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What it takes to run some layers: config and tokenizer, then parts.

    Attributes:
        model: A name for people.
        blobs: Each once.
    """

    model: Name
    blobs: Annotated[tuple[Blob, ...], Meta(max_length=2048)]


class Want(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks for bytes from an offset to the end; `Chunk`s follow.

    Attributes:
        sha256: Whose.
        offset: The first.
    """

    sha256: Sha256
    offset: Size


class Chunk(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bytes, which are the payload.

    Attributes:
        offset: Of the first.
    """

    offset: Size


OfWeights = AskBlobs | Blobs | Want | Chunk
Message = (
    Hello
    | Welcome
    | Reject
    | Act
    | Tok
    | Trunc
    | Credit
    | Ping
    | Pong
    | Ask
    | Offer
    | Err
    | Close
    | OfWeights
)
StepMessage = Act | Tok | Trunc

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Message)


def to_frame(message: Message, payload: bytes = b"") -> bytes:
    """The frame of a message."""
    return frames.pack(_ENCODER.encode(message), payload)


def from_frame(data: bytes, limits: frames.FrameLimits) -> tuple[Message, bytes]:
    """A message and the payload that came with it.

    Raises:
        FrameError: The bytes are no frame, or its header is no message.
    """
    header, payload = frames.parse(data, limits)
    try:
        message: Message = _DECODER.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise frames.FrameError(f"a frame's header is no message: {error}") from error
    return message, payload
