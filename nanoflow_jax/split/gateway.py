"""A server of split sessions in front of a piece engine."""

import asyncio
import collections
import contextlib
import dataclasses
import hmac
import importlib.metadata
import logging
import secrets
from collections.abc import AsyncIterator, Iterable

import grpc.aio

from nanoflow_jax.serve import keys as keys_lib
from nanoflow_jax.split import (
    budget,
    codecs,
    conversation,
    engine_thread,
    errors,
    frames,
    handshake,
    interface,
    messages,
    settings,
    transport,
)
from nanoflow_jax.split import session as session_lib
from nanoflow_jax.split.messages import Code
from nanoflow_jax.split.weights import giver, pace

_LOG = logging.getLogger(__name__)
_MAX_PROBES = 64


@dataclasses.dataclass(kw_only=True)
class _Held:
    """A session, its client's stream if there is one, its lease if there is none."""

    session: session_lib.Session
    talk: conversation.Conversation | None = None
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
        host: engine_thread.Host | None = None,
        codecs_taken: Iterable[codecs.Codec] = tuple(codecs.Codec),
        weights: giver.Giver | None = None,
    ) -> None:
        """Makes a gateway.

        Args:
            engine: Runs pieces; the gateway's thread alone touches it.
            identity: The engine's model.
            limits: What sessions are granted.
            keys: Open it; without one it is open to all.
            borders: Where sessions may enter and leave; None for every layer.
            host: Runs the engine, if others use it too.
            codecs_taken: How hidden states may be written.
            weights: What clients are given of the model, if anything.
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
        self._engine = engine_thread.EngineThread(engine, host, patience_s=limits.patience_s)
        self._waiting = budget.ByteBudget(limits.max_waiting_bytes)
        self._held: dict[str, _Held] = {}
        self._weights = weights
        self._turn = pace.Pace(limits.busy_fetch_bytes_per_s, lambda: bool(self._held))
        self._is_draining = False
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

    def drain(self) -> None:
        """Opens no more sessions; those that are open go on, and may be resumed."""
        self._is_draining = True

    def check(self) -> None:
        """Raises if the invariant is broken."""
        for held in self._held.values():
            assert (held.talk is None) != (held.lease is None)
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
                {
                    transport.SESSION: self._serve,
                    transport.PROBE: self._probe,
                    transport.TRIAL: self._try,
                    transport.WEIGHTS: self._give,
                },
                max_frame_bytes=self._limits.frame_limits.frame_bytes,
            )
            try:
                yield self
            finally:
                await self._stop(server)

    async def _stop(self, server: grpc.aio.Server) -> None:
        self._is_stopping = True
        for held in list(self._held.values()):
            if held.talk is None:
                self._release(held)
            else:
                held.talk.fail(
                    errors.SplitError(Code.SHUTDOWN, "the server is stopping", retryable=True)
                )
        await server.stop(grace=1.0)
        for held in list(self._held.values()):
            self._release(held)

    async def _serve(self, stream: transport.ServerStream) -> None:
        """One stream of a session, from its greeting to its end."""
        talk = conversation.Conversation(stream, limits=self._limits, counts=self.counts)
        try:
            held, welcome = await self._greet(stream, talk)
        except errors.RefusedError as error:
            self.counts[f"refused: {error.code}"] += 1
            with contextlib.suppress(transport.StreamLostError):
                await stream.write(messages.to_frame(error.reject()))
            return
        except transport.StreamLostError:
            return
        await talk.run(
            held.session, welcome, settle=lambda ending: self._settle(held, talk, ending)
        )

    async def _greet(
        self, stream: transport.ServerStream, talk: conversation.Conversation
    ) -> tuple[_Held, messages.Welcome]:
        hello = await self._hello(stream)
        codec = handshake.check_hello(hello, self._terms)
        if self._is_stopping:
            raise self._later(Code.SHUTDOWN, "the server is stopping")
        if hello.resume is not None:
            return await self._resume(hello, hello.resume, talk)
        if self._is_draining:
            raise self._later(Code.SHUTDOWN, "the server is about to stop and opens no sessions")
        return await self._open(hello, codec, talk)

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
            self._check_key(stream)
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
        self, hello: messages.Hello, codec: codecs.Codec, talk: conversation.Conversation
    ) -> tuple[_Held, messages.Welcome]:
        if len(self._held) >= self._limits.max_sessions:
            raise self._later(
                Code.OVERLOADED, f"{len(self._held)} sessions are open; no more are taken"
            )
        session_id = secrets.token_hex(8)
        session = self._session(hello, codec, session_id)
        held = self._held[session_id] = _Held(session=session, talk=talk)
        try:
            await session.open()
        except ValueError as error:
            del self._held[session_id]
            raise errors.RefusedError(Code.REFUSED, str(error)) from error
        except BaseException:
            self._release(held)
            raise
        session.attach(talk.outbox)
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
        self, hello: messages.Hello, resume: messages.Resume, talk: conversation.Conversation
    ) -> tuple[_Held, messages.Welcome]:
        held = self._find(hello, resume)
        async with held.session.lock:
            if self._held.get(resume.session_id) is not held:
                raise _unknown(resume.session_id)
            if held.talk is not None:
                held.talk.end(keep=True, why="its client came back on another stream")
            if held.lease is not None:
                held.lease.cancel()
            held.talk, held.lease = talk, None
            try:
                position = await held.session.resume(resume.position, talk.outbox)
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

    def _offer(self) -> messages.Offer:
        return messages.Offer(
            build=importlib.metadata.version("nanoflow_jax"),
            borders=tuple(sorted(self._terms.borders)),
            max_rows=self._limits.max_rows,
            max_len=self._limits.max_len,
        )

    def _later(self, code: Code, reason: str) -> errors.RefusedError:
        return errors.RefusedError(code, reason, retry_after_s=self._limits.retry_after_s)

    def _settle(
        self, held: _Held, talk: conversation.Conversation, ending: conversation.Ending
    ) -> None:
        if held.talk is not talk:
            return  # settled, or gone over to another stream
        _LOG.info("session %s: %s", held.session.grant.session_id, ending.why)
        if ending.keep and not self._is_stopping:
            self.counts["lost"] += 1
            self._suspend(held)
        else:
            self._release(held)

    def _suspend(self, held: _Held) -> None:
        held.talk = None
        held.session.detach()
        loop = asyncio.get_running_loop()
        held.lease = loop.call_later(self._limits.lease_s, self._expire, held)

    def _expire(self, held: _Held) -> None:
        self.counts["expired"] += 1
        self._release(held)

    def _release(self, held: _Held) -> None:
        if held.lease is not None:
            held.lease.cancel()
        held.talk = held.lease = None
        if self._held.pop(held.session.grant.session_id, None) is not None:
            self.counts["closed"] += 1
        held.session.release()

    def _fail(self, session: session_lib.Session, error: errors.SplitError) -> None:
        """The engine gave a session up."""
        self.counts[f"failed: {error.code}"] += 1
        held = self._held.get(session.grant.session_id)
        if held is not None and held.talk is not None:
            held.talk.fail(error)
        elif held is not None:
            self._release(held)

    async def _probe(self, stream: transport.ServerStream) -> None:
        """Answers pings and says what it offers, before a client asks for a session."""
        try:
            for _ in range(_MAX_PROBES):
                async with asyncio.timeout(2 * self._limits.heartbeat_s):
                    data = await stream.read()
                if data is None:
                    return
                self._check_key(stream)
                message, _payload = messages.from_frame(data, self._limits.frame_limits)
                if isinstance(message, messages.Ping):
                    size = min(message.answer_bytes, self._limits.max_payload_bytes)
                    answer = messages.to_frame(messages.Pong(sent_s=message.sent_s), bytes(size))
                elif isinstance(message, messages.Ask):
                    answer = messages.to_frame(self._offer())
                else:
                    return
                await stream.write(answer)
        except errors.RefusedError as error:
            await stream.write(messages.to_frame(error.reject()))
        except (transport.StreamLostError, frames.FrameError, TimeoutError) as error:
            _LOG.info("a probe ended: %s", error)

    async def _try(self, stream: transport.ServerStream) -> None:
        """Says whether a session could be opened, and opens none."""
        answer: messages.Close | messages.Reject = messages.Close()
        with contextlib.suppress(transport.StreamLostError):
            try:
                handshake.check_hello(await self._hello(stream), self._terms)
            except errors.RefusedError as error:
                answer = error.reject()
            await stream.write(messages.to_frame(answer))

    async def _give(self, stream: transport.ServerStream) -> None:
        """Gives weights to a client, where that is allowed."""
        await giver.answer(
            stream,
            self._weights,
            check_key=self._check_key,
            turn=self._turn,
            limits=self._limits,
        )


def _unknown(session_id: str) -> errors.RefusedError:
    return errors.RefusedError(
        Code.SESSION, f"session {session_id} is not here: it was closed, or its lease expired"
    )
