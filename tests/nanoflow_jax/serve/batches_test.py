"""Batches over a fake engine and the real one."""

import asyncio
import errno
import os
import pathlib
import subprocess
import sys
from typing import Any

import batch_runs
import pytest
import served_batches
from batch_store_runs import answer_batch, errors_of, serving

from nanoflow_jax import llm
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.serve import batch_runner, batches, files
from nanoflow_jax.serve.batch_record import Batch, Status
from nanoflow_jax.serve.batches import BatchStore


def test_a_batch_is_answered_into_two_files(tmp_path: pathlib.Path) -> None:
    lines = [*served_batches.rows(3), "{", *served_batches.rows(4)[3:]]
    batch, good, bad = answer_batch(tmp_path, lines)
    assert batch.status is Status.COMPLETED
    assert (batch.total, batch.completed, batch.failed) == (5, 4, 1)
    assert [row["custom_id"] for row in good] == ["id-0", "id-1", "id-2", "id-3"]
    # Row i asks for two tokens after [i, 1]: the engine answers with the sum.
    texts = [row["response"]["body"]["choices"][0]["text"] for row in good]
    assert texts == ["1 1", "2 2", "3 3", "4 4"]
    assert all(row["error"] is None and row["response"]["status_code"] == 200 for row in good)
    assert list(good[0]) == ["id", "custom_id", "response", "error"]
    assert errors_of(bad).keys() == {"row-3"}
    assert "line 4 is not JSON" in errors_of(bad)["row-3"]
    assert list(batch.times) == ["validating", "in_progress", "finalizing", "completed"]


def test_a_batch_without_errors_has_no_error_file(tmp_path: pathlib.Path) -> None:
    batch, good, bad = answer_batch(tmp_path, served_batches.rows(2))
    assert (len(good), bad, batch.error_file_id) == (2, [], None)


def test_a_batch_of_errors_alone_has_no_output_file(tmp_path: pathlib.Path) -> None:
    batch, good, bad = answer_batch(tmp_path, ["x", "y"])
    assert (good, len(bad), batch.output_file_id) == ([], 2, None)
    assert batch.status is Status.COMPLETED


def test_rows_that_cannot_be_served_fail_alone(tmp_path: pathlib.Path) -> None:
    lines = served_batches.rows(8)
    lines[0]["url"] = "/v1/chat/completions"
    lines[0]["body"] = {"messages": [{"role": "user", "content": "x"}]}
    lines[1]["url"] = "/v1/embeddings"
    lines[2]["body"]["model"] = "gpt-x"
    lines[3]["body"]["prompt"] = [1, served_batches.REFUSED]
    lines[4]["body"]["prompt"] = ""
    lines[5]["custom_id"] = "id-7"
    lines[6]["body"]["model"] = "adder"
    batch, good, bad = answer_batch(tmp_path, lines)
    assert [row["custom_id"] for row in good] == ["id-7", "id-6"]
    wanted = {
        "id-0": "the row is for /v1/chat/completions and the batch for /v1/completions",
        "id-1": "url='/v1/embeddings' is not one of",
        "id-2": "the model 'gpt-x' is not served here; use one of adder",
        "id-3": "999 is not a token id of this model",
        "id-4": "the prompt has no tokens",
        "id-7": "custom_id 'id-7' was used before, in line 6",
    }
    found = errors_of(bad)
    assert found.keys() == wanted.keys()
    for name, message in wanted.items():
        assert message in found[name]
    codes = {row["custom_id"]: row["response"]["status_code"] for row in bad}
    assert (codes["id-0"], codes["id-2"]) == (400, 404)
    assert batch.failed == 6


def test_chats_and_several_prompts_are_answered(tmp_path: pathlib.Path) -> None:
    chat = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 1}
    _, good, _ = answer_batch(tmp_path / "a", [{"custom_id": "c", **chat}], Endpoint.CHAT)
    assert good[0]["response"]["body"]["choices"][0]["message"]["content"] == "195"
    row = {"prompt": [[1, 2], [3, 4]], "n": 2, "max_tokens": 1}
    _, good, _ = answer_batch(tmp_path / "b", [row])
    texts = [choice["text"] for choice in good[0]["response"]["body"]["choices"]]
    assert texts == ["3", "3", "7", "7"]


def test_one_refused_prompt_fails_its_row_and_frees_the_others(tmp_path: pathlib.Path) -> None:
    async def scenario(store: BatchStore, engine: served_batches.Adder) -> None:
        row = {"prompt": [[1], [served_batches.REFUSED], [served_batches.REFUSED, 1]]}
        engine.flow.clear()
        async with served_batches.running(store, engine):
            made = store.create(Endpoint.COMPLETIONS, served_batches.put(store, [row]), {})
            (batch,) = await served_batches.ended(store, made.id)
        assert (batch.completed, batch.failed) == (0, 1)
        assert engine.aborted == [f"{made.id}/0.0"]
        assert not engine.active

    serving(tmp_path, scenario)


