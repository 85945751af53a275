"""What the routes share: the words of the model, its engine, and who is let in."""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence

from nanoflow_jax import config as config_lib
from nanoflow_jax import request as request_lib
from nanoflow_jax.engine_process import client as client_lib
from nanoflow_jax.engine_process import tickets
from nanoflow_jax.openai import requests, responses
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.serve import batch_model
from nanoflow_jax.serve import metrics as metrics_lib
from nanoflow_jax.tokenizer import words as words_lib

# Texts up to this length, all together, are encoded at once: a thread costs more.
_SHORT_CHARS = 2000
# Of one text that need not fit into the context: /tokenize, and prompts that are cut.
_MAX_CHARS = 1 << 20
_ENCODERS = 2
# Log-probabilities of one answer: room for 20 beside each token of a context of 128k. Each is some
# hundred bytes here, and as many in the engine.
MAX_LOGPROBS_SHOWN = 1 << 22


class Service:
    """One server's state.

    Invariant: `num_choices` counts the choices of requests between `admitted` and its end.
    """

    def __init__(
        self,
        section: config_lib.ServerSection,
        *,
        model_name: str,
        words: words_lib.Words,
        client: client_lib.EngineClient,
        metrics: metrics_lib.Metrics,
    ) -> None:
        self.section = section
        self.model_name = model_name
        self.words = words
        self.client = client
        self.metrics = metrics
        self.writer = responses.Writer(words.tokenizer)
        self.started = int(time.time())
        self.began = time.monotonic()
        self.is_draining = False
        self.num_choices = 0
        self._encoders = asyncio.Semaphore(_ENCODERS)

    @property
    def status(self) -> str:
        """starting, ready or draining."""
        if self.is_draining:
            return "draining"
        return "ready" if self.client.state is client_lib.State.READY else "starting"

    def head(self) -> responses.Head:
        """Identity of a new answer."""
        return responses.Head(
            response_id=secrets.token_hex(12), created=int(time.time()), model=self.model_name
        )

    def check_model(self, name: str | None) -> None:
        """Refuses a request for a model that is not served.

        Raises:
            ApiError: With status 404.
        """
        if name and name != self.model_name:
            raise ApiError(
                f"the model {name!r:.200} is not served here; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
                status_code=404,
            )

    def check_ready(self) -> client_lib.messages.Ready:
        """What the engine said of itself.

        Raises:
            ApiError: With status 503, while the server cannot take requests.
        """
        if self.status != "ready" or self.client.ready is None:
            raise ApiError(
                f"the server is {self.status}; try again in a moment",
                code="unavailable",
                status_code=503,
            )
        return self.client.ready

    @contextlib.contextmanager
    def admitted(self, num_choices: int) -> Iterator[None]:
        """Holds places for choices while a request is served.

        Raises:
            ApiError: With status 429; the server has no room for them.
        """
        most = self.section.max_queue
        if self.num_choices + num_choices > most:
            self.metrics.refused.inc()
            advice = (
                f"the server is busy with {self.num_choices} choices and takes at most {most} "
                "(--max_queue); try again in a moment"
                if num_choices <= most
                else f"the request has {num_choices} choices, n for each prompt, and the server "
                f"takes at most {most} at once (--max_queue); split it into several requests"
            )
            raise ApiError(advice, code="queue_full", status_code=429)
        self.num_choices += num_choices
        try:
            yield
        finally:
            self.num_choices -= num_choices

    async def encode(self, request: requests.ApiRequest, *, check: bool = True) -> list[list[int]]:
        """Token ids of each prompt of a request.

        Args:
            request: Its prompts or its messages.
            check: Refuse what the engine would refuse.

        Raises:
            ApiError: A prompt cannot be encoded or served.
        """
        ready = self.check_ready()
        try:
            found = await self._encode(request, self._max_chars(request, ready, check=check))
        except ValueError as error:
            is_long = isinstance(error, words_lib.TooLongError)
            raise ApiError(
                str(error),
                param="prompt" if request.messages is None else "messages",
                code="context_length_exceeded" if is_long else "invalid_request",
            ) from error
        if request.truncate_prompt_len is not None:
            found = [ids[-request.truncate_prompt_len :] for ids in found]
        for ids in found if check else ():
            check_prompt(ids, ready)
        return found

    def _max_chars(
        self, request: requests.ApiRequest, ready: client_lib.messages.Ready, *, check: bool
    ) -> int:
        """Longest text that is worth encoding: its tokens may fit into the context."""
        words = self.words.tokenizer
        if words is None or not check or request.truncate_prompt_len is not None:
            return _MAX_CHARS
        return ready.max_context_len * words.longest_token

    async def _encode(self, request: requests.ApiRequest, max_chars: int) -> list[list[int]]:
        if request.messages is not None:
            options = dict(request.template_options)
            async with self._encoders:
                chat = await asyncio.to_thread(
                    self.words.encode_chat, request.messages, max_chars=max_chars, **options
                )
            return [chat]
        wanted = request.add_special_tokens is not False

        def encode_all() -> list[list[int]]:
            return [
                self.words.encode(prompt, add_special_tokens=wanted, max_chars=max_chars)
                for prompt in request.prompts
            ]

        if sum(map(len, request.prompts)) <= _SHORT_CHARS:
            return encode_all()
        async with self._encoders:
            return await asyncio.to_thread(encode_all)

    def count(self, ticket: tickets.Ticket) -> None:
        """Adds a finished request to the statistics."""
        assert ticket.times is not None
        self.metrics.finish(ticket.times, prompt_tokens=len(ticket.prompt_ids))

    def submit(
        self, request: requests.ApiRequest, prompts: Sequence[Sequence[int]]
    ) -> list[tickets.Ticket]:
        """Hands the prompts of a request to the engine.

        Raises:
            ApiError: The answer could be too large, or, with status 503, the engine is gone.
        """
        assert self.client.ready is not None, "prompts are encoded when it is"
        check_answer(request.params, prompts, self.client.ready)
        try:
            return [
                self.client.submit(
                    ids,
                    _with_seed(request.params),
                    priority=request.priority,
                    stream=request.stream,
                )
                for ids in prompts
            ]
        except tickets.EngineStoppedError as error:
            raise stopped(error) from error


