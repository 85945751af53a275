"""One model in two processes with two devices each, as a user starts it."""

import contextlib
import pathlib
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import batch_runs
import process_runs
import pytest

from nanoflow_jax import console

_LLAMA = batch_runs.FOLDER.parent / "llama"
_ROWS = [
    {"prompt": "one two three", "max_tokens": 20, "temperature": 0, "logprobs": 3},
    {"prompt": "x" * 70, "max_tokens": 12, "temperature": 0, "logprobs": 2, "echo": True},
    {"prompt": "a b", "max_tokens": 16, "temperature": 0.9, "top_p": 0.8, "seed": 3},
    {"prompt": "c d e", "max_tokens": 16, "temperature": 0.7, "presence_penalty": 0.6, "seed": 4},
    {"prompt": "f", "max_tokens": 9, "temperature": 0, "structured_outputs": {"regex": "[a-c]{4}"}},
    {"prompt": "g", "max_tokens": 5, "stop": ["e", "a", "i"]},
]


def _flags(**more: object) -> list[str]:
    return batch_runs.flags(**{"model": _LLAMA, "cache_num_pages": 60, "dtype": "float32", **more})


def _answers(path: pathlib.Path) -> tuple[list[Any], list[float]]:
    """What each row was answered, and all log-probabilities apart from it: their last bits vary."""
    choices = [choice for row in batch_runs.read(path) for choice in _body(row)["choices"]]
    logprobs: list[float] = []
    for choice in choices:
        told = choice["logprobs"]
        if told is not None:
            logprobs += [value for value in told.pop("token_logprobs") if value is not None]
            tops = [top for top in told.pop("top_logprobs") if top is not None]
            logprobs += [value for top in tops for value in sorted(top.values())]
    return choices, logprobs


def _body(row: dict[str, Any]) -> dict[str, Any]:
    assert row["error"] is None
    return dict(row["response"]["body"])


def test_two_processes_give_the_answers_of_one(tmp_path: pathlib.Path) -> None:
    source = batch_runs.write(tmp_path / "in.jsonl", _ROWS)
    both, alone = tmp_path / "both.jsonl", tmp_path / "alone.jsonl"
    arguments = _flags(tensor_parallel=4, input=source, output=both)
    with process_runs.started(tmp_path, arguments) as processes:
        codes = [process.wait(process_runs.LIMIT_S) for process in processes]
    texts = [process_runs.said(tmp_path, i).read_text() for i in range(2)]
    assert codes == [0, 0], texts
    assert "device: 4 x cpu in 2 processes" in texts[0]
    assert [(tmp_path / f"out.{i}").read_text() for i in range(2)] == ["", ""]
    process = process_runs.start(tmp_path, 2, *_flags(input=source, output=alone))
    assert process.wait(process_runs.LIMIT_S) == 0
    found, wanted = _answers(both), _answers(alone)
    assert found[0] == wanted[0]
    assert len(found[1]) > 100
    assert found[1] == pytest.approx(wanted[1], abs=1e-4)


@contextlib.contextmanager
def _long_job(tmp_path: pathlib.Path) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Both processes in the middle of a job that takes longer than any test."""
    rows = [{"prompt": f"row {i}", "max_tokens": 90, "ignore_eos": True} for i in range(3000)]
    source, output = batch_runs.write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    arguments = _flags(tensor_parallel=4, buckets="32:8:8", input=source, output=output)
    with process_runs.started(tmp_path, arguments) as processes:
        process_runs.wait_until(
            lambda: output.exists() and output.stat().st_size > 0,
            tell=lambda: process_runs.said(tmp_path, 0).read_text(),
        )
        yield processes


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_f14_a_killed_process_ends_the_other_with_a_message(
    victim: int, tmp_path: pathlib.Path
) -> None:
    other = 1 - victim
    with _long_job(tmp_path) as processes:
        processes[victim].send_signal(signal.SIGKILL)
        code = processes[other].wait(60)
    text = process_runs.said(tmp_path, other).read_text()
    assert code == 1, text
    assert f"error: process {victim} has ended; all 2 processes end" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_an_interrupt_of_both_lets_process_0_finish_its_rows(tmp_path: pathlib.Path) -> None:
    with _long_job(tmp_path) as processes:
        for process in reversed(processes):
            process.send_signal(signal.SIGINT)
        codes = [process.wait(process_runs.LIMIT_S) for process in processes]
    texts = [process_runs.said(tmp_path, i).read_text() for i in range(2)]
    assert codes == [console.INTERRUPTED, 0], texts
    assert "run the same command again to go on" in texts[0]
    assert "error" not in texts[0] + texts[1]
    assert batch_runs.read(tmp_path / "out.jsonl")


@pytest.mark.slow
def test_what_keeps_one_process_from_starting_is_told_by_all(tmp_path: pathlib.Path) -> None:
    arguments = [*_flags(tensor_parallel=4), "--prompt=a"]
    other = str(batch_runs.FOLDER)
    with process_runs.started(tmp_path, arguments, second=[f"--model={other}"]) as processes:
        codes = [process.wait(60) for process in processes]
    texts = [process_runs.said(tmp_path, i).read_text() for i in range(2)]
    message = f"--model={other} is not the model of process 0, or other files of it; give all"
    assert codes == [1, 2], texts
    assert f"error: process 1 failed: {message}" in texts[0]
    assert f"error: {message}" in texts[1]
    assert "Traceback" not in texts[0] + texts[1]
