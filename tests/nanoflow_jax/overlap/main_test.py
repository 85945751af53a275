"""The program from its command line, as far as it gets without a compiler."""

import subprocess
import sys


def test_what_cannot_be_compiled_is_refused_before_it_is_begun():
    command = [sys.executable, "-m", "nanoflow_jax.overlap", "--model=preset:llama-3-8b"]
    ended = subprocess.run(
        [*command, "--random_weights", "--tensor_parallel=3"],
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