@pytest.mark.parametrize("lines", [[""], ["", "", ""]])
def test_an_input_without_rows_fails(tmp_path: pathlib.Path, lines: list[str]) -> None:
    batch, good, bad = answer_batch(tmp_path, lines)
    assert batch.status is Status.FAILED
    assert [problem.code for problem in batch.problems] == ["empty_file"]
    assert (good, bad) == ([], [])


def test_an_input_that_is_gone_from_the_disk_fails(tmp_path: pathlib.Path) -> None:
    with served_batches.open_store(tmp_path) as store:
        file_id = served_batches.put(store, served_batches.rows(1))
        made = store.create(Endpoint.COMPLETIONS, file_id, {})
    for path in (tmp_path / "files").glob(f"{file_id}*"):
        path.unlink()

    async def scenario(store: BatchStore, engine: served_batches.Adder) -> Batch:
        async with served_batches.running(store, engine):
            return (await served_batches.ended(store, made.id))[0]

    batch = serving(tmp_path, scenario)
    assert batch.status is Status.FAILED
    assert batch.problems[0].code == "file_not_found"


def test_rows_wait_outside_the_engine_and_few_batches_run_at_once(tmp_path: pathlib.Path) -> None:
    async def scenario(store: BatchStore, engine: served_batches.Adder) -> None:
        engine.flow.clear()
        file_id = served_batches.put(store, served_batches.rows(20))
        async with served_batches.running(store, engine, max_running=2, lookahead=3):
            ids = []
            for _ in range(3):
                ids.append(store.create(Endpoint.COMPLETIONS, file_id, {}).id)
                await served_batches.until(lambda: len(engine.active) == 3 * min(2, len(ids)))
            assert [store.get(i).status for i in ids] == [
                Status.IN_PROGRESS,
                Status.IN_PROGRESS,
                Status.VALIDATING,
            ]
            engine.flow.set()
            await served_batches.ended(store, *ids)
        assert engine.most_active <= 6
        assert len(engine.seen) == len(set(engine.seen)) == 60

    serving(tmp_path, scenario)


def test_cancel_keeps_the_finished_rows(tmp_path: pathlib.Path) -> None:
    async def scenario(store: BatchStore, engine: served_batches.Adder) -> None:
        async with served_batches.running(store, engine, lookahead=4):
            file_id = served_batches.put(store, [*served_batches.rows(300), "bad"])
            made = store.create(Endpoint.COMPLETIONS, file_id, {})
            await served_batches.until(lambda: store.get(made.id).completed >= 5)
            await engine.hold(num_active=4)
            assert store.cancel(made.id).status is Status.CANCELLING
            assert store.cancel(made.id).status is Status.CANCELLING
            (batch,) = await served_batches.ended(store, made.id)
        assert batch.status is Status.CANCELLED
        assert batch.total == 301
        assert 5 <= batch.completed == len(served_batches.read(store, batch.output_file_id)) < 300
        assert len(engine.aborted) == 4
        assert list(batch.times) == ["validating", "in_progress", "cancelling", "cancelled"]
        with pytest.raises(ApiError, match="the batch is cancelled and cannot be") as caught:
            store.cancel(made.id)
        assert caught.value.status_code == 409
        store.files.delete(file_id)

    serving(tmp_path, scenario)


def test_a_batch_that_waits_is_cancelled_without_its_turn(tmp_path: pathlib.Path) -> None:
    async def scenario(store: BatchStore, engine: served_batches.Adder) -> None:
        engine.flow.clear()
        file_id = served_batches.put(store, served_batches.rows(2))
        async with served_batches.running(store, engine, max_running=1):
            first, second = (store.create(Endpoint.COMPLETIONS, file_id, {}).id for _ in range(2))
            await served_batches.until(lambda: len(engine.active) == 2)
            store.cancel(second)
            (batch,) = await served_batches.ended(store, second)
            assert batch.status is Status.CANCELLED
            assert (batch.output_file_id, batch.error_file_id) == (None, None)
            engine.flow.set()
            await served_batches.ended(store, first)

    serving(tmp_path, scenario)


def test_a_busy_engine_is_asked_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoflow_jax.serve.batch_model._BUSY_S", 0.01)

    async def scenario(store: BatchStore, engine: served_batches.Adder) -> None:
        engine.num_busy = 5
        async with served_batches.running(store, engine):
            file_id = served_batches.put(store, served_batches.rows(3))
            made = store.create(Endpoint.COMPLETIONS, file_id, {})
            (batch,) = await served_batches.ended(store, made.id)
        assert (batch.completed, engine.num_busy) == (3, 0)

    serving(tmp_path, scenario)


