"""The program: one command from sources to folder, and errors without a traceback."""

import os
import pathlib
import subprocess
import sys

import jax

from tests.nanoflow_jax.train_embedded import library


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    # The compile cache of the tests' own process serves the program too.
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_the_program_trains_and_writes_a_folder(tmp_path: pathlib.Path) -> None:
    chosen = library.tiny_settings(library.write(tmp_path / "sources"))
    knobs = [
        f"--{section.PREFIX}{name}={value}"
        for section in (chosen.corpus, chosen.shape, chosen.train)
        for name, value in vars(section).items()
    ]
    places = [f"--work_dir={tmp_path / 'work'}", f"--output={tmp_path / 'model'}"]
    done = _run("-m", "nanoflow_jax.train_embedded", *places, *knobs)
    assert done.returncode == 0, done.stderr
    assert "step 20/20  loss " in done.stdout
    assert "bits/byte" in done.stdout
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_wrong_input_is_one_line_and_a_failure(tmp_path: pathlib.Path) -> None:
    places = [f"--work_dir={tmp_path / 'work'}", f"--output={tmp_path / 'model'}"]
    done = _run("-m", "nanoflow_jax.train_embedded", *places, f"--corpus_root={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"error: --corpus_root={tmp_path} has no Python sources to train on"
    )
