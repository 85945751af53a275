"""The program from its command line, as far as it gets without a compiler."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("model", [["--model=preset:llama-3-8b", "--random_weights"], []])
def test_what_cannot_be_compiled_is_refused_before_it_is_begun(model):
    command = [sys.executable, "-m", "nanoflow_jax.overlap", "--device=h200"]
    ended = subprocess.run(
        [*command, *(model or ["--model=llama-3-8b"]), "--tensor_parallel=3"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(
        "error: --tensor_parallel=3: 8 kv heads of 4 queries each cannot be shared out evenly"
    )
