"""What a link between client and gateway does: measured before a session, and by its heartbeats."""

import asyncio
import dataclasses
import statistics
import time

import grpc.aio

from nanoflow_jax.split import errors, frames, messages, transport
from nanoflow_jax.split.messages import Code

_NUM_PINGS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """A measured link.

    Attributes:
        rtt_p50_s: Median round trip of a small frame.
        rtt_p95_s: One of twenty takes longer.
        up_bytes_per_s: From client to server.
        down_bytes_per_s: From server to client.
    """

    rtt_p50_s: float
    rtt_p95_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float


def percentile(values: list[float], fraction: float) -> float | None:
    """The smallest value that so large a part of them does not pass; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


async def probe(
    channel: grpc.aio.Channel,
    token: str,
    *,
    limits: frames.FrameLimits,
    num_bytes: int = 1 << 20,
) -> Link:
    """Measures a link: eight small round trips, then one transfer each way.

    The time of a transfer is that of its round trip less the median of the small ones.

    Args:
        channel: To the gateway.
        token: Opens it.
        limits: Of frames.
        num_bytes: In each transfer.

    Raises:
        SplitError: The gateway refuses, or the link is lost.
    """
    stream = transport.open_stream(channel, transport.PROBE, token)
    try:
        trips = [await _round_trip(stream, limits) for _ in range(_NUM_PINGS)]
        median = statistics.median(trips)
        up_s = await _round_trip(stream, limits, up_bytes=num_bytes)
        down_s = await _round_trip(stream, limits, down_bytes=num_bytes)
    except transport.StreamLostError as error:
        raise errors.SplitError(Code.LINK, str(error), retryable=True) from error
    finally:
        stream.cancel()
    return Link(
        rtt_p50_s=median,
        rtt_p95_s=max(trips),
        up_bytes_per_s=num_bytes / max(up_s - median, 1e-9),
        down_bytes_per_s=num_bytes / max(down_s - median, 1e-9),
    )


async def ask(
    channel: grpc.aio.Channel, token: str, *, limits: frames.FrameLimits, timeout_s: float
) -> messages.Offer:
    """What a gateway offers.

    Args:
        channel: To it.
        token: Opens it.
        limits: Of frames.
        timeout_s: How long it may take.

    Raises:
        SplitError: It refuses, does not know the question, or the link is lost.
    """
    stream = transport.open_stream(channel, transport.PROBE, token)
    try:
        async with asyncio.timeout(timeout_s):
            await stream.write(messages.to_frame(messages.Ask()))
            answer = await _answer(stream, limits)
    except TimeoutError as error:
        raise errors.SplitError(
            Code.LINK, f"the gateway did not answer in {timeout_s:g} s", retryable=True
        ) from error
    except transport.StreamLostError as error:
        raise errors.SplitError(Code.LINK, str(error), retryable=True) from error
    except frames.FrameError as error:
        raise errors.SplitError(Code.BAD_FRAME, str(error)) from error
    finally:
        stream.cancel()
    if not isinstance(answer, messages.Offer):
        raise errors.SplitError(
            Code.PROTOCOL, f"the gateway answers Ask with {type(answer).__name__}"
        )
    return answer


async def _round_trip(
    stream: transport.ClientStream,
    limits: frames.FrameLimits,
    *,
    up_bytes: int = 0,
    down_bytes: int = 0,
) -> float:
    """Seconds from a ping to its answer."""
    begun_s = time.monotonic()
    ping = messages.Ping(sent_s=begun_s, answer_bytes=down_bytes)
    await stream.write(messages.to_frame(ping, bytes(up_bytes)))
    await _answer(stream, limits)
    return time.monotonic() - begun_s


async def _answer(stream: transport.ClientStream, limits: frames.FrameLimits) -> messages.Message:
    data = await stream.read()
    if data is None:
        raise transport.StreamLostError("the gateway ended the probe")
    message, _ = messages.from_frame(data, limits)
    if isinstance(message, messages.Reject):
        raise errors.RefusedError(message.code, message.reason, retry_after_s=message.retry_after_s)
    return message
