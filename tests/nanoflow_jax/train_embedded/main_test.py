"""The program: one command from sources to folder, and errors without a traceback."""

import pathlib
import subprocess
import sys

import batch_runs

from nanoflow_jax.train_embedded import settings
from tests.nanoflow_jax.train_embedded import library


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, *words], batch_runs.environment()
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def _arguments(chosen: settings.Settings, folder: pathlib.Path) -> list[str]:
    places = [f"--work_dir={folder / 'work'}", f"--output={folder / 'model'}"]
    return places + [
        f"--{section.PREFIX}{name}={value}"
        for section in (chosen.corpus, chosen.shape, chosen.train)
        for name, value in vars(section).items()
    ]


def test_the_program_trains_and_writes_a_folder(tmp_path: pathlib.Path) -> None:
    chosen = library.tiny_settings(library.write(tmp_path / "sources"))
    done = _run("-m", "nanoflow_jax.train_embedded", *_arguments(chosen, tmp_path))
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


def test_wrong_input_is_one_line_and_exit_code_two(tmp_path: pathlib.Path) -> None:
    places = [f"--work_dir={tmp_path / 'work'}", f"--output={tmp_path / 'model'}"]
    done = _run("-m", "nanoflow_jax.train_embedded", *places, f"--corpus_root={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: --corpus_root={tmp_path} has no Python sources to train on"
    )


def test_an_output_that_is_a_file_is_refused_before_training(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model").touch()
    places = [f"--work_dir={tmp_path / 'work'}", f"--output={tmp_path / 'model'}"]
    done = _run("-m", "nanoflow_jax.train_embedded", *places)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: --output={tmp_path / 'model'} is no folder; give the name of a new one"
    )


def test_checkpoints_that_cannot_be_written_are_a_failure_of_the_run(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "checkpoints").touch()
    chosen = library.tiny_settings(library.write(tmp_path / "sources"))
    done = _run("-m", "nanoflow_jax.train_embedded", *_arguments(chosen, tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "run the same command again: it goes on where it was saved" in done.stderr
