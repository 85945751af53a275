"""A piece engine in a thread of its own, as an event loop sees it."""

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nanoflow_jax.split import interface

_LOG = logging.getLogger(__name__)

Listener = Callable[[interface.PieceOutput], None]


class EngineThread:
    """Runs an engine: pieces of all sessions share its steps.

    Calls reach the engine in the order in which they were made. A listener is called on the event
    loop; when `truncate` has returned, all that came before it has been told.

    Invariant: the engine is touched by the thread alone; a piece has a listener from before it is
    open until it is closed.

    Attributes:
        busy_s: Time that steps took so far, those included that only wait for a device.
    """

    def __init__(self, engine: interface.PieceEngine) -> None:
        self._engine = engine
        self._condition = threading.Condition()
        self._calls: list[Callable[[], None]] = []
        self._is_stopping = False
        self._open: set[str] = set()  # the thread's
        self._listeners: dict[str, Listener] = {}  # the event loop's
        self.busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="pieces", daemon=True)

    async def __aenter__(self) -> "EngineThread":
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes all pieces and ends the thread."""
        for piece_id in list(self._listeners):
            self.close_piece(piece_id)
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
                self._loop.call_soon_threadsafe(on_taken)

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
        self._post(lambda: self._forget(piece_id))

    def _post(self, call: Callable[[], None]) -> None:
        with self._condition:
            self._calls.append(call)
            self._condition.notify()

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
                calls, self._calls = self._calls, []
                if self._is_stopping and not calls:
                    return
            for call in calls:
                call()
            if self._engine.has_work:
                self._step()

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
        self._loop.call_soon_threadsafe(self._tell, outputs)

    def _end(self, piece_id: str, position: int, error: str) -> None:
        self._forget(piece_id)
        output = interface.PieceOutput(piece_id=piece_id, position=position, error=error)
        self._loop.call_soon_threadsafe(self._tell, [output])

    def _forget(self, piece_id: str) -> None:
        self._open.discard(piece_id)
        self._engine.close_piece(piece_id)

    def _tell(self, outputs: Sequence[interface.PieceOutput]) -> None:
        for output in outputs:
            listener = self._listeners.get(output.piece_id)
            if listener is not None:
                listener(output)
