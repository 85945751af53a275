"""kill -9 at any moment: the job goes on and ends up as one that nobody disturbed."""

import json
import pathlib
import random
import subprocess
import sys
import time
from typing import Any

import batch_runs
import pytest

_NUM_ROWS = 60


def _rows() -> list[Any]:
    """Rows of every kind: greedy and drawn, choices, logprobs, chats, bad ones."""
    made: list[Any] = []
    for i in range(_NUM_ROWS):
        prompt = f"row {i} " * (1 + i % 4)
        length = 4 + 5 * (i % 9)
        chat = [{"role": "user", "content": prompt}]
        kinds: list[Any] = [
            {"prompt": prompt, "max_tokens": length, "temperature": 0, "logprobs": 2},
            {"prompt": prompt, "max_tokens": length, "n": 2},
            batch_runs.batch_row(f"id-{i}", messages=chat, max_tokens=length),
            batch_runs.batch_row(
                f"id-{i}", messages=chat, max_tokens=length, logprobs=True, top_logprobs=1
            ),
            {"prompt": [3, 4, i], "max_tokens": length, "top_p": 0.9, "stop": ["e"]},
            batch_runs.batch_row(f"id-{i % 2}", prompt=prompt, max_tokens=2, echo=True),
            '{"prompt": ',
        ]
        made.append(kinds[i % len(kinds)])
    return made


def _start(folder: pathlib.Path, name: str) -> "subprocess.Popen[bytes]":
    files = {"input": folder / "in.jsonl", "output": folder / name}
    with open(folder / f"{name}.stderr", "ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "nanoflow_jax.generate", *batch_runs.flags(**files)],
            env=batch_runs.environment(),
            stderr=stderr,
            stdout=subprocess.DEVNULL,
        )


def _finish(folder: pathlib.Path, name: str) -> None:
    code = _start(folder, name).wait(timeout=200)
    assert code == 0, (folder / f"{name}.stderr").read_text()


def _kill(process: "subprocess.Popen[bytes]", path: pathlib.Path, *, rows: int | None) -> int:
    """Kills a job shortly after it wrote so many rows, or at any moment of its first seconds.

    Returns:
        How many complete rows it left.
    """
    wait_s = random.uniform(0, 4) if rows is None else random.uniform(0, 0.03)
    deadline = time.monotonic() + 200
    while rows is not None and process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= rows:
            break
        time.sleep(0.001)
    time.sleep(wait_s)
    process.kill()
    process.wait(timeout=60)
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _without_logprobs(value: Any, found: list[float]) -> Any:
    """The same with every log-probability replaced, and these in order."""
    if isinstance(value, dict):
        return {key: _without_logprobs(inner, found) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_logprobs(inner, found) for inner in value]
    if isinstance(value, float):
        found.append(value)
        return "a log-probability"
    return value


def _check_same(one: pathlib.Path, other: pathlib.Path) -> None:
    values: tuple[list[float], list[float]] = ([], [])
    texts = [
        [json.dumps(_without_logprobs(row, found)) for row in batch_runs.read(path)]
        for path, found in zip((one, other), values, strict=True)
    ]
    assert texts[0] == texts[1]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def _check_kills(folder: pathlib.Path, num_kills: int) -> None:
    batch_runs.write(folder / "in.jsonl", _rows())
    left = []
    for i in range(num_kills):
        process = _start(folder, "killed.jsonl")
        # Every third while it starts: its record, its compilation, the reading of its output.
        rows = None if i % 3 == 0 else 1 + i * (_NUM_ROWS - 2) // num_kills
        left.append(_kill(process, folder / "killed.jsonl", rows=rows))
    assert left == sorted(left)
    assert left[-1] > left[0]
    _finish(folder, "killed.jsonl")
    # `id` and `created` come from the record of the job.
    (folder / "whole.jsonl.job").write_bytes((folder / "killed.jsonl.job").read_bytes())
    _finish(folder, "whole.jsonl")
    assert batch_runs.numbers(batch_runs.read(folder / "whole.jsonl")) == list(range(_NUM_ROWS))
    _check_same(folder / "whole.jsonl", folder / "killed.jsonl")
    stderr = (folder / "killed.jsonl.stderr").read_text()
    assert "rows are there already" in stderr
    assert "Traceback" not in stderr


def test_f3_a_job_killed_at_three_moments_ends_up_the_same(tmp_path: pathlib.Path) -> None:
    _check_kills(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_f3_a_job_killed_at_twenty_moments_ends_up_the_same(tmp_path: pathlib.Path) -> None:
    _check_kills(tmp_path, 20)
