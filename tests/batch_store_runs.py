"""Lets something happen to a server's batches, and reads what became of them."""

import asyncio
import pathlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import served_batches

from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.serve.batch_record import Batch
from nanoflow_jax.serve.batches import BatchStore

Scenario = Callable[[BatchStore, served_batches.Adder], Coroutine[Any, Any, Any]]


def serving(folder: pathlib.Path, scenario: Scenario, **limits: Any) -> Any:
    """Opens the stores, as a start of the server does, and lets something happen."""

    async def timed(store: BatchStore) -> Any:
        async with asyncio.timeout(60):
            return await scenario(store, served_batches.Adder())

    with served_batches.open_store(folder, **limits) as store:
        return asyncio.run(timed(store))


def answer_batch(
    folder: pathlib.Path, lines: Sequence[Any], endpoint: Endpoint = Endpoint.COMPLETIONS
) -> tuple[Batch, list[dict[str, Any]], list[dict[str, Any]]]:
    """A batch from its beginning to its end, its answers and its errors."""

    async def scenario(store: BatchStore, engine: served_batches.Adder) -> Any:
        async with served_batches.running(store, engine):
            made = store.create(endpoint, served_batches.put(store, lines), {})
            (batch,) = await served_batches.ended(store, made.id)
        return (
            batch,
            served_batches.read(store, batch.output_file_id),
            served_batches.read(store, batch.error_file_id),
        )

    return serving(folder, scenario)


def errors_of(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {row["custom_id"]: row["error"]["message"] for row in rows}
