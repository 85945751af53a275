"""A client that says whatever a test wants, one message at a time."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc.aio
import msgspec
import numpy as np
import split_model
import split_runs

from nanoflow_jax.split import codecs, frames, messages, transport

_LIMITS = frames.FrameLimits()
_Kind = TypeVar("_Kind")
HELLO = messages.Hello(
    major=messages.PROTOCOL_MAJOR,
    minor=messages.PROTOCOL_MINOR,
    build="a test",
    identity=split_model.IDENTITY,
    client_layers=((0, split_model.NUM_LAYERS),),
    start=2,
    stop=4,
    codecs=("f32",),
    params=split_runs.PARAMS,
    prompt_len=8,
    max_len=32,
)


def hello(**changes: Any) -> messages.Hello:
    """`HELLO` with changes."""
    return msgspec.structs.replace(HELLO, **changes)


def rows(position: int, count: int = 1) -> np.ndarray:
    """Rows that differ from all others."""
    places = np.arange(position, position + count)[:, None] + np.arange(split_model.WIDTH)
    return np.sin(places).astype(np.float32)


class RawClient:
    """One stream.

    Attributes:
        welcome: Of the session, once open.
    """

    def __init__(self, stream: transport.ClientStream) -> None:
        self._stream = stream
        self.welcome: messages.Welcome | None = None

    async def open(self, **changes: Any) -> messages.Welcome:
        """Greets; the answer must be a welcome."""
        self.welcome = await self.ask(hello(**changes), messages.Welcome)
        return self.welcome

    async def ask(self, message: messages.Message, kind: type[_Kind]) -> _Kind:
        """Says something; the next message of a kind."""
        await self.say(message)
        return await self.hear(kind)

    async def ask_any(self, message: messages.Message) -> messages.Message | None:
        """Says something; the next message."""
        await self.say(message)
        return await self.hear_any()

    async def say(self, message: messages.Message, payload: bytes = b"") -> None:
        """Says something."""
        await self._stream.write(messages.to_frame(message, payload))

    async def say_bytes(self, data: bytes) -> None:
        """Says what may be no frame."""
        await self._stream.write(data)

    async def act(self, step: int, position: int, hidden: np.ndarray, **changes: Any) -> None:
        """Sends rows, as they should be but for the changes."""
        message = messages.Act(
            step=step,
            border=2,
            position=position,
            num_rows=len(hidden),
            width=hidden.shape[1],
            codec=codecs.Codec.F32,
        )
        await self.say(
            msgspec.structs.replace(message, **changes), hidden.astype(np.float32).tobytes()
        )

    async def hear(self, kind: type[_Kind]) -> _Kind:
        """The next message of a kind, which must come before the end."""
        while True:
            message = await self.hear_any()
            assert message is not None, f"the stream ended without {kind.__name__}"
            if isinstance(message, kind):
                return message
            assert not isinstance(message, messages.Err | messages.Reject), message

    async def hear_error(self) -> messages.Err:
        """The error that ends the stream."""
        while not isinstance(message := await self.hear_any(), messages.Err):
            assert message is not None, "the stream ended without Err"
        return message

    async def hear_payload(self) -> bytes:
        """The payload of the next rows."""
        while True:
            data = await self._stream.read()
            assert data is not None, "the stream ended without rows"
            message, payload = messages.from_frame(data, _LIMITS)
            if isinstance(message, messages.Act):
                return payload

    async def hear_any(self) -> messages.Message | None:
        """The next message; None after the last."""
        data = await self._stream.read()
        return None if data is None else messages.from_frame(data, _LIMITS)[0]

    def vanish(self) -> None:
        """Ends the stream without a word."""
        self._stream.cancel()


class Maker:
    """Makes raw clients of a gateway, each on a stream of its own.

    Attributes:
        channel: What they share.
    """

    def __init__(self, made: grpc.aio.Channel, token: str) -> None:
        self.channel = made
        self._token = token

    def __call__(self, method: str = transport.SESSION) -> RawClient:
        return RawClient(transport.open_stream(self.channel, method, self._token))


@contextlib.asynccontextmanager
async def channel(port: int, token: str = split_runs.TOKEN) -> AsyncIterator[Maker]:
    """Makes raw clients of a gateway.

    Their windows are small and do not grow: what is not read soon waits at the gateway.
    """
    options = [
        ("grpc.http2.lookahead_bytes", 1 << 14),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    made = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
    try:
        yield Maker(made, token)
    finally:
        await made.close()
