"""What a gateway says and hears on one stream of a session."""

import asyncio
import collections
import contextlib
import dataclasses
import logging
from collections.abc import Callable

from nanoflow_jax.split import (
    codecs,
    errors,
    frames,
    messages,
    outbox,
    session,
    settings,
    transport,
)
from nanoflow_jax.split.messages import Code

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How a stream ended.

    Attributes:
        keep: Whether the session waits for its client.
        last: What the client is told, if it still listens.
        why: For the log.
    """

    keep: bool
    last: messages.Message | None
    why: str


class Conversation:
    """A client's stream on a session, from the welcome to the end.

    Attributes:
        outbox: What is to be said.
    """

    def __init__(
        self,
        stream: transport.Stream,
        *,
        limits: settings.GatewaySection,
        counts: collections.Counter[str],
    ) -> None:
        """Makes one that has not begun.

        Args:
            stream: Carries it.
            limits: Of the gateway.
            counts: Of the gateway; failures by code are added.
        """
        self.outbox = outbox.Outbox()
        self._stream = stream
        self._limits = limits
        self._counts = counts
        self._ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._heard_s = asyncio.get_running_loop().time()
        self._is_reading = True

    def end(self, *, keep: bool, why: str, last: messages.Message | None = None) -> None:
        """Says how the stream ends; the first to say so is right."""
        if not self._ended.done():
            self._ended.set_result(Ending(keep=keep, last=last, why=why))

    def fail(self, error: errors.SplitError) -> None:
        """Ends the stream with an error; the session is kept if it may be retried."""
        last = messages.Err(code=error.code, detail=error.detail[:4096], retryable=error.retryable)
        self.end(keep=error.retryable, why=str(error), last=last)

    async def run(
        self,
        held: session.Session,
        welcome: messages.Welcome,
        *,
        settle: Callable[[Ending], None],
    ) -> None:
        """Reads and writes until the stream ends.

        Args:
            held: Whose stream it is.
            welcome: Said first.
            settle: Called once the stream ended, before the client is told; again as this returns.
        """
        writer = asyncio.create_task(self._write(held, welcome))
        tasks = [
            writer,
            asyncio.create_task(self._read(held)),
            asyncio.create_task(self._watch()),
        ]
        for task in tasks:
            task.add_done_callback(self._look_at)
        try:
            # Cancelled, this waits no more, but how the stream ended is still to be said.
            ending = await asyncio.shield(self._ended)
            settle(ending)
            if ending.last is not None:
                self.outbox.close(ending.last)
                await asyncio.wait([writer], timeout=self._limits.write_timeout_s)
        finally:
            # gRPC cancels this coroutine when the client is gone.
            self.end(keep=True, why="the client is gone")
            settle(self._ended.result())
            for task in tasks:
                task.cancel()

    def _look_at(self, task: asyncio.Task[None]) -> None:
        """Ends the stream if one of its tasks failed in a way that nobody thought of."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("a stream failed", exc_info=error)
            self.fail(errors.SplitError(Code.ENGINE, f"the gateway failed: {error!r}"))

    async def _read(self, held: session.Session) -> None:
        try:
            while (data := await self._stream.read()) is not None:
                self._is_reading = False
                if await self._take(held, data):
                    return
                self._heard_s = asyncio.get_running_loop().time()
                self._is_reading = True
            self.end(keep=True, why="the client closed its end without Close")
        except transport.StreamLostError as error:
            self.end(keep=True, why=str(error))
        except frames.FrameError as error:
            self._counts[f"failed: {Code.BAD_FRAME}"] += 1
            self.fail(errors.SplitError(Code.BAD_FRAME, str(error), retryable=True))
        except errors.SplitError as error:
            self._counts[f"failed: {error.code}"] += 1
            self.fail(error)

    async def _take(self, held: session.Session, data: bytes) -> bool:
        """Does what a frame says; whether it is the last one."""
        message, payload = messages.from_frame(data, self._limits.frame_limits)
        match message:
            case messages.Act() | messages.Tok() | messages.Trunc():
                await held.receive(message, payload)
            case messages.Ping():
                self.outbox.put(messages.Pong(sent_s=message.sent_s))
            case messages.Close():
                self.end(keep=False, why="closed", last=messages.Close())
                return True
            case _:
                raise errors.SplitError(
                    Code.PROTOCOL, f"{type(message).__name__} is nothing that a client says here"
                )
        return False

    async def _write(self, held: session.Session, welcome: messages.Welcome) -> None:
        timeout_s = self._limits.write_timeout_s
        try:
            await self._stream.write(messages.to_frame(welcome))
            while not self.outbox.is_done:
                await self.outbox.write_next(self._stream, timeout_s=timeout_s)
                held.feed()
        except transport.StreamLostError as error:
            self.end(keep=True, why=str(error))
        except codecs.CodecError as error:
            self.fail(errors.SplitError(Code.ENGINE, f"the engine's {error}"))
            # What was to be the last message is still to be written.
            with contextlib.suppress(transport.StreamLostError):
                self.outbox.close(self._ended.result().last or messages.Close())
                await self.outbox.write_next(self._stream, timeout_s=timeout_s)

    async def _watch(self) -> None:
        """Ends a stream from which nothing was heard for two heartbeats."""
        patience_s = 2 * self._limits.heartbeat_s
        loop = asyncio.get_running_loop()
        while True:
            silent_s = loop.time() - self._heard_s if self._is_reading else 0.0
            if silent_s >= patience_s:
                self.end(keep=True, why=f"nothing was heard for {silent_s:.1f} s")
                return
            await asyncio.sleep(patience_s - silent_s)
