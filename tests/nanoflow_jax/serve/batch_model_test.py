"""What rows of a server's batch ask of the engine."""

import asyncio
import pathlib
from typing import Any

import served_batches

from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.serve.batch_record import Status


def test_rows_keep_their_order_of_priority_behind_live_requests(tmp_path: pathlib.Path) -> None:
    lines = served_batches.rows(3)
    lines[0]["body"]["priority"] = -1000
    lines[2]["body"]["priority"] = 7

    async def scenario() -> dict[str, int]:
        engine = served_batches.Adder()
        with served_batches.open_store(tmp_path) as store:
            async with served_batches.running(store, engine):
                made = store.create(Endpoint.COMPLETIONS, served_batches.put(store, lines), {})
                await served_batches.ended(store, made.id)
        return engine.priorities

    found = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert found == {"0.0": 2000, "1.0": 3000, "2.0": 3007}
    assert min(found.values()) > 1000  # the lowest of a live request


def test_a_row_past_its_time_leaves_the_engine_and_is_an_error(tmp_path: pathlib.Path) -> None:
    lines = served_batches.rows(3)
    lines[1]["body"]["timeout_s"] = 0.01

    async def scenario() -> tuple[Any, Any, Any]:
        engine = served_batches.Adder()
        engine.flow.clear()
        with served_batches.open_store(tmp_path) as store:
            async with served_batches.running(store, engine):
                made = store.create(Endpoint.COMPLETIONS, served_batches.put(store, lines), {})
                await served_batches.until(lambda: engine.aborted)
                assert engine.aborted == [f"{made.id}/1.0"]
                engine.flow.set()
                (batch,) = await served_batches.ended(store, made.id)
            return (
                batch,
                served_batches.read(store, batch.output_file_id),
                served_batches.read(store, batch.error_file_id),
            )

    batch, good, bad = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert batch.status is Status.COMPLETED
    assert [row["custom_id"] for row in good] == ["id-0", "id-2"]
    assert [(row["custom_id"], row["error"]["code"]) for row in bad] == [("id-1", "timeout")]
