"""A server of split sessions in front of a piece engine."""

import asyncio
import collections
import contextlib
import dataclasses
import hmac
import logging
import secrets
from collections.abc import AsyncIterator, Iterable

import grpc.aio

from nanoflow_jax.serve import keys as keys_lib
from nanoflow_jax.split import (
    budget,
    codecs,
    engine_thread,
    errors,
    frames,
    handshake,
    interface,
    messages,
    outbox,
    settings,
    transport,
)
from nanoflow_jax.split import session as session_lib
from nanoflow_jax.split.messages import Code

_LOG = logging.getLogger(__name__)
_MAX_PROBES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ending:
    """How a stream ended.

    Attributes:
        keep: Whether the session waits for its client.
        last: What the client is told, if it still listens.
        why: For the log.
    """

    keep: bool
    last: messages.Message | None
    why: str


class _Attachment:
    """A client's stream on a session."""

    def __init__(self) -> None:
        self.outbox = outbox.Outbox()
        self.ended: asyncio.Future[_Ending] = asyncio.get_running_loop().create_future()
        self.heard_s = asyncio.get_running_loop().time()
        self.is_reading = True

    def end(self, *, keep: bool, why: str, last: messages.Message | None = None) -> None:
        """Says how the stream ends; the first to say so is right."""
        if not self.ended.done():
            self.ended.set_result(_Ending(keep=keep, last=last, why=why))

    def fail(self, error: errors.SplitError) -> None:
        """Ends the stream with an error; the session is kept if it may be retried."""
        last = messages.Err(code=error.code, detail=error.detail[:4096], retryable=error.retryable)
        self.end(keep=error.retryable, why=str(error), last=last)

    def look_at(self, task: asyncio.Task[None]) -> None:
        """Ends the stream if one of its tasks failed in a way that nobody thought of."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("a stream failed", exc_info=error)
            self.fail(errors.SplitError(Code.ENGINE, f"the gateway failed: {error!r}"))


@dataclasses.dataclass(kw_only=True)
class _Held:
    """A session, its client's stream if there is one, its lease if there is none."""

    session: session_lib.Session
    attachment: _Attachment | None = None
    lease: asyncio.TimerHandle | None = None