def test_batches_that_wait_are_bounded_and_old_ones_are_forgotten(tmp_path: pathlib.Path) -> None:
    limits = batches.Limits(max_waiting=2, max_batches=3)

    async def scenario(store: BatchStore, engine: served_batches.Adder) -> None:
        file_id = served_batches.put(store, served_batches.rows(1))
        for _ in range(2):
            store.create(Endpoint.COMPLETIONS, file_id, {})
        with pytest.raises(ApiError, match="2 batches wait or run, which is the most") as caught:
            store.create(Endpoint.COMPLETIONS, file_id, {})
        assert caught.value.status_code == 429
        async with served_batches.running(store, engine):
            for _ in range(3):
                await served_batches.ended(store, *(batch.id for batch in store.all()))
                store.create(Endpoint.COMPLETIONS, file_id, {})
            await served_batches.ended(store, *(batch.id for batch in store.all()))
        assert len(store.all()) == 3
        store.files.delete(file_id)

    serving(tmp_path, scenario, limits=limits)


def test_a_result_is_no_input(tmp_path: pathlib.Path) -> None:
    batch, _, _ = answer_batch(tmp_path, served_batches.rows(1))
    with served_batches.open_store(tmp_path) as store:
        assert batch.output_file_id is not None
        with pytest.raises(ApiError, match="is a result and no input"):
            store.create(Endpoint.COMPLETIONS, batch.output_file_id, {})
        store.files.delete(batch.output_file_id)


def test_a_record_that_cannot_be_written_is_no_batch(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served_batches.open_store(tmp_path) as store:
        file_id = served_batches.put(store, served_batches.rows(1))

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refuse)
            with pytest.raises(ApiError, match="disk is full") as caught:
                store.create(Endpoint.COMPLETIONS, file_id, {})
            assert caught.value.status_code == 507
        assert store.all() == []
        store.files.delete(file_id)


def test_the_front_process_needs_no_jax() -> None:
    code = (
        "import sys, nanoflow_jax.serve.batch_routes, nanoflow_jax.serve.batch_runner\n"
        "print([name for name in ('jax', 'grain', 'flax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=batch_runs.environment(PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


class _RealEngine:
    """The engine of an `LLM`, stepped by whoever waits for it."""

    def __init__(self, model: llm.LLM) -> None:
        self._model = model
        self._done: dict[str, Any] = {}

    async def ready(self) -> None:
        pass

    async def complete(self, request_id: str, prompt_ids: Any, params: Any, **_: Any) -> Any:
        self._model.submit(request_id, prompt_ids, params)
        try:
            while request_id not in self._done:
                self._done |= {done.request_id: done for done in self._model.step()}
                await asyncio.sleep(0)
            return self._done[request_id]
        finally:
            self._model.abort(request_id)


def test_a_real_model_answers_as_it_does_alone(tmp_path: pathlib.Path) -> None:
    greedy = {"temperature": 0, "max_tokens": 5, "return_token_ids": True}
    lines = [
        batch_runs.batch_row("text", prompt="Hello there", **greedy),
        batch_runs.batch_row("ids", prompt=[5, 6, 7], **greedy),
        batch_runs.batch_row("long", prompt=[1] * 200, **greedy),
    ]
    with llm.LLM(str(batch_runs.FOLDER), **batch_runs.KNOBS) as model:

        async def scenario(store: BatchStore, _: served_batches.Adder) -> Any:
            settings = batch_runner.Settings()
            runner = batch_runner.BatchRunner(
                store, _RealEngine(model), model, served_batches.IDENTITY, settings
            )
            task = asyncio.create_task(runner.run())
            file_id = served_batches.put(store, lines)
            made = store.create(Endpoint.COMPLETIONS, file_id, {})
            (batch,) = await served_batches.ended(store, made.id)
            task.cancel()
            await asyncio.wait([task])
            return [
                served_batches.read(store, name)
                for name in (batch.output_file_id, batch.error_file_id)
            ]

        good, bad = serving(tmp_path, scenario)
        params = llm.SamplingParams(temperature=0, max_tokens=5)
        wanted = model.generate(["Hello there", [5, 6, 7]], params)
    for row, result in zip(good, wanted, strict=True):
        (choice,) = row["response"]["body"]["choices"]
        assert (choice["text"], choice["token_ids"]) == (result.text, list(result.token_ids))
    assert "the prompt has 200 tokens" in errors_of(bad)["long"]


def test_defaults_of_the_stores_hold(tmp_path: pathlib.Path) -> None:
    with served_batches.open_store(tmp_path) as store:
        assert (store.limits, store.files.limits) == (batches.Limits(), files.Limits())
