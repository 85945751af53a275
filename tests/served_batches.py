"""A server's batches over an engine whose arithmetic can be done by hand, without jax."""

import asyncio
import contextlib
import json
import pathlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import fastapi
from fastapi import exceptions, responses

from nanoflow_jax import request as request_lib
from nanoflow_jax.batch import record
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.serve import batch_model, batch_routes, batch_runner, batches, data_dir, files
from nanoflow_jax.serve.batch_record import Batch
from nanoflow_jax.tokenizer import tool_formats

IDENTITY = record.ModelIdentity(
    name="adder", model="sums", tokenizer="letters", dtype="int", max_context_len=64
)
REFUSED, POISON = 999, 998


class Letters:
    """Text to token ids: its characters' numbers."""

    tokenizer = None
    tool_style = tool_formats.ToolStyle(format=tool_formats.ToolFormat.HERMES)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids as they are, text by character."""
        if prompt == "":
            raise ValueError("the prompt has no tokens")
        return [ord(c) for c in prompt] if isinstance(prompt, str) else list(prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The contents, one after the other."""
        return [ord(c) for message in messages for c in message["content"]]


class Adder:
    """An engine that answers with the sum of the prompt, as often as there are tokens to make.

    Attributes:
        seen: Ids of all requests, in order.
        active: Ids of requests that are not finished.
        aborted: Ids of requests that were.
        priorities: With which requests came, by what follows their batch's name.
        flow: While it is cleared, nothing finishes.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.active: dict[str, asyncio.Future[None]] = {}
        self.aborted: list[str] = []
        self.priorities: dict[str, int] = {}
        self.most_active = 0
        self.num_busy = 0
        self.flow = asyncio.Event()
        self.flow.set()
        self.up = asyncio.Event()
        self.up.set()

    async def ready(self) -> None:
        """Waits for the engine."""
        await self.up.wait()

    async def hold(self, *, num_active: int) -> None:
        """Lets nothing more finish and waits until so many requests are stuck."""
        self.flow.clear()
        await asyncio.sleep(0.05)  # What was about to finish does so.
        await until(lambda: len(self.active) == num_active)

    def lose(self) -> None:
        """Ends with all that it has; `up` says when there is another."""
        self.up.clear()
        for future in self.active.values():
            if not future.done():
                future.set_exception(batch_model.EngineLostError)

    async def complete(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        *,
        priority: int,
    ) -> request_lib.Completion:
        """Answers one request."""
        assert request_id not in self.active, f"{request_id} is there twice"
        assert self.up.is_set()
        if self.num_busy:
            self.num_busy -= 1
            raise ApiError("busy", status_code=429)
        self.seen.append(request_id)
        self.priorities[request_id.partition("/")[2]] = priority
        future = self.active[request_id] = asyncio.get_running_loop().create_future()
        self.most_active = max(self.most_active, len(self.active))
        try:
            if REFUSED in prompt_ids:
                raise ValueError(f"{REFUSED} is not a token id of this model")
            if POISON in prompt_ids:
                raise batch_model.EngineLostError
            waiting = asyncio.create_task(self.flow.wait())
            try:
                await asyncio.wait([waiting, future], return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if future.done():
                future.result()
            return answer(request_id, prompt_ids, params)
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise
        finally:
            del self.active[request_id]


def answer(
    request_id: str, prompt_ids: Sequence[int], params: request_lib.SamplingParams
) -> request_lib.Completion:
    """The completion of a prompt: its sum, `max_tokens` times, for each choice."""
    count = params.max_tokens or 4
    tokens = (sum(prompt_ids) % 1000,) * count
    return request_lib.Completion(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        choices=tuple(
            request_lib.Choice(
                index=i,
                text=" ".join(map(str, tokens)),
                token_ids=tokens,
                finish_reason=request_lib.FinishReason.LENGTH,
            )
            for i in range(params.n)
        ),
    )


@contextlib.contextmanager
def open_store(
    folder: pathlib.Path,
    *,
    file_limits: files.Limits | None = None,
    limits: batches.Limits | None = None,
) -> Iterator[batches.BatchStore]:
    """The stores of a server, as its start opens them."""
    with data_dir.opened(folder) as place:
        store = files.FileStore(place / "files", file_limits)
        yield batches.BatchStore(place / "batches", store, limits)


def put(store: batches.BatchStore, lines: Sequence[Any], name: str = "in.jsonl") -> str:
    """Uploads rows, or raw lines; the id of the file."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    with store.files.upload() as upload:
        upload.write("".join(text + "\n" for text in texts).encode())
        return upload.commit(filename=name).id


def rows(count: int, **body: Any) -> list[dict[str, Any]]:
    """Rows of completions, named by number."""
    return [
        {
            "custom_id": f"id-{i}",
            "method": "POST",
            "url": str(Endpoint.COMPLETIONS),
            "body": {"prompt": [i, 1], "max_tokens": 2, **body},
        }
        for i in range(count)
    ]


@contextlib.asynccontextmanager
async def running(
    store: batches.BatchStore,
    engine: batch_model.Engine,
    *,
    identity: record.ModelIdentity = IDENTITY,
    **settings: Any,
) -> AsyncIterator[asyncio.Task[None]]:
    """Runs batches in the background, as a server does."""
    made = batch_runner.Settings(**{"retry_s": 0.02, **settings})
    runner = batch_runner.BatchRunner(store, engine, Letters(), identity, made)
    task = asyncio.create_task(runner.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def ended(store: batches.BatchStore, *batch_ids: str) -> list[Batch]:
    """Waits for the end of batches."""
    while True:
        found = [store.get(batch_id) for batch_id in batch_ids]
        if all(batch.status.is_ended for batch in found):
            return found
        await asyncio.sleep(0.005)


async def until(condition: Any) -> None:
    """Waits until something is true."""
    while not condition():
        await asyncio.sleep(0.005)


def read(store: batches.BatchStore, file_id: str | None) -> list[dict[str, Any]]:
    """The rows of a result file in the order of their numbers; none if there is no file."""
    if file_id is None:
        return []
    data = store.files.path(file_id).read_bytes()
    assert data.endswith(b"\n")
    assert len(data) == store.files.get(file_id).bytes
    found = [json.loads(line) for line in data.splitlines()]
    return sorted(found, key=lambda row: int(row["id"].rpartition("-")[2]))


def make_app(store: batches.BatchStore) -> fastapi.FastAPI:
    """An app with the routes and the error bodies that the server gives."""
    app = fastapi.FastAPI()
    app.include_router(batch_routes.make_router(store))

    @app.exception_handler(ApiError)
    async def on_api_error(request: fastapi.Request, error: ApiError) -> responses.JSONResponse:
        return responses.JSONResponse(error.body(), status_code=error.status_code)

    @app.exception_handler(exceptions.RequestValidationError)
    async def on_invalid(
        request: fastapi.Request, error: exceptions.RequestValidationError
    ) -> responses.JSONResponse:
        made = ApiError(str(error.errors()[0]["msg"]), param=str(error.errors()[0]["loc"][-1]))
        return responses.JSONResponse(made.body(), status_code=400)

    return app
