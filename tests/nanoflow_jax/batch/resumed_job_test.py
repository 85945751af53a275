"""Jobs that go on: the same answers, and refusals of what would mix two jobs."""

import dataclasses
import errno
import os
import pathlib
from typing import Any

import batch_runs
import pytest
from job_runs import GREEDY, SECTION, answers_of, make_options, run_job

from nanoflow_jax import config, llm
from nanoflow_jax.batch import job, rows


def test_a_job_goes_on_where_it_stopped_and_ends_up_the_same(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    lines: list[Any] = [
        {"prompt": f"row {i}", "max_tokens": 3 + i % 5, "n": 1 + i % 2} for i in range(20)
    ]
    batch_runs.write(folder / "in.jsonl", [*lines, "bad", batch_runs.batch_row("a", prompt="x")])
    whole, parts = make_options(folder), make_options(folder, output=folder / "parts.jsonl")
    with job.open_job(whole, SECTION):
        pass
    record = (folder / "out.jsonl.job").read_bytes()
    (folder / "parts.jsonl.job").write_bytes(record)
    run_job(model, whole)
    starts = 0
    while True:
        state = run_job(model, parts, stop_after=4)
        starts += 1
        assert state.totals.num_rows == len(batch_runs.read(folder / "parts.jsonl"))
        if state.totals.num_rows == 22:
            break
        with open(folder / "parts.jsonl", "ab") as file:
            file.write(b'{"id": "batch_req_')
    assert starts >= 3
    one, other = (
        sorted((folder / n).read_bytes().splitlines()) for n in ("out.jsonl", "parts.jsonl")
    )
    assert one == other
    assert (folder / "out.jsonl.job").read_bytes() == record


def test_a_repeated_id_is_known_even_if_the_repetition_was_answered_first(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    lines = [
        batch_runs.batch_row("a", prompt="x", max_tokens=30, ignore_eos=True),
        batch_runs.batch_row("a", prompt="y"),
        batch_runs.batch_row("b", prompt="z", max_tokens=1),
    ]
    batch_runs.write(folder / "in.jsonl", lines)
    run_job(model, make_options(folder), stop_after=1)
    assert 0 not in batch_runs.numbers(batch_runs.read(folder / "out.jsonl"))
    run_job(model, make_options(folder))
    found = batch_runs.read(folder / "out.jsonl")
    assert [row["error"] is None for row in found] == [True, False, True]


def test_processes_share_the_rows_and_answer_as_one_does(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    lines = [{"prompt": f"row {i}", "max_tokens": 4} for i in range(11)]
    lines += [batch_runs.batch_row("a", prompt="x"), batch_runs.batch_row("a", prompt="x")]
    single = answers_of(model, folder, lines, output=folder / "one.jsonl")
    shared = []
    for k in range(3):
        options = make_options(folder, process_index=k, process_count=3)
        assert options.shard_output.name == f"out.jsonl.{k}-of-3"
        run_job(model, options)
        shared.append(batch_runs.read(options.shard_output))
        assert batch_runs.numbers(shared[-1]) == list(range(k, len(lines), 3))
    together = sorted((row for part in shared for row in part), key=batch_runs.row_number)
    for row, other in zip(single, together, strict=True):
        # `created` is each process's own.
        for body in (row["response"]["body"], other["response"]["body"]):
            body.pop("created", None)
        assert row == other


def test_f4_a_full_disk_ends_the_run_and_the_next_one_goes_on(
    model: llm.LLM, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x", **GREEDY}] * 6)
    real, left = os.write, 3

    def write(descriptor: int, data: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space left on device"):
            run_job(model, make_options(folder))
    assert model.generator.num_pending == 0
    assert len(batch_runs.read(folder / "out.jsonl")) == 3
    run_job(model, make_options(folder))
    assert batch_runs.numbers(batch_runs.read(folder / "out.jsonl")) == list(range(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("input", "the input file changed"),
        ("model", "the model's config or weights changed"),
        ("tokenizer", "the model's tokenizer, chat template or generation_config.json changed"),
        ("dtype", "--dtype, or the kind of device"),
        ("context", "--max_context_len changed"),
        ("seed", "--seed changed"),
        ("sampling", "the sampling defaults changed"),
    ],
)
def test_a_job_whose_answers_would_change_is_refused(
    folder: pathlib.Path, change: str, message: str
) -> None:
    copy = folder / "model"
    copy.mkdir()
    for path in batch_runs.FOLDER.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x"}])
    section = config.ModelSection(model=str(copy))
    with job.open_job(make_options(folder), section):
        pass
    options = make_options(folder)
    if change == "input":
        batch_runs.write(folder / "in.jsonl", [{"prompt": "y"}])
    elif change == "model":
        weights = (copy / "model.safetensors").read_bytes()
        size = int.from_bytes(weights[:8], "little")
        header = weights[8 : 8 + size].replace(b"}}", b"} }", 1)
        (copy / "model.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + weights[8 + size :]
        )
    elif change == "tokenizer":
        (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    elif change == "dtype":
        section = dataclasses.replace(section, dtype=config.Dtype.BFLOAT16)
    elif change == "context":
        section = dataclasses.replace(section, max_context_len=64)
    elif change == "seed":
        options = make_options(folder, defaults=rows.Defaults(sampling={}, seed=1))
    else:
        options = make_options(folder, defaults=rows.Defaults(sampling={"top_p": 0.5}, seed=0))
    with pytest.raises(ValueError, match=message), job.open_job(options, section):
        pass
    with job.open_job(dataclasses.replace(options, restart=True), section) as opened:
        assert not opened.is_finished


def test_restart_begins_again(model: llm.LLM, folder: pathlib.Path) -> None:
    found = answers_of(model, folder, [{"prompt": "x", **GREEDY}])
    again = answers_of(model, folder, [{"prompt": "yz", **GREEDY}], restart=True)
    assert len(again) == 1
    assert again[0]["id"] != found[0]["id"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_file_that_no_job_wrote_is_never_touched(folder: pathlib.Path, restart: bool) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x"}])
    (folder / "out.jsonl").write_text("precious")
    with (
        pytest.raises(ValueError, match=r"was not written by a batch job .*move it away"),
        job.open_job(make_options(folder, restart=restart), SECTION),
    ):
        pass
    assert (folder / "out.jsonl").read_text() == "precious"


def test_a_line_of_somebody_else_is_refused(model: llm.LLM, folder: pathlib.Path) -> None:
    answers_of(model, folder, [{"prompt": "x", **GREEDY}])
    with open(folder / "out.jsonl", "a") as file:
        file.write("hello\n")
    with (
        pytest.raises(ValueError, match="line 2 is not an answer of this job"),
        job.open_job(make_options(folder), SECTION),
    ):
        pass


def test_a_second_job_on_the_same_output_is_refused(folder: pathlib.Path) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x"}])
    with (
        job.open_job(make_options(folder), SECTION),
        pytest.raises(ValueError, match=r"another job is writing .*out\.jsonl"),
        job.open_job(make_options(folder), SECTION),
    ):
        pass


def test_places_that_cannot_be_an_output_are_refused(folder: pathlib.Path) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x"}])
    for changes, message in (
        ({"output": folder / "none" / "out.jsonl"}, "there is no folder .*none; make it first"),
        ({"output": folder}, "is not a plain file; give the name of a new one"),
        ({"output": folder / "in.jsonl"}, "is the input itself; give another file"),
        ({"output": folder / "in.jsonl", "restart": True}, "is the input itself"),
        ({"input": folder / "none.jsonl"}, "there is no such file"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            job.open_job(make_options(folder, **changes), SECTION),
        ):
            pass
    assert (folder / "in.jsonl").read_text() == '{"prompt": "x"}\n'
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]


def test_a_change_of_the_number_of_processes_is_refused(folder: pathlib.Path) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x"}])
    with job.open_job(make_options(folder, process_index=1, process_count=2), SECTION):
        pass
    for count in (1, 3):
        with (
            pytest.raises(ValueError, match=f"job of 2 processes and --process_count is {count}"),
            job.open_job(make_options(folder, process_count=count), SECTION),
        ):
            pass
    single = make_options(folder, output=folder / "single.jsonl")
    with job.open_job(single, SECTION):
        pass
    with (
        pytest.raises(ValueError, match="belongs to a job of one process"),
        job.open_job(dataclasses.replace(single, process_count=2), SECTION),
    ):
        pass


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 1)])
def test_a_process_number_outside_the_count_is_refused(
    folder: pathlib.Path, index: int, count: int
) -> None:
    with pytest.raises(ValueError, match=f"--process_index={index} is not from 0 to"):
        make_options(folder, process_index=index, process_count=count)
