"""A piece engine in another thread, as an event loop sees it."""

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from nanoflow_jax.split import interface

_LOG = logging.getLogger(__name__)

Listener = Callable[[interface.PieceOutput], None]


class Host(Protocol):
    """Has the thread of an engine that others use too, and runs its steps."""

    def post(self, call: Callable[[], None]) -> None:
        """Has a call made in the engine's thread, after those posted before it."""

    def listen(self, tell: Callable[[Sequence[interface.PieceOutput]], None]) -> None:
        """From now on `tell` is called in the engine's thread with what each step gave."""


class EngineThread:
    """Runs an engine: pieces of all sessions share its steps.

    Calls reach the engine in the order in which they were made. A listener is called on the event
    loop; when `truncate` has returned, all that came before it has been told.

    Invariant: the engine is touched by the thread alone; a piece has a listener from before it is
    open until it is closed. `_awaited` are open pieces that gave something and were fed nothing
    since.

    Attributes:
        busy_s: Time that steps took so far, those included that only wait for a device; of an
            engine that a host runs it is not known, and stays 0.
    """

    def __init__(
        self,
        engine: interface.PieceEngine,
        host: Host | None = None,
        *,
        patience_s: float = 0.0,
    ) -> None:
        """Begins nothing yet.

        Args:
            engine: Runs the pieces.
            host: Runs the engine, if others use it too; a thread of its own unless given.
            patience_s: How long rows that come while the engine is idle wait for those of awaited
                pieces, so that they share a step; a host waits for nobody.
        """
        self._engine = engine
        self._host = host
        self._patience_s = patience_s
        self._condition = threading.Condition()
        self._calls: list[Callable[[], None]] = []
        self._has_rows = False  # among the calls
        self._awaited: set[str] = set()
        self._is_stopping = False
        self._open: set[str] = set()  # the thread's
        self._taken: list[Callable[[], None]] = []  # the thread's: to be called before its step
        self._listeners: dict[str, Listener] = {}  # the event loop's
        self.busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="pieces", daemon=True)

    async def __aenter__(self) -> "EngineThread":
        self._loop = asyncio.get_running_loop()
        if self._host is None:
            self._thread.start()
        else:
            self._host.listen(self._give)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes all pieces and ends the thread, if it is its own."""
        for piece_id in list(self._listeners):
            self.close_piece(piece_id)
        if self._host is not None:
            return
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join)

    async def open(self, piece: interface.Piece, listener: Listener) -> None:
        """Takes a piece in; the listener hears what it gives, errors included.

        Raises:
            ValueError: The engine refuses it.
        """
        self._listeners[piece.piece_id] = listener

        def call() -> None:
            self._engine.open(piece)
            self._open.add(piece.piece_id)

        try:
            await self._ask(call)
        except BaseException:
            # Cancelled, it may be open by now.
            self.close_piece(piece.piece_id)
            raise

    def feed(
        self,
        piece_id: str,
        position: int,
        *,
        token_ids: Sequence[int] | None = None,
        hidden: Float[np.ndarray, "n D"] | None = None,
        on_taken: Callable[[], None] | None = None,
    ) -> None:
        """Gives a piece its next rows; if the engine refuses them the listener hears why.

        Args:
            piece_id: Whose.
            position: Of the first row.
            token_ids: Where token ids enter.
            hidden: Where hidden states do.
            on_taken: Called on the event loop once the engine has them, or never will.
        """

        def call() -> None:
            try:
                if piece_id in self._open:
                    self._engine.feed(piece_id, position, token_ids=token_ids, hidden=hidden)
            except ValueError as error:
                self._end(piece_id, position, str(error))
            if on_taken is not None:
                self._taken.append(on_taken)

        with self._condition:
            self._awaited.discard(piece_id)
            self._has_rows = True
        self._post(call)

    async def truncate(self, piece_id: str, position: int) -> None:
        """Forgets a piece's rows at and after a position.

        Raises:
            ValueError: The engine refuses.
        """
        await self._ask(lambda: self._engine.truncate(piece_id, position))

    def close_piece(self, piece_id: str) -> None:
        """Ends a piece; its listener hears nothing more. An unknown one is ignored."""
        self._listeners.pop(piece_id, None)
        with self._condition:
            self._awaited.discard(piece_id)
        self._post(lambda: self._forget(piece_id))

    def _post(self, call: Callable[[], None]) -> None:
        with self._condition:
            self._calls.append(call)
            self._condition.notify()
        if self._host is not None:
            self._host.post(self._call_all)

    async def _ask(self, call: Callable[[], None]) -> None:
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def answered() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                call()
            except ValueError as error:
                answer.set_exception(error)
            else:
                answer.set_result(None)

        self._post(answered)
        await asyncio.wrap_future(answer)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._calls or self._is_stopping or self._engine.has_work
                )
                self._await_others()
                if self._is_stopping and not self._calls:
                    return
            self._call_all()
            if self._engine.has_work:
                self._step()

    def _call_all(self) -> None:
        with self._condition:
            calls, self._calls, self._has_rows = self._calls, [], False
        for call in calls:
            call()
        self._tell_taken()

    def _await_others(self) -> None:
        """Lets rows wait for those that are about to come; the condition's lock is held."""
        if self._patience_s and self._has_rows and not self._engine.has_work:
            self._condition.wait_for(
                lambda: self._is_stopping or not self._awaited, timeout=self._patience_s
            )

    def _step(self) -> None:
        begun_s = time.monotonic()
        try:
            outputs = self._engine.step()
        except Exception as error:  # of any kind: pieces end, the process does not
            _LOG.exception("a step of the piece engine failed")
            for piece_id in list(self._open):
                self._end(piece_id, 0, f"a step of the engine failed: {error}")
            return
        self.busy_s += time.monotonic() - begun_s
        self._give(outputs)

    def _give(self, outputs: Sequence[interface.PieceOutput]) -> None:
        if not outputs:
            return  # a turn of the event loop for nothing would slow the next step down
        with self._condition:
            self._awaited.update(
                output.piece_id
                for output in outputs
                if output.piece_id in self._open and output.finish_reason is None
            )
        self._loop.call_soon_threadsafe(self._tell, outputs)

    def _tell_taken(self) -> None:
        """Wakes the event loop once, however many sessions' rows the engine took."""
        taken, self._taken = self._taken, []
        if taken:
            self._loop.call_soon_threadsafe(_make_all, taken)

    def _end(self, piece_id: str, position: int, error: str) -> None:
        self._forget(piece_id)
        output = interface.PieceOutput(piece_id=piece_id, position=position, error=error)
        self._loop.call_soon_threadsafe(self._tell, [output])

    def _forget(self, piece_id: str) -> None:
        self._open.discard(piece_id)
        with self._condition:
            self._awaited.discard(piece_id)
        self._engine.close_piece(piece_id)

    def _tell(self, outputs: Sequence[interface.PieceOutput]) -> None:
        for output in outputs:
            listener = self._listeners.get(output.piece_id)
            if listener is not None:
                listener(output)


def _make_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
