"""Runs batch jobs in this process, and reads what they wrote."""

import pathlib
from typing import Any

import batch_runs

from nanoflow_jax import config, llm
from nanoflow_jax.batch import job, resume, rows, run

GREEDY = {"temperature": 0, "max_tokens": 6}
SECTION = config.ModelSection(model=str(batch_runs.FOLDER), max_context_len=128)


def make_options(folder: pathlib.Path, **changes: Any) -> resume.Options:
    merged = {
        "input": folder / "in.jsonl",
        "output": folder / "out.jsonl",
        "defaults": rows.Defaults(sampling={}, seed=0),
        **changes,
    }
    return resume.Options(**merged)


def run_job(
    model: llm.LLM,
    options: resume.Options,
    *,
    stop_after: int | None = None,
    lookahead: int = 16,
    section: config.ModelSection = SECTION,
) -> run.State:
    with job.open_job(options, section) as opened:
        limit = opened.num_rows + 1 if stop_after is None else opened.num_done + stop_after
        state = opened.run(
            model,
            lookahead=lookahead,
            report=lambda state: None,
            should_stop=lambda: opened.num_done >= limit,
        )
    assert model.generator.num_pending == 0
    return state


def answers_of(
    model: llm.LLM, folder: pathlib.Path, lines: list[Any], **changes: Any
) -> list[dict[str, Any]]:
    batch_runs.write(folder / "in.jsonl", lines)
    options = make_options(folder, **changes)
    run_job(model, options)
    return batch_runs.read(options.shard_output)


def body_of(row: dict[str, Any]) -> dict[str, Any]:
    assert row["error"] is None, row["error"]
    assert row["response"]["status_code"] == 200
    body: dict[str, Any] = row["response"]["body"]
    return body
