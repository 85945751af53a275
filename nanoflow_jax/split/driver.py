"""Generates the tokens of one request over the client's pieces and the server's."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from nanoflow_jax import request
from nanoflow_jax.split import (
    attempts,
    engine_thread,
    errors,
    interface,
    link,
    messages,
    remote,
    report,
    settings,
)
from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split.messages import Code

OnTokens = Callable[[Sequence[int]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be generated, and where.

    Attributes:
        request_id: Unique among the client's requests.
        prompt_ids: At least one.
        params: How to draw; `n` is 1, and `seed` is set unless it is greedy.
        max_len: Most positions, the prompt's included.
        cut: Who runs which layers.
        promise: What was predicted.
        on_tokens: Told new tokens as they come.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: request.SamplingParams
    max_len: int
    cut: cut_lib.Cut
    promise: report.Promise
    on_tokens: OnTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished request.

    Attributes:
        token_ids: Drawn tokens.
        logprobs: One entry per token, where asked for.
        finish_reason: Why it ended.
        report: How it was served.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[request.TokenLogprobs, ...]
    finish_reason: request.FinishReason
    report: report.Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FromFront:
    output: interface.PieceOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FromBack:
    output: interface.PieceOutput


_Event = remote.Event | _FromFront | _FromBack


class Driver:
    """One request: the tokens that are known, and how far each part has come with them.

    With `known` the prompt and all drawn tokens, a row passes the client's front, the server and
    the client's back, where they exist:

        back_fed <= received <= sent = front_emitted <= front_fed <= len(known)

    A lost stream is taken up again where both ends agree; if the server has forgotten the session
    it is told all known tokens anew. The client's own parts stay as they are.
    """

    def __init__(
        self,
        order: Order,
        *,
        engine: engine_thread.EngineThread | None,
        make_remote: Callable[[messages.Hello, Callable[[remote.Event], None]], remote.Remote],
        make_hello: Callable[[Order], messages.Hello],
        knobs: settings.ClientSection,
    ) -> None:
        """Makes a driver that has not begun.

        Args:
            order: What to generate.
            engine: Runs the client's layers, if it has any.
            make_remote: A session from its greeting, and what to tell of it.
            make_hello: The greeting of an order.
            knobs: Chunks, timeouts, attempts.
        """
        self._order = order
        self._engine = engine
        self._make_hello = make_hello
        self._knobs = knobs
        self._known = list(order.prompt_ids)
        self._logprobs: list[request.TokenLogprobs] = []
        self._finish: request.FinishReason | None = None
        self._front_fed = 0
        self._front_emitted = 0
        self._sent = 0
        self._received = 0
        self._back_fed = 0
        # Tokens that the server draws after: the prompt, and after a replay all that it was told.
        self._told = len(self._known)
        self._events: collections.deque[_Event] = collections.deque()
        self._woken = asyncio.Event()
        self._attempts = attempts.Attempts(knobs)
        self._record = report.Record(begun_s=time.monotonic(), client_begun_s=self._client_busy_s)
        self._remote = make_remote(self._make_hello(order), self._on_event)

    @property
    def num_drawn(self) -> int:
        """Tokens that are there."""
        return len(self._known) - len(self._order.prompt_ids)

    def describe_link(self) -> str:
        """What was measured of the link, and promised, in words."""
        measured = link.percentile(self._remote.traffic.rtts_s, 0.5)
        promised = self._order.promise.rtt_s
        words = "no ping came back" if measured is None else f"round trip {measured * 1e3:.1f} ms"
        return words if promised is None else f"{words}, {promised * 1e3:.1f} ms promised"

    @property
    def _client_busy_s(self) -> float:
        return 0.0 if self._engine is None else self._engine.busy_s

    async def run(self) -> Generation:
        """Generates to the end.

        Raises:
            SplitError: It failed; nothing of it is left open.
            ValueError: The client's engine refuses it.
        """
        try:
            await self._open_pieces()
            await self._connect(self._remote.open)
            while self._finish is None:
                self._advance()
                await self._handle(await self._next_event())
        except BaseException:
            await self._end("the client gives up")
            raise
        await self._end("done")
        traffic, codec = self._remote.traffic, self._remote.welcome.codec
        return Generation(
            token_ids=tuple(self._known[len(self._order.prompt_ids) :]),
            logprobs=tuple(self._logprobs),
            finish_reason=self._finish,
            report=self._record.report(
                self._order.cut,
                codec,
                self._order.promise,
                traffic,
                client_busy_s=self._client_busy_s,
            ),
        )

    async def _open_pieces(self) -> None:
        cut = self._order.cut
        if cut.front is not None:
            await self._pieces.open(
                self._piece("front", cut.front),
                lambda output: self._on_event(_FromFront(output=output)),
            )
        if cut.back is not None:
            await self._pieces.open(
                self._piece("back", cut.back),
                lambda output: self._on_event(_FromBack(output=output)),
            )

    async def _end(self, reason: str) -> None:
        for name in ("front", "back"):
            if self._engine is not None:
                self._engine.close_piece(self._piece_id(name))
        await self._remote.close(reason)

    @property
    def _pieces(self) -> engine_thread.EngineThread:
        assert self._engine is not None
        return self._engine

    def _piece_id(self, name: str) -> str:
        return f"{self._order.request_id}/{name}"

    def _piece(self, name: str, layers: tuple[int, int]) -> interface.Piece:
        return interface.Piece(
            piece_id=self._piece_id(name),
            start=layers[0],
            stop=layers[1],
            params=self._order.params,
            prompt_len=len(self._order.prompt_ids),
            max_len=self._order.max_len,
        )

    def _on_event(self, event: _Event) -> None:
        self._events.append(event)
        self._woken.set()

    async def _next_event(self) -> _Event:
        timeout_s = self._knobs.step_timeout_s if self._awaits_server else None
        try:
            async with asyncio.timeout(timeout_s):
                while not self._events:
                    self._woken.clear()
                    await self._woken.wait()
        except TimeoutError:
            return remote.Lost(
                error=errors.SplitError(
                    Code.LINK,
                    f"the server gave no result for {self._knobs.step_timeout_s:g} s",
                    retryable=True,
                )
            )
        return self._events.popleft()

    @property
    def _awaits_server(self) -> bool:
        if self._remote.num_pending:
            return True
        if self._order.cut.server_draws:
            return self._sent >= self._num_to_send
        return self._sent > self._received

    @property
    def _num_to_send(self) -> int:
        return self._told if self._order.cut.is_all_server else len(self._known)

    def _advance(self) -> None:
        """Starts what can be started: rows travel in chunks, and a few chunks ahead."""
        chunk_len = self._knobs.chunk_len
        while self._remote.num_pending < self._knobs.chunks_ahead:
            if self._order.cut.front is None:
                begin, limit = self._sent, self._num_to_send
            else:
                ahead = self._front_emitted + self._knobs.chunks_ahead * chunk_len
                begin, limit = self._front_fed, min(len(self._known), ahead)
            ids = tuple(self._known[begin : min(limit, begin + chunk_len)])
            if not ids:
                return
            if self._order.cut.front is None:
                self._remote.send(begin, token_ids=ids)
                self._sent += len(ids)
            else:
                self._pieces.feed(self._piece_id("front"), begin, token_ids=ids)
                self._front_fed += len(ids)

    async def _handle(self, event: _Event) -> None:
        match event:
            case _FromFront(output=output):
                self._send_rows(output)
            case _FromBack(output=output):
                self._check_output(output)
                self._draw(output)
            case remote.Arrived(message=messages.Tok() as message):
                self._attempts.succeeded()
                self._draw(message)
            case remote.Arrived(message=message, hidden=hidden):
                assert hidden is not None
                self._attempts.succeeded()
                self._feed_back(message.position, hidden)
            case remote.Credited():
                pass  # what follows may be sent
            case remote.Lost(error=error):
                await self._recover(error)

    def _send_rows(self, output: interface.PieceOutput) -> None:
        self._check_output(output)
        assert output.hidden is not None
        if output.position != self._front_emitted:
            raise errors.SplitError(
                Code.ENGINE,
                f"the client's engine gave rows from {output.position}; those from "
                f"{self._front_emitted} are due",
            )
        self._front_emitted += len(output.hidden)
        self._sent = self._front_emitted
        self._remote.send(output.position, hidden=output.hidden)

    def _check_output(self, output: interface.PieceOutput) -> None:
        if output.error is not None:
            raise errors.SplitError(Code.ENGINE, f"the client's engine: {output.error}")

    def _feed_back(self, position: int, hidden: np.ndarray) -> None:
        self._received = position + len(hidden)
        known = max(0, self._back_fed - position)  # told again after a replay
        if known < len(hidden):
            self._pieces.feed(self._piece_id("back"), position + known, hidden=hidden[known:])
            self._back_fed = self._received

    def _draw(self, drawn: interface.PieceOutput | messages.Tok) -> None:
        """Takes drawn tokens in; those that are known already must be the same."""
        new = []
        for place, token in enumerate(drawn.token_ids, drawn.position + 1):
            if place < len(self._known) and self._known[place] == token:
                continue
            if place != len(self._known):
                raise errors.SplitError(
                    Code.ENGINE,
                    f"token {token} was drawn for position {place}, where "
                    f"{self._known[place : place + 1] or 'nothing'} stands",
                )
            self._known.append(token)
            self._record.drew(
                server_s=self._remote.traffic.server_s, client_busy_s=self._client_busy_s
            )
            new.append(token)
        if new:
            self._logprobs.extend(drawn.logprobs[-len(new) :])
            self._order.on_tokens(new)
        self._finish = drawn.finish_reason

    async def _recover(self, error: errors.SplitError) -> None:
        """Takes a lost session up again.

        Raises:
            SplitError: It cannot be, or was lost too often.
        """
        if not error.retryable:
            raise error
        await self._back_off(error)
        try:
            position = self._received
            if self._order.cut.server_draws:
                position = len(self._known) - 1
            await self._connect(lambda: self._remote.open(position=position))
            self._record.num_resumes += 1
        except errors.RefusedError as refusal:
            if refusal.code not in (Code.EPOCH, Code.SESSION):
                raise
            hello = self._make_hello(self._replayed(refusal))
            await self._connect(lambda: self._remote.open(renewed=hello))
            self._told = len(self._known)
            self._record.num_replays += 1
        await self._rewind(self._remote.welcome.position)

    async def _connect(self, attempt: Callable[[], Awaitable[int]]) -> None:
        """Tries until the gateway takes the session.

        Raises:
            SplitError: It refuses, or cannot be reached so often.
        """
        while True:
            try:
                await attempt()
                return
            except errors.RefusedError as refusal:
                if refusal.retry_after_s is None:
                    raise
                await self._back_off(refusal, at_least_s=refusal.retry_after_s)
            except errors.SplitError as error:
                if not error.retryable:
                    raise
                await self._back_off(error)

    async def _back_off(self, error: errors.SplitError, *, at_least_s: float = 0.0) -> None:
        """Waits, longer each time, unless it was too often since something arrived.

        Raises:
            SplitError: It was.
        """
        note = f"{self.num_drawn} tokens drawn"
        await self._attempts.failed(error, note=note, at_least_s=at_least_s)

    def _replayed(self, refusal: errors.RefusedError) -> Order:
        """The order with all known tokens as its prompt.

        Raises:
            SplitError: The server would draw otherwise than before.
        """
        order, params = self._order, self._order.params
        if not order.cut.server_draws or not self.num_drawn:
            return dataclasses.replace(order, prompt_ids=tuple(self._known))
        if params.uses_penalties or params.bad_words or params.grammar is not None:
            raise errors.SplitError(
                refusal.code,
                f"{refusal.detail}; penalties, bad_words and grammars depend on which tokens were "
                "drawn, which a new session would not know",
            ) from refusal
        if params.max_tokens is not None:
            params = dataclasses.replace(
                params,
                max_tokens=params.max_tokens - self.num_drawn,
                min_tokens=max(0, params.min_tokens - self.num_drawn),
            )
        return dataclasses.replace(order, prompt_ids=tuple(self._known), params=params)

    async def _rewind(self, position: int) -> None:
        """Goes back to where the server is."""
        self._sent = self._received = position
        if self._order.cut.front is not None and self._front_fed > position:
            try:
                await self._pieces.truncate(self._piece_id("front"), position)
            except ValueError as error:
                raise errors.SplitError(Code.ENGINE, f"the client's engine: {error}") from error
            kept = [event for event in self._events if not isinstance(event, _FromFront)]
            self._events = collections.deque(kept)
            self._front_fed = self._front_emitted = position
