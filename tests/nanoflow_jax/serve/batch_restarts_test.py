"""Batches that outlive their engine, their server and their disk; kill -9 at every write."""

import errno
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import batch_kills
import batch_runs
import pytest
import served_batches
from batch_store_runs import answer_batch, errors_of, serving

from nanoflow_jax.batch import record
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.serve.batch_record import Batch, Status
from nanoflow_jax.serve.batches import BatchStore


def test_a_stopped_server_goes_on_where_it_was(tmp_path: pathlib.Path) -> None:
    answered = []

    async def part(store: BatchStore, engine: served_batches.Adder) -> Batch:
        made = store.all() or [
            store.create(
                Endpoint.COMPLETIONS, served_batches.put(store, served_batches.rows(40)), {}
            )
        ]
        before = made[0].completed
        async with served_batches.running(store, engine, lookahead=2):
            await served_batches.until(
                lambda: store.get(made[0].id).completed >= min(40, before + 15)
            )
            if before + 15 >= 40:
                await served_batches.ended(store, made[0].id)
        answered.append(store.get(made[0].id).completed)
        assert not engine.active
        return store.get(made[0].id)

    while True:
        batch = serving(tmp_path, part)
        if batch.status.is_ended:
            break
        assert batch.status is Status.IN_PROGRESS
    assert len(answered) >= 2
    assert answered == sorted(answered)
    with served_batches.open_store(tmp_path) as store:
        good = served_batches.read(store, batch.output_file_id)
    assert [row["custom_id"] for row in good] == [f"id-{i}" for i in range(40)]


def test_rows_go_on_with_the_next_engine(tmp_path: pathlib.Path) -> None:
    async def scenario(store: BatchStore, engine: served_batches.Adder) -> None:
        file_id = served_batches.put(store, served_batches.rows(30))
        async with served_batches.running(store, engine, lookahead=4):
            made = store.create(Endpoint.COMPLETIONS, file_id, {})
            await served_batches.until(lambda: store.get(made.id).completed >= 5)
            await engine.hold(num_active=4)
            engine.lose()
            await served_batches.until(lambda: not engine.active)
            engine.up.set()
            engine.flow.set()
            (batch,) = await served_batches.ended(store, made.id)
        assert (batch.completed, batch.failed) == (30, 0)
        assert len(engine.seen) == 34
        good = served_batches.read(store, batch.output_file_id)
        assert [row["custom_id"] for row in good] == [f"id-{i}" for i in range(30)]

    serving(tmp_path, scenario)


def test_a_row_that_ends_every_engine_fails_alone(tmp_path: pathlib.Path) -> None:
    lines = served_batches.rows(3)
    lines[1]["body"]["prompt"] = [served_batches.POISON]
    batch, good, bad = answer_batch(tmp_path, lines)
    assert [row["custom_id"] for row in good] == ["id-0", "id-2"]
    assert "the engine ended 3 times while it answered this row" in errors_of(bad)["id-1"]
    assert bad[0]["response"]["status_code"] == 500
    assert batch.status is Status.COMPLETED


def test_f4_a_full_disk_makes_a_batch_wait_and_go_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, num_refused = os.write, 0

    def write(descriptor: int, data: Any) -> int:
        nonlocal num_refused
        begins = num_refused == 0 and b"batch_req" in bytes(data)
        if begins or 0 < num_refused <= 3:
            num_refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    batch, good, _ = answer_batch(tmp_path, served_batches.rows(10))
    assert num_refused == 4
    assert batch.status is Status.COMPLETED
    assert [row["custom_id"] for row in good] == [f"id-{i}" for i in range(10)]


def test_a_batch_of_another_model_fails_and_keeps_its_rows(tmp_path: pathlib.Path) -> None:
    async def begin(store: BatchStore, engine: served_batches.Adder) -> str:
        file_id = served_batches.put(store, served_batches.rows(50))
        async with served_batches.running(store, engine, lookahead=2):
            made = store.create(Endpoint.COMPLETIONS, file_id, {})
            await served_batches.until(lambda: store.get(made.id).completed >= 3)
            engine.flow.clear()
        return made.id

    batch_id = serving(tmp_path, begin)
    other = record.ModelIdentity(
        name="other", model="products", tokenizer="letters", dtype="int", max_context_len=64
    )

    async def go_on(store: BatchStore, engine: served_batches.Adder) -> None:
        async with served_batches.running(store, engine, identity=other):
            (batch,) = await served_batches.ended(store, batch_id)
        assert batch.status is Status.FAILED
        assert batch.problems[0].code == "server_changed"
        assert "weights changed (sums then, products now)" in batch.problems[0].message
        assert len(served_batches.read(store, batch.output_file_id)) == batch.completed >= 3
        assert not engine.seen

    serving(tmp_path, go_on)


