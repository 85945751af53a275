"""One request in the engine as the front sees it, in bounded memory however slowly it is read."""

import asyncio
import dataclasses
from collections.abc import Sequence

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine_process import messages

Event = request_lib.ScoredPrompt | request_lib.Delta | request_lib.Completion


class EngineStoppedError(Exception):
    """The engine's process ended while it held the request."""


class GrammarRefusedError(ValueError):
    """The engine cannot follow the grammar of the request."""


class Ticket:
    """One submitted request: events in order, read by one task.

    Deltas of a choice that nobody has read yet are merged, so what waits here is never more than
    the request's whole output.

    Invariant: after a `Completion` or an error nothing follows; what is put then is dropped.
    """

    def __init__(self, request_id: str, prompt_ids: Sequence[int]) -> None:
        self.request_id = request_id
        self.prompt_ids = tuple(prompt_ids)
        self.times: messages.Times | None = None
        self._scored: request_lib.ScoredPrompt | None = None
        self._deltas: dict[int, request_lib.Delta] = {}
        self._end: request_lib.Completion | Exception | None = None
        self._has_news = asyncio.Event()

    def put(self, event: Event | Exception) -> None:
        """Adds an event; called in the event loop."""
        if self._end is not None:
            return
        match event:
            case request_lib.ScoredPrompt():
                self._scored = event
            case request_lib.Delta():
                before = self._deltas.get(event.index)
                self._deltas[event.index] = event if before is None else _merged(before, event)
            case request_lib.Completion():
                self._end = dataclasses.replace(event, prompt_ids=self.prompt_ids)
            case _:
                self._end = event
        self._has_news.set()

    async def next(self) -> Event:
        """The next event.

        Raises:
            ValueError: The engine refused the request (`GrammarRefusedError` for its grammar), or
                its time was up.
            EngineStoppedError: The engine ended.
        """
        await self._has_news.wait()
        event: Event
        if self._scored is not None:
            event, self._scored = self._scored, None
        elif self._deltas:
            event = self._deltas.pop(next(iter(self._deltas)))
        elif isinstance(self._end, Exception):
            raise self._end
        else:
            assert self._end is not None
            return self._end
        if self._scored is None and not self._deltas and self._end is None:
            self._has_news.clear()
        return event

    async def completion(self) -> request_lib.Completion:
        """The end of the request; see `next`."""
        while True:
            event = await self.next()
            if isinstance(event, request_lib.Completion):
                return event


def _merged(first: request_lib.Delta, second: request_lib.Delta) -> request_lib.Delta:
    return dataclasses.replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
    )
