"""The server's part of a session, as its client sees it."""

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable

import grpc.aio
import msgspec
import numpy as np
from jaxtyping import Float

from nanoflow_jax.split import codecs, errors, frames, messages, outbox, settings, transport
from nanoflow_jax.split.messages import Code

_READER_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrived:
    """A result.

    Attributes:
        message: It.
        hidden: Rows of an `Act`.
    """

    message: messages.Act | messages.Tok
    hidden: Float[np.ndarray, "n D"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lost:
    """The stream ended before the session did."""

    error: errors.SplitError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credited:
    """More steps may be sent."""


Event = Arrived | Credited | Lost


@dataclasses.dataclass(kw_only=True)
class Traffic:
    """What a session's streams carried.

    Attributes:
        up_bytes: Of frames from the client.
        down_bytes: Of frames to it.
        num_steps: Steps that were sent.
        num_results: Results that came.
        server_s: Time from a step's arrival at the server, or from the result before it, to its
            result.
        rtts_s: Round trips of pings.
    """

    up_bytes: int = 0
    down_bytes: int = 0
    num_steps: int = 0
    num_results: int = 0
    server_s: float = 0.0
    rtts_s: list[float] = dataclasses.field(default_factory=list)


class Remote:
    """One session over as many streams as it takes, one at a time.

    Invariant: there is a stream only between an `open` that returned and a `Lost` event or
    `close`; a step is sent only while there is credit.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        token: str,
        hello: messages.Hello,
        knobs: settings.ClientSection,
        on_event: Callable[[Event], None],
    ) -> None:
        """Makes a session that is not yet open.

        Args:
            channel: To the gateway.
            token: Opens it.
            hello: What is asked for; `resume` is filled in here.
            knobs: Timeouts and limits.
            on_event: Told what arrives.
        """
        self._channel = channel
        self._token = token
        self._hello = hello
        self._knobs = knobs
        self._on_event = on_event
        self._welcome: messages.Welcome | None = None
        self._stream: transport.ClientStream | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._clear()
        self.traffic = Traffic()

    def _clear(self) -> None:
        self._outbox = outbox.Outbox()
        self._pending: collections.deque[outbox.Entry] = collections.deque()
        self._credits = 0
        self._next_step = 1
        self._received = 0
        self._truncating: asyncio.Future[None] | None = None
        self._closed = asyncio.Event()
        self._heard_s = time.monotonic()

    @property
    def is_open(self) -> bool:
        """Whether there is a stream."""
        return self._stream is not None

    @property
    def num_pending(self) -> int:
        """Steps that wait for credit."""
        return len(self._pending)

    @property
    def welcome(self) -> messages.Welcome:
        """What the gateway granted."""
        assert self._welcome is not None
        return self._welcome

    async def open(self, *, position: int = 0, renewed: messages.Hello | None = None) -> int:
        """Opens the session, or opens it again.

        Args:
            position: Rows [0, position) whose results are here.
            renewed: Begin another session, and ask for this.

        Returns:
            Where the next rows begin.

        Raises:
            RefusedError: The gateway refuses.
            SplitError: It cannot be reached, or does not answer in time.
        """
        await self._drop()
        if renewed is not None:
            self._hello, self._welcome = renewed, None
        stream = transport.open_stream(self._channel, transport.SESSION, self._token)
        try:
            async with asyncio.timeout(self._knobs.connect_timeout_s):
                self._welcome = await self._shake_hands(stream, position)
        except TimeoutError as error:
            stream.cancel()
            raise errors.SplitError(
                Code.LINK,
                f"the gateway did not answer in {self._knobs.connect_timeout_s:g} s",
                retryable=True,
            ) from error
        except transport.StreamLostError as error:
            raise errors.SplitError(Code.LINK, str(error), retryable=True) from error
        except BaseException:
            stream.cancel()
            raise
        self._begin(stream, self._welcome)
        return self._welcome.position

    def send(
        self,
        position: int,
        *,
        token_ids: tuple[int, ...] | None = None,
        hidden: Float[np.ndarray, "n D"] | None = None,
    ) -> None:
        """Sends rows as soon as there is credit; nothing while there is no stream."""
        if self._stream is None:
            return
        if hidden is None:
            ids = token_ids or ()
            for begin in range(0, len(ids), self.welcome.max_rows):
                part = ids[begin : begin + self.welcome.max_rows]
                step = messages.Tok(step=1, position=position + begin, token_ids=part)
                self._pending.append(outbox.Entry(message=step))
        else:
            for begin in range(0, len(hidden), self.welcome.max_rows):
                rows = hidden[begin : begin + self.welcome.max_rows]
                self._pending.append(self._act(position + begin, rows))
        self._send_pending()

    async def truncate(self, position: int) -> None:
        """Rolls the session back; results of rows at and after the position come no more.

        Raises:
            SplitError: The stream is lost, or the gateway refuses.
        """
        if self._stream is None:
            raise errors.SplitError(Code.LINK, "there is no stream", retryable=True)
        kept = [e for e in self._pending if _position(e) < position]
        self._pending = collections.deque(kept)
        self._truncating = asyncio.get_running_loop().create_future()
        self._pending.append(outbox.Entry(message=messages.Trunc(step=1, position=position)))
        self._send_pending()
        await self._truncating

    async def close(self, reason: str = "done") -> None:
        """Ends the session, waiting a little for the gateway to say that it did."""
        stream, self._stream = self._stream, None
        if stream is None:
            await self._drop()
            return
        self._outbox.close(messages.Close(reason=reason))
        # If the gateway does not hear it, the lease ends the session.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._knobs.connect_timeout_s):
                await self._closed.wait()
        stream.cancel()
        await self._drop()

    async def _drop(self) -> None:
        stream, self._stream = self._stream, None
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if stream is not None:
            stream.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _shake_hands(self, stream: transport.ClientStream, position: int) -> messages.Welcome:
        resume = None
        if self._welcome is not None:
            resume = messages.Resume(
                session_id=self._welcome.session_id,
                token=self._welcome.token,
                epoch=self._welcome.epoch,
                position=position,
            )
        hello = msgspec.structs.replace(self._hello, resume=resume)
        frame = messages.to_frame(hello)
        self.traffic.up_bytes += len(frame)
        await stream.write(frame)
        data = await stream.read()
        if data is None:
            raise transport.StreamLostError("the gateway ended the stream without an answer")
        self.traffic.down_bytes += len(data)
        try:
            message, _ = messages.from_frame(data, self._knobs.frame_limits)
        except frames.FrameError as error:
            raise errors.SplitError(Code.BAD_FRAME, str(error), retryable=True) from error
        if isinstance(message, messages.Reject):
            raise errors.RefusedError(
                message.code, message.reason, retry_after_s=message.retry_after_s
            )
        if not isinstance(message, messages.Welcome):
            raise errors.SplitError(
                Code.PROTOCOL, f"the gateway answers Hello with {type(message).__name__}"
            )
        return message

    def _begin(self, stream: transport.ClientStream, welcome: messages.Welcome) -> None:
        self._clear()
        self._stream = stream
        self._credits = welcome.credits
        self._received = welcome.position
        self._tasks = [
            asyncio.create_task(self._read(stream)),
            asyncio.create_task(self._write(stream)),
            asyncio.create_task(self._beat()),
        ]

    def _act(self, position: int, rows: Float[np.ndarray, "n D"]) -> outbox.Entry:
        message = messages.Act(
            step=1,
            border=self._hello.start,
            position=position,
            num_rows=len(rows),
            width=self._hello.identity.hidden_size,
            codec=self.welcome.codec,
        )
        return outbox.Entry(message=message, hidden=rows)

    def _send_pending(self) -> None:
        while self._credits and self._pending:
            entry = self._pending.popleft()
            assert isinstance(entry.message, messages.Act | messages.Tok | messages.Trunc)
            message = msgspec.structs.replace(entry.message, step=self._next_step)
            self._outbox.put(message, entry.hidden)
            self._next_step += 1
            self._credits -= 1
            self.traffic.num_steps += 1

    def _lose(self, error: errors.SplitError) -> None:
        """Says once that the stream is lost."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        stream.cancel()
        if self._truncating is not None and not self._truncating.done():
            self._truncating.set_exception(error)
        self._on_event(Lost(error=error))

    async def _read(self, stream: transport.ClientStream) -> None:
        try:
            while (data := await stream.read()) is not None:
                self.traffic.down_bytes += len(data)
                await self._take(data)
                self._heard_s = time.monotonic()
            self._lose(errors.SplitError(Code.LINK, "the gateway ended the stream", retryable=True))
        except transport.StreamLostError as error:
            self._lose(errors.SplitError(Code.LINK, str(error), retryable=True))
        except (frames.FrameError, codecs.CodecError) as error:
            self._lose(errors.SplitError(Code.BAD_FRAME, str(error), retryable=True))
        except errors.SplitError as error:
            self._lose(error)
        finally:
            self._closed.set()

    async def _take(self, data: bytes) -> None:
        message, payload = messages.from_frame(data, self._knobs.frame_limits)
        match message:
            case messages.Act():
                self._add_credits(message.credits)
                await self._take_rows(message, payload)
            case messages.Tok():
                self._add_credits(message.credits)
                if self._truncating is None:
                    self._result(Arrived(message=message))
            case messages.Trunc():
                if self._truncating is not None and not self._truncating.done():
                    self._truncating.set_result(None)
                    self._received = min(self._received, message.position)
                    self._truncating = None
            case messages.Credit():
                self._add_credits(message.steps)
                self._on_event(Credited())
            case messages.Pong():
                self.traffic.rtts_s.append(time.monotonic() - message.sent_s)
            case messages.Err():
                raise errors.SplitError(message.code, message.detail, retryable=message.retryable)
            case messages.Close():
                pass  # the stream ends next
            case _:
                raise errors.SplitError(
                    Code.PROTOCOL, f"{type(message).__name__} is nothing that a gateway says here"
                )

    def _add_credits(self, steps: int) -> None:
        self._credits += steps
        self._send_pending()

    async def _take_rows(self, message: messages.Act, payload: bytes) -> None:
        identity = self._hello.identity
        wanted = (self._hello.stop, identity.hidden_size, self.welcome.codec)
        if (message.border, message.width, message.codec) != wanted:
            raise errors.SplitError(
                Code.BAD_ACT,
                f"the gateway sent rows for layer {message.border}, {message.width} wide, in "
                f"{message.codec}; {wanted[0]}, {wanted[1]} and {wanted[2]} were agreed on",
            )
        end = message.position + message.num_rows
        if self._truncating is not None or end <= self._received:
            return  # forgotten, or sent again
        if message.position != self._received:
            raise errors.SplitError(
                Code.BAD_STEP,
                f"rows from {message.position} came; those from {self._received} are due",
                retryable=True,
            )
        hidden = await outbox.decode(message, payload, dtype=identity.hidden_dtype)
        self._received = end
        self._result(Arrived(message=message, hidden=hidden))

    def _result(self, arrived: Arrived) -> None:
        self.traffic.num_results += 1
        self.traffic.server_s += arrived.message.server_s
        self._on_event(arrived)

    async def _write(self, stream: transport.ClientStream) -> None:
        box = self._outbox
        try:
            while not box.is_done:
                self.traffic.up_bytes += await box.write_next(
                    stream, timeout_s=self._knobs.step_timeout_s
                )
        except transport.StreamLostError as error:
            # If the stream is over, its reader learns more of why.
            await asyncio.wait(self._tasks[:1], timeout=_READER_S)
            self._lose(errors.SplitError(Code.LINK, str(error), retryable=True))
        except codecs.CodecError as error:
            # The stream itself is well, and will carry the end of the session.
            failure = errors.SplitError(Code.BAD_ACT, f"this end's {error}")
            self._on_event(Lost(error=failure))
            await self._write(stream)

    async def _beat(self) -> None:
        """Pings; an end that is silent for two heartbeats is gone."""
        heartbeat_s = self.welcome.heartbeat_s
        while True:
            self._outbox.put(messages.Ping(sent_s=time.monotonic()))
            await asyncio.sleep(heartbeat_s)
            silent_s = time.monotonic() - self._heard_s
            if silent_s >= 2 * heartbeat_s:
                self._lose(
                    errors.SplitError(
                        Code.LINK,
                        f"nothing was heard of the gateway for {silent_s:.1f} s",
                        retryable=True,
                    )
                )
                return


def _position(entry: outbox.Entry) -> int:
    assert isinstance(entry.message, messages.Act | messages.Tok | messages.Trunc)
    return entry.message.position
