"""A tiny model for batch jobs and programs: its knobs, and rows to ask it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from golden import cases

FOLDER = pathlib.Path(cases.__file__).parent / "qwen3"
KNOBS: Mapping[str, Any] = {
    "max_requests": 8,
    "dense_batch": 32,
    "cache_page_size": 8,
    # 112 tokens: less than the context, so that a request can be too big for the memory.
    "cache_num_pages": 14,
    "max_context_len": 128,
    "buckets": "8:8:0,32:8:8",
}


def flags(**more: Any) -> list[str]:
    """The knobs as a command line, with further flags."""
    return [f"--{name}={value}" for name, value in {"model": FOLDER, **KNOBS, **more}.items()]


def environment(**more: str) -> dict[str, str]:
    """What a program needs to start quickly: the compiled programs of these tests, if kept."""
    root = pathlib.Path(__file__).parents[1]
    return {
        **os.environ,
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        # An empty name keeps nothing, where that of None would be a folder.
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        **more,
    }


def bench(folder: pathlib.Path, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """A benchmark's program, started in a folder; `more` is of its environment."""
    return subprocess.run(
        [sys.executable, "-m", "nanoflow_jax.bench", *arguments],
        env=environment(**more),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def run_until_killed(script: str, *arguments: object, also: Sequence[pathlib.Path] = ()) -> None:
    """Python that must end by SIGKILL; it imports what tests do, and from folders of `also`."""
    tests = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment(PYTHONPATH=":".join(map(str, (*also, tests, tests.parent)))),
        timeout=250,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


def batch_row(custom_id: str, **body: Any) -> dict[str, Any]:
    """A row of OpenAI's format."""
    kind = "chat/completions" if "messages" in body else "completions"
    return {"custom_id": custom_id, "method": "POST", "url": f"/v1/{kind}", "body": body}


def write(path: pathlib.Path, rows: Iterable[Any]) -> pathlib.Path:
    """Writes rows, or raw lines, as JSONL."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of an output by their numbers; it must consist of complete lines."""
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    rows = [json.loads(line) for line in data.splitlines()]
    return sorted(rows, key=row_number)


def row_number(row: Mapping[str, Any]) -> int:
    """The number that an output row answers."""
    return int(row["id"].rpartition("-")[2])


def numbers(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers that output rows answer."""
    return [row_number(row) for row in rows]