def test_damaged_rows_fail_the_batch_and_keep_the_others(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def begin(store: BatchStore, engine: served_batches.Adder) -> str:
        file_id = served_batches.put(store, served_batches.rows(50))
        async with served_batches.running(store, engine, lookahead=2):
            made = store.create(Endpoint.COMPLETIONS, file_id, {})
            await served_batches.until(lambda: store.get(made.id).completed >= 3)
            engine.flow.clear()
        return made.id

    batch_id = serving(tmp_path, begin)
    with open(tmp_path / "batches" / f"{batch_id}.rows", "ab") as file:
        file.write(b"garbage\n")

    async def go_on(store: BatchStore, engine: served_batches.Adder) -> None:
        async with served_batches.running(store, engine):
            (batch,) = await served_batches.ended(store, batch_id)
        assert (batch.status, batch.problems[0].code) == (Status.FAILED, "server_error")
        assert str(tmp_path) not in batch.problems[0].message
        assert len(served_batches.read(store, batch.output_file_id)) == batch.completed >= 3

    serving(tmp_path, go_on)
    assert "is not an answer of this job" in caplog.text


def test_an_engine_that_breaks_its_contract_fails_the_batch(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(served_batches.Adder):
        async def complete(self, *args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError("a bug")

    async def scenario(store: BatchStore, _: served_batches.Adder) -> None:
        async with served_batches.running(store, Broken()):
            file_id = served_batches.put(store, served_batches.rows(2))
            made = store.create(Endpoint.COMPLETIONS, file_id, {})
            (batch,) = await served_batches.ended(store, made.id)
        assert (batch.status, batch.problems[0].code) == (Status.FAILED, "server_error")

    serving(tmp_path, scenario)
    assert "a bug" in caplog.text


def test_an_input_in_use_is_not_deleted_even_after_a_restart(tmp_path: pathlib.Path) -> None:
    with served_batches.open_store(tmp_path) as store:
        file_id = served_batches.put(store, served_batches.rows(1))
        store.create(Endpoint.COMPLETIONS, file_id, {})
    with (
        served_batches.open_store(tmp_path) as store,
        pytest.raises(ApiError, match="a batch still reads"),
    ):
        store.files.delete(file_id)


@pytest.mark.parametrize("damage", ["{", "[]", '{"endpoint": 1}'])
def test_a_damaged_record_is_named_at_the_start(tmp_path: pathlib.Path, damage: str) -> None:
    with served_batches.open_store(tmp_path) as store:
        file_id = served_batches.put(store, served_batches.rows(1))
        made = store.create(Endpoint.COMPLETIONS, file_id, {})
    (tmp_path / "batches" / f"{made.id}.json").write_text(damage)
    with (
        pytest.raises(ValueError, match=rf"{made.id}\.json is damaged .*move it out of"),
        served_batches.open_store(tmp_path),
    ):
        pass


def test_f3_a_batch_killed_at_every_write_has_every_row_once(tmp_path: pathlib.Path) -> None:
    """F3: kill -9 during the writing of results."""
    done = subprocess.run(
        [sys.executable, batch_kills.__file__, str(tmp_path)],
        env=batch_runs.environment(PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_places = int(done.stdout.split()[0])
    assert num_places > 20, done.stdout


def test_counts_of_an_unfinished_batch_are_those_of_its_rows_at_once_after_a_restart(
    tmp_path: pathlib.Path,
) -> None:
    async def begin(store: BatchStore, engine: served_batches.Adder) -> Batch:
        file_id = served_batches.put(store, ["bad", *served_batches.rows(100)])
        async with served_batches.running(store, engine, lookahead=2):
            made = store.create(Endpoint.COMPLETIONS, file_id, {})
            await served_batches.until(lambda: store.get(made.id).completed >= 7)
            engine.flow.clear()
        return store.get(made.id)

    before = serving(tmp_path, begin)
    assert before.failed == 1
    with served_batches.open_store(tmp_path) as store:
        assert store.get(before.id) == before
        value = json.loads((tmp_path / "batches" / f"{before.id}.json").read_text())
    assert value["completed"] == 0