class BatchEngine:
    """The engine as batches use it: beside live requests, and not counted among them."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ready(self) -> None:
        """Returns once the engine takes requests."""
        await self._service.client.wait_ready()

    async def complete(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        *,
        priority: int,
    ) -> request_lib.Completion:
        """Runs one request to its end; see `batch_model.Engine`."""
        client = self._service.client
        assert client.ready is not None, "rows wait until it is"
        check_prompt(prompt_ids, client.ready)
        check_answer(params, [prompt_ids], client.ready)
        try:
            ticket = client.submit(prompt_ids, params, priority=priority)
            with client.aborting([ticket]):
                completion = await ticket.completion()
        except tickets.EngineStoppedError as error:
            raise batch_model.EngineLostError(str(error)) from error
        self._service.count(ticket)
        return completion


def check_prompt(ids: Sequence[int], ready: client_lib.messages.Ready) -> None:
    """Refuses early what the engine would refuse, before it is sent there.

    Raises:
        ApiError: The prompt is too long, or holds a number that is no token id; it may be one that
            no message to the engine could hold.
    """
    if len(ids) >= ready.max_context_len:
        raise ApiError(
            f"the prompt has {len(ids)} tokens and the context holds {ready.max_context_len}, "
            "with room for at least one generated token; shorten the prompt",
            code="context_length_exceeded",
        )
    wrong = next((token for token in ids if not 0 <= token < ready.vocab_size), None)
    if wrong is not None:
        raise ApiError(
            f"prompt: {wrong!r:.40} is not a token id of this model, 0 to {ready.vocab_size - 1}",
            param="prompt",
        )


def check_answer(
    params: request_lib.SamplingParams,
    prompts: Sequence[Sequence[int]],
    ready: client_lib.messages.Ready,
) -> None:
    """Refuses what could have an answer beyond all bounds.

    Raises:
        ApiError: It could show more than MAX_LOGPROBS_SHOWN log-probabilities.
    """
    count = 0
    for ids in prompts:
        if params.prompt_logprobs is not None:
            count += len(ids) * (1 + params.prompt_logprobs)
        if params.logprobs is not None:
            room = ready.max_context_len - len(ids)
            most = room if params.max_tokens is None else min(room, params.max_tokens)
            count += params.n * most * (1 + params.logprobs)
    if count > MAX_LOGPROBS_SHOWN:
        raise ApiError(
            f"the answer could show {count} log-probabilities, and at most {MAX_LOGPROBS_SHOWN} "
            "are shown at once; ask for fewer of them, or set max_tokens, n or the number of "
            "prompts lower",
            param="logprobs",
        )


def stopped(error: Exception) -> ApiError:
    """What a request is told when the engine ended under it."""
    return ApiError(str(error), code="engine_stopped", status_code=503)


def _with_seed(params: request_lib.SamplingParams) -> request_lib.SamplingParams:
    """The parameters with a seed; a drawn one where none was given."""
    if params.seed is not None:
        return params
    return dataclasses.replace(params, seed=secrets.randbits(63))
