"""The conversion program: messages, progress, kill -9."""

import pathlib
import shutil
import subprocess
import sys
import time

import batch_runs
import pytest
from absl import flags

from checkpoints import folder
from nanoflow_jax import console
from nanoflow_jax.convert import __main__ as program


def _main(*arguments: str) -> int:
    values = flags.FlagValues()
    program._define(values)
    left = values(["convert", *arguments])
    return console.run(lambda: program._run(values, left[1:]), say=program._say, debug=False)


def test_a_model_is_converted_and_verified(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert _main(f"--model={batch_runs.FOLDER}", f"--output={output}", "--verify") == 0
    said = capfd.readouterr().err
    assert "from safetensors to Orbax, into" in said
    assert f"done: --model={output} runs it" in said
    assert "comparing with the hashes" in said
    source, made = folder.ModelFolder.open(batch_runs.FOLDER), folder.ModelFolder.open(output)
    _assert_same(made, source)
    assert _main(f"--model={batch_runs.FOLDER}", f"--output={output}") == 0


def _assert_same(made: folder.ModelFolder, source: folder.ModelFolder) -> None:
    assert source.tensors.keys() == made.tensors.keys()
    for name in source.tensors:
        assert source.read(name).tobytes() == made.read(name).tobytes()


def test_an_orbax_folder_becomes_safetensors_again(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    assert _main(f"--model={batch_runs.FOLDER}", f"--output={orbax}") == 0
    assert _main(f"--model={orbax}", f"--output={back}", "--verify") == 0
    said = capfd.readouterr().err
    assert "from Orbax to safetensors, into" in said
    assert "comparing with the hashes" in said
    assert f"done: --model={back} runs it" in said
    made = folder.ModelFolder.open(back)
    assert (orbax / "manifest.json").exists()
    assert (back / "model.safetensors").exists()
    _assert_same(made, folder.ModelFolder.open(batch_runs.FOLDER))
    assert made.config == folder.ModelFolder.open(orbax).config


def test_folders_may_be_named_from_the_current_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _main(f"--model={batch_runs.FOLDER}", "--output=orbax", "--verify") == 0
    assert _main("--model=orbax", "--output=back", "--verify") == 0
    _assert_same(folder.ModelFolder.open("back"), folder.ModelFolder.open(str(batch_runs.FOLDER)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing; give --model=DIR --output=OUT"),
        (["--model=x"], "--output is missing"),
        (["--model=/none", "--output=y"], "/none: does not exist"),
        (["more"], "unknown argument 'more'"),
    ],
)
def test_what_is_wrong_is_one_message(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _main(*arguments) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_a_folder_with_something_else_is_kept(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    assert _main(f"--model={batch_runs.FOLDER}", f"--output={tmp_path}") == 2
    assert "give --output a new or empty folder" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_a_failure_of_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert _main(f"--model={batch_runs.FOLDER}", f"--output={tmp_path / 'out'}") == 1
    assert "make room, or give another --output" in capfd.readouterr().err


def test_a_killed_conversion_is_finished_by_the_same_command(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "nanoflow_jax.convert"]
    command += [f"--model={batch_runs.FOLDER}", f"--output={tmp_path / 'out'}"]
    with subprocess.Popen(
        command, env=batch_runs.environment(), stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            if (tmp_path / "out" / "config.json").exists():
                break
            time.sleep(0.001)
        process.kill()
    done = subprocess.run(
        [*command, "--verify"],
        env=batch_runs.environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert folder.ModelFolder.open(tmp_path / "out").tensors
