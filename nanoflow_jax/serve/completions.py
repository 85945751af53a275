"""Serves /v1/completions and /v1/chat/completions: one request from its body to its last byte."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine_process import tickets as tickets_lib
from nanoflow_jax.openai import requests, responses, streaming
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.serve import body, event_stream
from nanoflow_jax.serve import service as service_lib

Found = TypeVar("Found")
# Answers with log-probabilities of more tokens are written beside the event loop.
_MANY_SCORED = 500
_encode = msgspec.json.Encoder().encode


class JsonResponse(Response):
    """A JSON body, written by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return _encode(content)


async def answer(
    service: service_lib.Service, endpoint: requests.Endpoint, http: Request
) -> Response:
    """Serves one request.

    Raises:
        ApiError: It cannot be served; nothing of it stays in the engine.
    """
    began = time.monotonic()
    service.check_ready()
    section = service.section
    fields = await body.read_object(
        http, most_bytes=section.max_body_bytes, timeout_s=section.read_timeout_s
    )
    request = requests.parse(endpoint, fields, {}, tool_style=service.words.tool_style)
    service.check_model(request.model)
    num_choices = max(1, len(request.prompts)) * request.params.n
    deadline = began + min(section.request_timeout_s, request.timeout_s or float("inf"))
    work = _Work(service, request, num_choices, began=began, deadline=deadline)
    if request.stream:
        pieces = work.pieces()
        first = await _while_there(http, anext(pieces))  # so that an early error has a status
        return event_stream.EventStream(_chained(first, pieces))
    return Response(await _while_there(http, work.whole()), media_type=JsonResponse.media_type)