class Gateway:
    """Opens sessions, keeps those whose clients are lost for a while, and frees the rest.

    Invariant: each session has a stream or a lease; a piece is open only for a session.

    Attributes:
        epoch: Sessions do not outlive it.
        port: Where it listens, once started.
        counts: What happened, by name: opened, resumed, closed, expired, lost; and failures and
            refusals by code.
    """

    def __init__(
        self,
        engine: interface.PieceEngine,
        identity: messages.Identity,
        *,
        limits: settings.GatewaySection,
        keys: keys_lib.ApiKeys,
        borders: Iterable[int] | None = None,
        codecs_taken: Iterable[codecs.Codec] = tuple(codecs.Codec),
    ) -> None:
        """Makes a gateway.

        Args:
            engine: Runs pieces; the gateway's thread alone touches it.
            identity: The engine's model.
            limits: What sessions are granted.
            keys: Open it; without one it is open to all.
            borders: Where sessions may enter and leave; None for every layer.
            codecs_taken: How hidden states may be written.
        """
        every = range(identity.num_layers + 1)
        self._terms = handshake.Terms(
            identity=identity,
            borders=frozenset(every if borders is None else (0, *borders, identity.num_layers)),
            codecs=tuple(codecs_taken),
            settings=limits,
        )
        self._limits = limits
        self._keys = keys
        self._engine = engine_thread.EngineThread(engine)
        self._waiting = budget.ByteBudget(limits.max_waiting_bytes)
        self._held: dict[str, _Held] = {}
        self._is_stopping = False
        self.epoch = secrets.token_hex(8)
        self.counts: collections.Counter[str] = collections.Counter()
        self.port = 0

    @property
    def num_sessions(self) -> int:
        """Open ones, those that wait for their client included."""
        return len(self._held)

    @property
    def waiting_bytes(self) -> int:
        """Of rows that wait for the engine."""
        return self._waiting.taken_bytes

    def check(self) -> None:
        """Raises if the invariant is broken."""
        for held in self._held.values():
            assert (held.attachment is None) != (held.lease is None)
            held.session.check()

    @contextlib.asynccontextmanager
    async def serving(self, endpoint: transport.Endpoint) -> AsyncIterator["Gateway"]:
        """Serves until left; then all sessions are told, and end.

        Raises:
            ValueError: TLS files cannot be read, or the port cannot be had.
        """
        async with self._engine:
            server, self.port = await transport.listen(
                endpoint,
                {transport.SESSION: self._serve, transport.PROBE: self._probe},
                max_frame_bytes=self._limits.frame_limits.frame_bytes,
            )
            try:
                yield self
            finally:
                await self._stop(server)

    async def _stop(self, server: grpc.aio.Server) -> None:
        self._is_stopping = True
        for held in list(self._held.values()):
            if held.attachment is None:
                self._release(held)
            else:
                held.attachment.fail(
                    errors.SplitError(Code.SHUTDOWN, "the server is stopping", retryable=True)
                )
        await server.stop(grace=1.0)
        for held in list(self._held.values()):
            self._release(held)

    async def _serve(self, stream: transport.ServerStream) -> None:
        """One stream of a session, from its greeting to its end."""
        attachment = _Attachment()
        try:
            held, welcome = await self._greet(stream, attachment)
        except errors.RefusedError as error:
            self.counts[f"refused: {error.code}"] += 1
            reject = messages.Reject(
                code=error.code, reason=error.detail[:4096], retry_after_s=error.retry_after_s
            )
            with contextlib.suppress(transport.StreamLostError):
                await stream.write(messages.to_frame(reject))
            return
        except transport.StreamLostError:
            return
        await self._talk(held, attachment, stream, welcome)

    async def _greet(
        self, stream: transport.ServerStream, attachment: _Attachment
    ) -> tuple[_Held, messages.Welcome]:
        self._check_key(stream)
        hello = await self._hello(stream)
        codec = handshake.check_hello(hello, self._terms)
        if self._is_stopping:
            raise self._later(Code.SHUTDOWN, "the server is stopping")
        if hello.resume is not None:
            return await self._resume(hello, hello.resume, attachment)
        return await self._open(hello, codec, attachment)

    def _check_key(self, stream: transport.ServerStream) -> None:
        shown = stream.authorization
        if not self._keys.open_to(None if shown is None else shown.encode()):
            raise errors.RefusedError(
                Code.UNAUTHORIZED,
                "no token was shown" if shown is None else "the token is not one of the server's",
            )

    async def _hello(self, stream: transport.ServerStream) -> messages.Hello:
        patience_s = 2 * self._limits.heartbeat_s
        try:
            async with asyncio.timeout(patience_s):
                data = await stream.read()
            if data is None:
                raise transport.StreamLostError("the client left without a word")
            message, _ = messages.from_frame(data, self._limits.frame_limits)
        except TimeoutError as error:
            raise errors.RefusedError(
                Code.PROTOCOL, f"no Hello came for {patience_s:g} s"
            ) from error
        except frames.FrameError as error:
            raise errors.RefusedError(Code.BAD_FRAME, str(error)) from error
        if not isinstance(message, messages.Hello):
            raise errors.RefusedError(
                Code.PROTOCOL, f"a stream begins with Hello; {type(message).__name__} came"
            )
        return message

    async def _open(
        self, hello: messages.Hello, codec: codecs.Codec, attachment: _Attachment
    ) -> tuple[_Held, messages.Welcome]:
        if len(self._held) >= self._limits.max_sessions:
            raise self._later(
                Code.OVERLOADED, f"{len(self._held)} sessions are open; no more are taken"
            )
        session_id = secrets.token_hex(8)
        session = self._session(hello, codec, session_id)
        held = self._held[session_id] = _Held(session=session, attachment=attachment)
        try:
            await session.open()
        except ValueError as error:
            del self._held[session_id]
            raise errors.RefusedError(Code.REFUSED, str(error)) from error
        except BaseException:
            self._release(held)
            raise
        session.attach(attachment.outbox)
        self.counts["opened"] += 1
        return held, self._welcome(session, 0)

    def _session(
        self, hello: messages.Hello, codec: codecs.Codec, session_id: str
    ) -> session_lib.Session:
        grant = session_lib.Grant(
            session_id=session_id,
            token=secrets.token_hex(16),
            piece=interface.Piece(
                piece_id=session_id,
                start=hello.start,
                stop=hello.stop,
                params=hello.params,
                prompt_len=hello.prompt_len,
                max_len=hello.max_len,
            ),
            identity=self._terms.identity,
            codec=codec,
        )
        return session_lib.Session(
            grant,
            engine=self._engine,
            limits=self._limits,
            waiting=self._waiting,
            on_failure=self._fail,
        )

    async def _resume(
        self, hello: messages.Hello, resume: messages.Resume, attachment: _Attachment
    ) -> tuple[_Held, messages.Welcome]:
        held = self._find(hello, resume)
        async with held.session.lock:
            if self._held.get(resume.session_id) is not held:
                raise _unknown(resume.session_id)
            if held.attachment is not None:
                held.attachment.end(keep=True, why="its client came back on another stream")
            if held.lease is not None:
                held.lease.cancel()
            held.attachment, held.lease = attachment, None
            try:
                position = await held.session.resume(resume.position, attachment.outbox)
            except errors.SplitError as error:
                self._release(held)
                raise errors.RefusedError(Code.SESSION, error.detail) from error
            except BaseException:
                self._suspend(held)
                raise
        self.counts["resumed"] += 1
        return held, self._welcome(held.session, position)

    def _find(self, hello: messages.Hello, resume: messages.Resume) -> _Held:
        if resume.epoch != self.epoch:
            raise errors.RefusedError(
                Code.EPOCH, "the server was started anew since this session; begin another"
            )
        held = self._held.get(resume.session_id)
        if held is None:
            raise _unknown(resume.session_id)
        grant = held.session.grant
        if not hmac.compare_digest(grant.token.encode(), resume.token.encode()):
            raise errors.RefusedError(
                Code.UNAUTHORIZED, f"the resume token is not that of session {resume.session_id}"
            )
        if (hello.start, hello.stop) != (grant.piece.start, grant.piece.stop):
            raise errors.RefusedError(
                Code.LAYERS,
                f"session {resume.session_id} runs [{grant.piece.start}, {grant.piece.stop}); "
                f"[{hello.start}, {hello.stop}) was asked for",
            )
        return held

    def _welcome(self, session: session_lib.Session, position: int) -> messages.Welcome:
        limits = self._limits
        return messages.Welcome(
            session_id=session.grant.session_id,
            token=session.grant.token,
            epoch=self.epoch,
            minor=messages.PROTOCOL_MINOR,
            codec=session.grant.codec,
            credits=limits.credits,
            max_rows=limits.max_rows,
            heartbeat_s=limits.heartbeat_s,
            lease_s=limits.lease_s,
            position=position,
        )

    def _later(self, code: Code, reason: str) -> errors.RefusedError:
        return errors.RefusedError(code, reason, retry_after_s=self._limits.retry_after_s)

    async def _talk(
        self,
        held: _Held,
        attachment: _Attachment,
        stream: transport.ServerStream,
        welcome: messages.Welcome,
    ) -> None:
        """Reads and writes until the stream ends; then the session is kept or freed."""
        writer = asyncio.create_task(self._write(held, attachment, stream, welcome))
        tasks = [
            writer,
            asyncio.create_task(self._read(held, attachment, stream)),
            asyncio.create_task(self._watch(attachment)),
        ]
        for task in tasks:
            task.add_done_callback(attachment.look_at)
        try:
            # Cancelled, this waits no more, but how the stream ended is still to be said.
            ending = await asyncio.shield(attachment.ended)
            self._settle(held, attachment, ending)
            if ending.last is not None:
                attachment.outbox.close(ending.last)
                await asyncio.wait([writer], timeout=self._limits.write_timeout_s)
        finally:
            # gRPC cancels this coroutine when the client is gone.
            attachment.end(keep=True, why="the client is gone")
            self._settle(held, attachment, attachment.ended.result())
            for task in tasks:
                task.cancel()

    def _settle(self, held: _Held, attachment: _Attachment, ending: _Ending) -> None:
        if held.attachment is not attachment:
            return  # settled, or gone over to another stream
        _LOG.info("session %s: %s", held.session.grant.session_id, ending.why)
        if ending.keep and not self._is_stopping:
            self.counts["lost"] += 1
            self._suspend(held)
        else:
            self._release(held)

    def _suspend(self, held: _Held) -> None:
        held.attachment = None
        held.session.detach()
        loop = asyncio.get_running_loop()
        held.lease = loop.call_later(self._limits.lease_s, self._expire, held)

    def _expire(self, held: _Held) -> None:
        self.counts["expired"] += 1
        self._release(held)

    def _release(self, held: _Held) -> None:
        if held.lease is not None:
            held.lease.cancel()
        held.attachment = held.lease = None
        if self._held.pop(held.session.grant.session_id, None) is not None:
            self.counts["closed"] += 1
        held.session.release()

    def _fail(self, session: session_lib.Session, error: errors.SplitError) -> None:
        """The engine gave a session up."""
        self.counts[f"failed: {error.code}"] += 1
        held = self._held.get(session.grant.session_id)
        if held is not None and held.attachment is not None:
            held.attachment.fail(error)
        elif held is not None:
            self._release(held)

    async def _read(
        self, held: _Held, attachment: _Attachment, stream: transport.ServerStream
    ) -> None:
        try:
            while (data := await stream.read()) is not None:
                attachment.is_reading = False
                if await self._take(held, attachment, data):
                    return
                attachment.heard_s = asyncio.get_running_loop().time()
                attachment.is_reading = True
            attachment.end(keep=True, why="the client closed its end without Close")
        except transport.StreamLostError as error:
            attachment.end(keep=True, why=str(error))
        except frames.FrameError as error:
            self.counts[f"failed: {Code.BAD_FRAME}"] += 1
            attachment.fail(errors.SplitError(Code.BAD_FRAME, str(error), retryable=True))
        except errors.SplitError as error:
            self.counts[f"failed: {error.code}"] += 1
            attachment.fail(error)

    async def _take(self, held: _Held, attachment: _Attachment, data: bytes) -> bool:
        """Does what a frame says; whether it is the last one."""
        message, payload = messages.from_frame(data, self._limits.frame_limits)
        match message:
            case messages.Act() | messages.Tok() | messages.Trunc():
                await held.session.receive(message, payload)
            case messages.Ping():
                attachment.outbox.put(messages.Pong(sent_s=message.sent_s))
            case messages.Close():
                attachment.end(keep=False, why="closed", last=messages.Close())
                return True
            case _:
                raise errors.SplitError(
                    Code.PROTOCOL, f"{type(message).__name__} is nothing that a client says here"
                )
        return False

    async def _write(
        self,
        held: _Held,
        attachment: _Attachment,
        stream: transport.ServerStream,
        welcome: messages.Welcome,
    ) -> None:
        box, timeout_s = attachment.outbox, self._limits.write_timeout_s
        try:
            await stream.write(messages.to_frame(welcome))
            while not box.is_done:
                await box.write_next(stream, timeout_s=timeout_s)
                held.session.feed()
        except transport.StreamLostError as error:
            attachment.end(keep=True, why=str(error))
        except codecs.CodecError as error:
            attachment.fail(errors.SplitError(Code.ENGINE, f"the engine's {error}"))
            # What was to be the last message is still to be written.
            with contextlib.suppress(transport.StreamLostError):
                box.close(attachment.ended.result().last or messages.Close())
                await box.write_next(stream, timeout_s=timeout_s)

    async def _watch(self, attachment: _Attachment) -> None:
        """Ends a stream from which nothing was heard for two heartbeats."""
        patience_s = 2 * self._limits.heartbeat_s
        loop = asyncio.get_running_loop()
        while True:
            silent_s = loop.time() - attachment.heard_s if attachment.is_reading else 0.0
            if silent_s >= patience_s:
                attachment.end(keep=True, why=f"nothing was heard for {silent_s:.1f} s")
                return
            await asyncio.sleep(patience_s - silent_s)

    async def _probe(self, stream: transport.ServerStream) -> None:
        """Answers pings, so that a client can measure the link before it asks for a session."""
        try:
            self._check_key(stream)
            for _ in range(_MAX_PROBES):
                async with asyncio.timeout(2 * self._limits.heartbeat_s):
                    data = await stream.read()
                if data is None:
                    return
                message, _payload = messages.from_frame(data, self._limits.frame_limits)
                if not isinstance(message, messages.Ping):
                    return
                size = min(message.answer_bytes, self._limits.max_payload_bytes)
                await stream.write(
                    messages.to_frame(messages.Pong(sent_s=message.sent_s), bytes(size))
                )
        except errors.RefusedError as error:
            reject = messages.Reject(code=error.code, reason=error.detail)
            await stream.write(messages.to_frame(reject))
        except (transport.StreamLostError, frames.FrameError, TimeoutError) as error:
            _LOG.info("a probe ended: %s", error)


def _unknown(session_id: str) -> errors.RefusedError:
    return errors.RefusedError(
        Code.SESSION, f"session {session_id} is not here: it was closed, or its lease expired"
    )
