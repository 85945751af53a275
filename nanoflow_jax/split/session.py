"""One client's session as the gateway holds it: what came, what was computed, what went out."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable

import msgspec
import numpy as np

from nanoflow_jax.split import (
    budget,
    codecs,
    engine_thread,
    errors,
    interface,
    messages,
    outbox,
    settings,
)
from nanoflow_jax.split.messages import Code


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows [position, end) that wait for the engine."""

    position: int
    end: int
    token_ids: tuple[int, ...] | None
    hidden: np.ndarray | None
    num_bytes: int

    def is_answered(self, grant: "Grant") -> bool:
        """Whether a result comes of this one row, so that its credit may come back with it."""
        is_one = self.end - self.position == 1
        return is_one and not (grant.draws and self.end < grant.piece.prompt_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mark:
    """A step whose rows end at `end`, and when it came."""

    step: int
    end: int
    arrived_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grant:
    """What a session was opened with.

    Attributes:
        session_id: Its name, and that of its piece.
        token: Opens it again.
        piece: What the engine runs.
        identity: The model.
        codec: How hidden states are written.
    """

    session_id: str
    token: str
    piece: interface.Piece
    identity: messages.Identity
    codec: codecs.Codec

    @property
    def draws(self) -> bool:
        """Whether tokens leave, and not hidden states."""
        return self.piece.stop == self.identity.num_layers


class Session:
    """Rows [0, emitted) have left, [emitted, fed) are the engine's, [fed, received) wait.

    Rows wait while results wait for the client: a slow reader's rows are not computed. While no
    client is there nothing is fed, hidden states that come are dropped (the client will ask for
    them again), and drawn tokens are kept.

    Invariant: emitted <= fed <= received <= max_len; rows wait only while a client is there.
    """

    def __init__(
        self,
        grant: Grant,
        *,
        engine: engine_thread.EngineThread,
        limits: settings.GatewaySection,
        waiting: budget.ByteBudget,
        on_failure: Callable[["Session", errors.SplitError], None],
    ) -> None:
        """Makes a session whose piece is not yet open.

        Args:
            grant: What it is opened with.
            engine: Runs its piece.
            limits: Of the gateway.
            waiting: Bytes of rows that wait, of all sessions.
            on_failure: Called once if the engine gives it up.
        """
        self.grant = grant
        self.lock = asyncio.Lock()
        self._engine = engine
        self._limits = limits
        self._waiting = waiting
        self._on_failure = on_failure
        self._queue: collections.deque[_Rows] = collections.deque()
        self._marks: collections.deque[_Mark] = collections.deque()
        self._reply: list[outbox.Entry] = []
        self._drawn: list[messages.Tok] = []
        # Ends of rows whose credit comes back with their results.
        self._owed: collections.deque[int] = collections.deque()
        self._outbox: outbox.Outbox | None = None
        self._received = 0
        self._fed = 0
        self._emitted = 0
        self._last_step = 0
        self._under_way = 0
        self._emitted_s = time.monotonic()
        self.is_finished = False

    def check(self) -> None:
        """Raises if the invariant is broken."""
        assert self._emitted <= self._fed <= self._received <= self.grant.piece.max_len
        assert self._outbox is not None or not self._queue

    async def open(self) -> None:
        """Opens its piece.

        Raises:
            ValueError: The engine refuses it.
        """
        await self._engine.open(self.grant.piece, self._on_output)

    def release(self) -> None:
        """Frees all that it holds."""
        self.detach()
        self._engine.close_piece(self.grant.session_id)

    def attach(self, box: outbox.Outbox) -> None:
        """A client is there, and reads from this."""
        self._outbox = box

    def detach(self) -> None:
        """The client is gone: what waited for the engine is forgotten."""
        self._outbox = None
        self._waiting.give(sum(rows.num_bytes for rows in self._queue))
        self._queue.clear()
        self._received = self._fed

    async def resume(self, position: int, box: outbox.Outbox) -> int:
        """The client is back and has the results of rows [0, position); attaches it.

        Returns:
            Where the next rows begin. Where tokens are drawn that is what the engine has, and
            tokens that the client lacks are sent again. Else it is the client's position: rows
            after it are forgotten.

        Raises:
            SplitError: The client has more than it was given, or the engine refuses.
        """
        self.detach()
        if not self.grant.draws:
            if position > self._emitted:
                raise errors.SplitError(
                    Code.SESSION,
                    f"the client has results of {position} rows; {self._emitted} were given",
                )
            await self._rewind(position)
        self._marks.clear()
        self._owed.clear()
        self._reply.clear()
        self._last_step = self._under_way = 0
        self.attach(box)
        for token in self._drawn:
            if token.position >= position:
                box.put(token)
        return self._received

    async def receive(self, message: messages.StepMessage, payload: bytes) -> None:
        """Takes a step; waits while rows of all sessions fill the gateway's memory.

        Raises:
            SplitError: It is not the next step, or not of this session's form.
        """
        if not self._is_next(message.step):
            return
        self._last_step = message.step
        self._reply.clear()
        self._under_way += 1
        if self._under_way > self._limits.credits:
            raise errors.SplitError(
                Code.LIMIT,
                f"step {message.step} came without credit: {self._limits.credits} may be under way",
            )
        if isinstance(message, messages.Trunc):
            await self._truncate(message)
        else:
            await self._take(message, payload)

    def feed(self) -> None:
        """Gives the engine the rows that wait, unless results wait for the client."""
        box = self._outbox
        while box is not None and self._queue and self._has_room(box):
            rows = self._queue.popleft()
            self._fed = rows.end
            if rows.is_answered(self.grant):
                # One row waits as well in the engine; to be told of it would cost a turn of ours.
                self._owed.append(rows.end)
                self._waiting.give(rows.num_bytes)
                self._hand_over(rows, None)
                continue

            def taken(rows: _Rows = rows) -> None:
                self._waiting.give(rows.num_bytes)
                self._return_credit(box)

            self._hand_over(rows, taken)

    def _hand_over(self, rows: _Rows, on_taken: Callable[[], None] | None) -> None:
        self._engine.feed(
            self.grant.session_id,
            rows.position,
            token_ids=rows.token_ids,
            hidden=rows.hidden,
            on_taken=on_taken,
        )

    def _has_room(self, box: outbox.Outbox) -> bool:
        """Whether results that wait, and are on their way from the engine, leave room for more."""
        coming = 0 if self.grant.draws else self._fed - self._emitted
        identity = self.grant.identity
        row_bytes = identity.hidden_size * codecs.HIDDEN_DTYPES[identity.hidden_dtype].itemsize
        return box.num_bytes + coming * row_bytes <= self._limits.max_outbox_bytes

    def _is_next(self, step: int) -> bool:
        """Whether a step is new; the newest one is answered again."""
        if step == self._last_step:
            for entry in self._reply:
                self._put(entry)
        elif step > self._last_step + 1:
            raise errors.SplitError(
                Code.BAD_STEP,
                f"step {step} came after step {self._last_step}: what is between is missing",
                retryable=True,
            )
        return step == self._last_step + 1

    async def _take(self, message: messages.Act | messages.Tok, payload: bytes) -> None:
        count = self._check_rows(message)
        num_bytes = len(payload) + 8 * count
        await self._waiting.take(num_bytes)
        try:
            hidden = None
            if isinstance(message, messages.Act):
                dtype = self.grant.identity.hidden_dtype
                hidden = await outbox.decode(message, payload, dtype=dtype)
            if self._outbox is None:  # gone in the meantime
                raise errors.SplitError(Code.LINK, "the client is gone", retryable=True)
        except codecs.CodecError as error:
            self._waiting.give(num_bytes)
            raise errors.SplitError(Code.BAD_ACT, f"step {message.step}: {error}") from error
        except BaseException:
            self._waiting.give(num_bytes)
            raise
        end = message.position + count
        self._received = end
        self._marks.append(_Mark(step=message.step, end=end, arrived_s=time.monotonic()))
        self._queue.append(
            _Rows(
                position=message.position,
                end=end,
                token_ids=message.token_ids if isinstance(message, messages.Tok) else None,
                hidden=hidden,
                num_bytes=num_bytes,
            )
        )
        self.feed()

    def _check_rows(self, message: messages.Act | messages.Tok) -> int:
        """How many rows a step has; raises unless they are the session's next ones."""
        if self.is_finished:
            raise errors.SplitError(
                Code.BAD_STEP, f"step {message.step} came after the last token was drawn"
            )
        piece, identity = self.grant.piece, self.grant.identity
        if isinstance(message, messages.Act):
            wanted = (piece.start, identity.hidden_size, self.grant.codec)
            came = (message.border, message.width, message.codec)
            if piece.start == 0 or came != wanted:
                raise errors.SplitError(
                    Code.BAD_ACT,
                    f"step {message.step} has hidden states for layer {came[0]}, {came[1]} wide, "
                    f"in {came[2]}; {_wanted(self.grant)} are wanted",
                )
            count = message.num_rows
        else:
            if piece.start > 0 or not all(t < identity.vocab_size for t in message.token_ids):
                raise errors.SplitError(
                    Code.BAD_ACT,
                    f"step {message.step} has token ids {message.token_ids!s:.80}; "
                    f"{_wanted(self.grant)} are wanted",
                )
            count = len(message.token_ids)
        most = piece.prompt_len if self.grant.draws and piece.start == 0 else piece.max_len
        end = message.position + count
        if message.position != self._received or not 1 <= count <= self._limits.max_rows:
            raise errors.SplitError(
                Code.BAD_ACT,
                f"step {message.step} has rows [{message.position}, {end}); 1 to "
                f"{self._limits.max_rows} rows from {self._received} are wanted",
            )
        if end > most:
            raise errors.SplitError(
                Code.LIMIT,
                f"step {message.step} has rows [{message.position}, {end}); {most} were agreed on",
            )
        return count

    async def _truncate(self, message: messages.Trunc) -> None:
        position = message.position
        if self.grant.draws and self.grant.piece.start == 0:
            raise errors.SplitError(
                Code.BAD_STEP, "a session whose layers are all the server's is not rolled back"
            )
        if position > self._received:
            raise errors.SplitError(
                Code.BAD_STEP,
                f"step {message.step} truncates to {position}, but only {self._received} rows came",
            )
        box = self._outbox
        num_dropped = await self._rewind(position)
        if box is self._outbox:
            self._put(outbox.Entry(message=messages.Trunc(step=message.step, position=position)))
            self._return_credit(box, 1 + num_dropped)

    async def _rewind(self, position: int) -> int:
        """Forgets rows at and after a position; how many steps had them whose credit is due."""
        dropped = [rows for rows in self._queue if rows.end > position]
        kept = [rows for rows in self._queue if rows.end <= position]
        if any(rows.position < position for rows in dropped):
            raise errors.SplitError(Code.BAD_STEP, f"{position} is inside a step that waits")
        self._waiting.give(sum(rows.num_bytes for rows in dropped))
        self._queue = collections.deque(kept)
        if position < self._fed:
            try:
                await self._engine.truncate(self.grant.session_id, position)
            except ValueError as error:
                raise errors.SplitError(Code.ENGINE, str(error)) from error
            self._fed = position
        self._emitted = min(self._emitted, position)
        self._received = position
        self._marks = collections.deque(mark for mark in self._marks if mark.end <= position)
        self._drawn = [token for token in self._drawn if token.position < position]
        kept_owed = collections.deque(end for end in self._owed if end <= position)
        num_due = len(dropped) + len(self._owed) - len(kept_owed)
        self._owed = kept_owed
        return num_due

    def _on_output(self, output: interface.PieceOutput) -> None:
        if output.error is not None:
            self._fail(output.error)
        elif output.hidden is not None:
            self._emit_hidden(output.position, output.hidden)
        elif output.token_ids or output.finish_reason is not None:
            self._emit_tokens(output)

    def _fail(self, reason: str) -> None:
        self._on_failure(self, errors.SplitError(Code.ENGINE, reason))

    def _emit_hidden(self, position: int, hidden: np.ndarray) -> None:
        if position != self._emitted or position + len(hidden) > self._fed:
            self._fail(
                f"the engine gave rows [{position}, {position + len(hidden)}); those after "
                f"{self._emitted}, up to {self._fed}, are due"
            )
            return
        for begin in range(0, len(hidden), self._limits.max_rows):
            rows = hidden[begin : begin + self._limits.max_rows]
            self._emitted = position + begin + len(rows)
            step, server_s = self._account(self._emitted)
            message = messages.Act(
                step=step,
                border=self.grant.piece.stop,
                position=position + begin,
                num_rows=len(rows),
                width=self.grant.identity.hidden_size,
                codec=self.grant.codec,
                server_s=server_s,
                credits=self._repay(self._emitted),
            )
            self._answer(outbox.Entry(message=message, hidden=rows))

    def _emit_tokens(self, output: interface.PieceOutput) -> None:
        step, server_s = self._account(output.position + 1)
        if self.grant.piece.start > 0:
            self._emitted = output.position + 1
        message = messages.Tok(
            step=step,
            position=output.position,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            finish_reason=output.finish_reason,
            server_s=server_s,
            credits=self._repay(output.position + 1),
        )
        self._drawn.append(msgspec.structs.replace(message, credits=0))
        self._answer(outbox.Entry(message=message))
        if output.finish_reason is not None:
            self.is_finished = True
            self._engine.close_piece(self.grant.session_id)

    def _account(self, end: int) -> tuple[int, float]:
        """The step that holds the row before `end`; since when it was waited for."""
        now = time.monotonic()
        while self._marks and self._marks[0].end < end:
            self._marks.popleft()
        since = max(self._emitted_s, self._marks[0].arrived_s) if self._marks else self._emitted_s
        step = self._marks[0].step if self._marks else max(1, self._last_step)
        self._emitted_s = now
        return step, now - since

    def _repay(self, end: int) -> int:
        """Credits that come back with the result of the row before `end`."""
        count = 0
        while self._owed and self._owed[0] <= end:
            self._owed.popleft()
            count += 1
        self._under_way -= count
        return count

    def _answer(self, entry: outbox.Entry) -> None:
        message = entry.message
        assert isinstance(message, messages.Act | messages.Tok)
        if message.step == self._last_step:
            again = msgspec.structs.replace(message, credits=0)  # what is said again gives nothing
            self._reply.append(dataclasses.replace(entry, message=again))
        self._put(entry)

    def _put(self, entry: outbox.Entry) -> None:
        if self._outbox is not None:
            self._outbox.put_entry(entry)

    def _return_credit(self, box: outbox.Outbox | None, steps: int = 1) -> None:
        if box is not None and box is self._outbox:
            self._under_way -= steps
            box.put(messages.Credit(steps=steps))


def _wanted(grant: Grant) -> str:
    if grant.piece.start == 0:
        return f"token ids below {grant.identity.vocab_size}"
    return (
        f"hidden states for layer {grant.piece.start}, {grant.identity.hidden_size} wide, in "
        f"{grant.codec}"
    )
