"""The engine as the thread of a batch sees it: plain calls there, tasks of the event loop here."""

import asyncio
import dataclasses
import queue
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from nanoflow_jax import request as request_lib
from nanoflow_jax.batch import run
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.tokenizer import tokenizer, tool_formats

_WAIT_S = 0.5  # Between two looks at whether the batch should stop, which also wakes the thread.
_BUSY_S = 1.0
# Engines that may end under a row: the row itself may be what ends them.
_MAX_LOST = 3


class EngineLostError(Exception):
    """The engine ended with this request in it; another one may start."""


class Engine(Protocol):
    """The engine from the event loop."""

    async def ready(self) -> None:
        """Returns once the engine takes requests, at once if it does."""
        ...

    async def complete(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        *,
        priority: int,
    ) -> request_lib.Completion:
        """Runs one request to its end; to cancel the call is to abort the request.

        Args:
            request_id: Unique among unfinished requests.
            prompt_ids: Token ids.
            params: Its seed is set; n may be above 1.
            priority: Lower runs first.

        Raises:
            ValueError: This request cannot be served. With `ApiError`'s status 429 or 503 it is
                tried again later.
            EngineLostError: The engine ended meanwhile.
        """
        ...


class Texts(Protocol):
    """Text to token ids. Its methods are called from several threads at once."""

    @property
    def tokenizer(self) -> tokenizer.Tokenizer | None:
        """As `llm.LLM.tokenizer`."""
        ...

    @property
    def tool_style(self) -> tool_formats.ToolStyle:
        """As `llm.LLM.tool_style`."""
        ...

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """As `llm.LLM.encode`."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """As `llm.LLM.encode_chat`."""
        ...


class EngineModel:
    """A `run.Model`. Its public methods are called from one thread, which is not the loop's.

    Invariant: `_tasks` is touched by the loop's thread only, `_live` by the other one only. Each
    name in `_live` gets one entry of the queue, unless it is aborted.
    """

    def __init__(
        self,
        engine: Engine,
        texts: Texts,
        loop: asyncio.AbstractEventLoop,
        *,
        prefix: str,
        priority: int,
    ) -> None:
        """Wraps an engine.

        Args:
            engine: Called in the loop.
            texts: Called in this object's thread.
            loop: It runs until this object is no longer used.
            prefix: Of the names of requests in the engine.
            priority: Of all requests; their own are added to it.
        """
        self.tokenizer = texts.tokenizer
        self.tool_style = texts.tool_style
        self._engine = engine
        self._texts = texts
        self._loop = loop
        self._prefix = prefix
        self._priority = priority
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._live: set[str] = set()
        self._found: queue.SimpleQueue[request_lib.Completion | run.Failure | Exception | None] = (
            queue.SimpleQueue()
        )
        self._num_generated = 0

    @property
    def num_generated(self) -> int:
        """Tokens of finished requests."""
        return self._num_generated

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt."""
        return self._texts.encode(prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation."""
        return self._texts.encode_chat(messages, **options)

    def submit(
        self,
        name: str,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        *,
        priority: int = 0,
    ) -> None:
        """Takes a request in; if it cannot be served, `step` says so."""
        self._live.add(name)
        self._loop.call_soon_threadsafe(
            self._start, name, prompt_ids, params, self._priority + priority
        )

    def abort(self, name: str) -> None:
        """Drops a request; nothing more is reported of it."""
        if name in self._live:
            self._live.remove(name)
            self._loop.call_soon_threadsafe(self._cancel, name)

    def step(self) -> list[request_lib.Completion | run.Failure]:
        """Waits a moment for something to finish, or for a wake-up.

        Raises:
            Exception: What the engine raised beyond its contract.
        """
        found: list[request_lib.Completion | run.Failure] = []
        try:
            item = self._found.get(timeout=_WAIT_S)
            while True:
                if isinstance(item, Exception):
                    raise item
                if item is not None and item.request_id in self._live:
                    self._live.remove(item.request_id)
                    found.append(item)
                item = self._found.get_nowait()
        except queue.Empty:
            pass
        for item in found:
            if isinstance(item, request_lib.Completion):
                self._num_generated += sum(len(choice.token_ids) for choice in item.choices)
        return found

    def wake(self) -> None:
        """Ends a waiting `step`; may be called from any thread."""
        self._found.put(None)

    def _start(
        self,
        name: str,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        priority: int,
    ) -> None:
        work = self._complete(name, prompt_ids, params, priority)
        self._tasks[name] = self._loop.create_task(work)

    def _cancel(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    async def _complete(
        self,
        name: str,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        priority: int,
    ) -> None:
        try:
            found = await self._outcome(name, prompt_ids, params, priority)
        except Exception as error:
            self._found.put(error)
        else:
            self._found.put(found)
        self._tasks.pop(name, None)

    async def _outcome(
        self,
        name: str,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        priority: int,
    ) -> request_lib.Completion | run.Failure:
        num_lost = 0
        while num_lost < _MAX_LOST:
            await self._engine.ready()
            try:
                found = await self._engine.complete(
                    f"{self._prefix}/{name}", prompt_ids, params, priority=priority
                )
                return dataclasses.replace(found, request_id=name)
            except EngineLostError:
                num_lost += 1
            except ApiError as error:
                if error.status_code not in (429, 503):
                    return run.Failure(request_id=name, error=error)
                await asyncio.sleep(_BUSY_S)
            except ValueError as error:
                return run.Failure(request_id=name, error=ApiError(str(error)))
        given_up = ApiError(
            f"the engine ended {_MAX_LOST} times while it answered this row",
            code="engine_lost",
            status_code=500,
        )
        return run.Failure(request_id=name, error=given_up)
