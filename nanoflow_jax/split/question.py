"""Streams on which a client asks a gateway one thing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio

from nanoflow_jax.split import errors, frames, messages, settings, transport
from nanoflow_jax.split.messages import Code


@contextlib.asynccontextmanager
async def asking(
    channel: grpc.aio.Channel, method: str, token: str, question: messages.Message
) -> AsyncIterator[transport.ClientStream]:
    """A stream on which a question was asked; see `hear`.

    Raises:
        SplitError: The stream broke, or carried what is no frame; it may be asked again.
    """
    stream = transport.open_stream(channel, method, token)
    try:
        await stream.write(messages.to_frame(question))
        yield stream
    except transport.StreamLostError as error:
        raise errors.SplitError(Code.LINK, str(error), retryable=True) from error
    except frames.FrameError as error:
        raise errors.SplitError(Code.BAD_FRAME, str(error), retryable=True) from error
    finally:
        stream.cancel()


async def hear(
    stream: transport.ClientStream, knobs: settings.ClientSection
) -> tuple[messages.Message, bytes]:
    """The next message of an answer, and its payload.

    Raises:
        RefusedError: The gateway refuses.
        SplitError: It failed.
        StreamLostError: It said nothing more, or not in time.
        FrameError: It said what is no message.
    """
    patience_s = knobs.step_timeout_s
    try:
        async with asyncio.timeout(patience_s):
            data = await stream.read()
    except TimeoutError as error:
        raise transport.StreamLostError(
            f"nothing came of the gateway for {patience_s:g} s"
        ) from error
    if data is None:
        raise transport.StreamLostError("the gateway ended the stream")
    message, payload = messages.from_frame(data, knobs.frame_limits)
    if isinstance(message, messages.Reject):
        raise errors.RefusedError(message.code, message.reason, retry_after_s=message.retry_after_s)
    if isinstance(message, messages.Err):
        raise errors.SplitError(message.code, message.detail, retryable=message.retryable)
    return message, payload
