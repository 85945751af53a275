"""What a row asks beside its answer: to be finished in time, and its place in line."""

import dataclasses
import datetime
import itertools
import json
import pathlib

import batch_runs
import pytest

from nanoflow_jax import config, llm
from nanoflow_jax.batch import job, record, resume, rows, run
from nanoflow_jax.tokenizer import chat_template

_LONG = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    with llm.LLM(str(batch_runs.FOLDER), **batch_runs.KNOBS) as made:
        yield made


def _run(model: llm.LLM, folder: pathlib.Path, lines: list[object]) -> run.State:
    options = resume.Options(
        input=batch_runs.write(folder / "in.jsonl", lines),
        output=folder / "out.jsonl",
        defaults=rows.Defaults(sampling={}, seed=0),
    )
    section = config.ModelSection(model=str(batch_runs.FOLDER), max_context_len=128)
    with job.open_job(options, section) as opened:
        state = opened.run(model, lookahead=64, report=lambda state: None)
        assert opened.is_finished
    assert model.generator.num_pending == 0
    assert model.engine.num_pages_used == 0
    return state


def test_a_row_past_its_time_becomes_an_error_row_and_the_others_are_answered(model, tmp_path):
    lines = [{**_LONG, "timeout_s": 1e-4}, {**_LONG, "timeout_s": 1e6}, _LONG]
    state = _run(model, tmp_path, [*lines, {**_LONG, "n": 2, "timeout_s": 1e-4}])
    assert (state.totals.num_ok, state.totals.num_failed) == (2, 2)
    found = batch_runs.read(tmp_path / "out.jsonl")
    for row in (found[0], found[3]):
        assert row["response"]["status_code"] == 504
        assert row["error"] == {
            "code": "timeout",
            "message": "the row was not answered 0.0001 s after it was begun, its timeout_s",
        }
    for row in found[1:3]:
        assert row["response"]["body"]["usage"]["completion_tokens"] == 100


def test_a_template_that_writes_the_date_writes_that_of_the_job_whenever_a_row_is_answered(
    model, tmp_path, monkeypatch
):
    days = itertools.count(1)
    dated = chat_template.ChatTemplate(
        {"default": "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"},
        special_tokens={},
        clock=lambda: datetime.datetime(2020, 1, next(days)),
    )
    monkeypatch.setattr(model, "words", dataclasses.replace(model.words, template=dated))
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    _run(model, tmp_path, [{**chat, "return_token_ids": True}] * 2)
    dated.close()
    began = record.try_read(tmp_path / "out.jsonl.job").created
    day = datetime.datetime.fromtimestamp(began).strftime("%Y-%m-%d")
    for row in batch_runs.read(tmp_path / "out.jsonl"):
        ids = row["response"]["body"]["prompt_token_ids"]
        assert ids == model.tokenizer.encode(f"{day} x", add_special_tokens=False)


def test_rows_of_lower_priority_number_run_first(model, tmp_path):
    lines = [{**_LONG, "max_tokens": 20} for _ in range(24)]
    lines[23]["priority"] = -1
    lines[0]["priority"] = 1
    _run(model, tmp_path, lines)
    order = [
        batch_runs.row_number(json.loads(line))
        for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ]
    assert order.index(23) < 8  # eight run at once
    assert order.index(0) >= 16