async def _chained(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()


async def _while_there(http: Request, coroutine: Awaitable[Found]) -> Found:
    """Awaits something, but no longer than the client stays.

    Raises:
        ApiError: The client is gone; nobody will read this.
    """
    working = asyncio.ensure_future(coroutine)
    leaving = asyncio.ensure_future(event_stream.wait_until_gone(http.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError("the client is gone", code="client_gone", status_code=499)
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class _Work:
    """One request while it is served."""

    def __init__(
        self,
        service: service_lib.Service,
        request: requests.ApiRequest,
        num_choices: int,
        *,
        began: float,
        deadline: float,
    ) -> None:
        self._service = service
        self._request = request
        self._num_choices = num_choices
        self._began = began
        self._deadline = deadline
        self._heard_at: float | None = None

    async def whole(self) -> bytes:
        """The answer, all of it."""
        service = self._service
        with service.admitted(self._num_choices):
            prompts = await service.encode(self._request)
            tickets = service.submit(self._request, prompts)
            service.metrics.begin(self._request.params)
            with self._held(tickets):
                completions = []
                for ticket in tickets:
                    completion = await _told(ticket.completion())
                    service.count(ticket)
                    completions.append(completion)
            if sum(map(_num_scored, completions)) > _MANY_SCORED:
                return await asyncio.to_thread(self._written, completions)
            return self._written(completions)

    def _written(self, completions: Sequence[request_lib.Completion]) -> bytes:
        service = self._service
        return _encode(service.writer.body(self._request, completions, service.head()))

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The answer as events; the first may be empty."""
        service, request = self._service, self._request
        with service.admitted(self._num_choices):
            prompts = await service.encode(request)
            tickets = service.submit(request, prompts)
            service.metrics.begin(request.params)
            with self._held(tickets):
                writer = streaming.StreamWriter(service.writer, request, service.head(), prompts)
                events = self._events(tickets)
                async with contextlib.aclosing(events):
                    # A refusal by the engine still gets a status of its own.
                    number, first = await anext(events)
                    yield _events(writer.begin()) + self._take(writer, tickets, number, first)
                    try:
                        async for number, event in events:
                            piece = self._take(writer, tickets, number, event)
                            if piece:
                                yield piece
                    except ApiError as error:
                        yield _event(error.body()) + streaming.DONE
                        return
                yield _events(writer.usage()) + streaming.DONE

    @contextlib.contextmanager
    def _held(self, tickets: Sequence[tickets_lib.Ticket]) -> Iterator[None]:
        """Ends what takes too long; on the way out, takes what is left out of the engine."""
        loop = asyncio.get_running_loop()
        left_s = self._deadline - time.monotonic()
        alarm = loop.call_at(loop.time() + left_s, self._end_all, tickets)
        try:
            with self._service.client.aborting(tickets):
                yield
        finally:
            alarm.cancel()

    def _end_all(self, tickets: Sequence[tickets_lib.Ticket]) -> None:
        error = ApiError(
            f"the request was not finished {time.monotonic() - self._began:.0f} s after it "
            "arrived, its time limit",
            code="timeout",
            status_code=504,
        )
        for ticket in tickets:
            ticket.put(error)

    async def _events(
        self, tickets: Sequence[tickets_lib.Ticket]
    ) -> AsyncGenerator[tuple[int, tickets_lib.Event], None]:
        """What comes of several prompts, each with its number, as it comes."""
        if len(tickets) == 1:
            while True:
                event = await _told(tickets[0].next())
                yield 0, event
                if isinstance(event, request_lib.Completion):
                    return
        # One place: what is not taken yet stays merged in its ticket.
        ready: asyncio.Queue[tuple[int, tickets_lib.Event | Exception]] = asyncio.Queue(maxsize=1)
        pumps = [asyncio.create_task(_pump(i, t, ready)) for i, t in enumerate(tickets)]
        left = len(tickets)
        try:
            while left:
                number, found = await ready.get()
                if isinstance(found, Exception):
                    raise _api_error(found)
                yield number, found
                left -= isinstance(found, request_lib.Completion)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _take(
        self,
        writer: streaming.StreamWriter,
        tickets: Sequence[tickets_lib.Ticket],
        number: int,
        event: tickets_lib.Event,
    ) -> bytes:
        match event:
            case request_lib.ScoredPrompt():
                return _events(writer.scored(number, event))
            case request_lib.Delta():
                self._note(event)
                return _events(writer.delta(number, event))
            case request_lib.Completion():
                self._service.count(tickets[number])
                if event.error is not None:
                    raise responses.failed(event.error)
        return b""

    def _note(self, delta: request_lib.Delta) -> None:
        """Measures the time since the last tokens, for each of the new ones."""
        now = time.monotonic()
        if self._heard_at is not None:
            for _ in delta.token_ids:
                self._service.metrics.inter_token.observe(
                    (now - self._heard_at) / len(delta.token_ids)
                )
        self._heard_at = now


def _num_scored(completion: request_lib.Completion) -> int:
    """Tokens of which a completion has log-probabilities."""
    scored = sum(len(choice.logprobs or ()) for choice in completion.choices)
    return scored + len(completion.prompt_logprobs or ())


async def _pump(
    number: int,
    ticket: tickets_lib.Ticket,
    ready: "asyncio.Queue[tuple[int, tickets_lib.Event | Exception]]",
) -> None:
    """Carries the events of one ticket to a queue."""
    event: tickets_lib.Event | Exception | None = None
    while not isinstance(event, request_lib.Completion | Exception):
        try:
            event = await ticket.next()
        except (ValueError, tickets_lib.EngineStoppedError) as error:
            event = error
        await ready.put((number, event))


async def _told(coroutine: Awaitable[Found]) -> Found:
    """Awaits a ticket; its errors become those of the API."""
    try:
        return await coroutine
    except ApiError:
        raise
    except (ValueError, tickets_lib.EngineStoppedError) as error:
        raise _api_error(error) from error


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, tickets_lib.EngineStoppedError):
        return service_lib.stopped(error)
    if isinstance(error, tickets_lib.GrammarRefusedError):
        return ApiError(str(error), param="response_format")
    return ApiError(str(error))


def _event(data: Any) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"


def _events(chunks: Sequence[Any]) -> bytes:
    return b"".join(map(_event, chunks))
