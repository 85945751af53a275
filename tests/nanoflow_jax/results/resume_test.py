"""Runs that were killed: gone on with where they were, if it is still the same run."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import result_folders

from nanoflow_jax.results import folder, writer

_KILLED = """
import os, pathlib, signal, sys
import result_folders
from nanoflow_jax.results import writer
checkout = pathlib.Path(sys.argv[1])
root = checkout / "configs" / "results"
run = result_folders.run(setting={'windows': (1, 2)})  # read again as a list
result = writer.ResultWriter(root, run, project=checkout)
result.add_sample(result_folders.sample(0))
with open(result.path / "samples.jsonl", "a") as file:
    file.write('{"case": "mi')
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkout that a run was killed in, after one sample and a part of another."""
    checkout = result_folders.project(tmp_path)
    tests = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(checkout)],
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"},
        timeout=200,
        check=False,
    )
    assert done.returncode == -9
    return checkout


def _resume(checkout: pathlib.Path, **changes: Any) -> writer.ResultWriter:
    run = result_folders.run(**{"setting": {"windows": (1, 2)}, **changes})
    root = checkout / "configs" / "results"
    return writer.ResultWriter(root, run, project=checkout, resume=True)


def test_a_killed_run_goes_on_behind_its_last_whole_sample(killed: pathlib.Path) -> None:
    with _resume(killed, command=("another", "--budget")) as result:
        assert [sample.round for sample in result.samples()] == [0]
        result.add_sample(result_folders.sample(1))
        result.add_sample(result_folders.sample(2))
        assert [sample.round for sample in result.samples()] == [0, 1, 2]
        found = result.finish()
    assert (found.status, found.num_samples) == ("done", 3)
    assert len(folder.read(result.path).samples) == 3


def test_what_made_the_device_unfit_before_a_kill_still_counts_after_it(
    killed: pathlib.Path,
) -> None:
    first = _resume(killed)
    first.add_unfit(["clocks: held down"])
    os.close(first._samples)  # killed again
    with _resume(killed) as result:
        result.add_unfit([])
        result.add_sample(result_folders.sample(1))
        result.add_sample(result_folders.sample(2))
        found = result.finish()
    assert (found.status, found.unfit) == ("failed", ("clocks: held down",))
    assert found.message == "the device was not fit to be measured: clocks: held down"


def test_a_run_that_has_ended_is_not_gone_on_with(killed: pathlib.Path) -> None:
    _resume(killed).fail("interrupted")
    with pytest.raises(ValueError, match="the run has ended: its status is failed"):
        _resume(killed)


def test_other_work_is_not_gone_on_with(killed: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="the run that was cut off had other num_samples, seed"):
        _resume(killed, seed=1, num_samples=5)


def test_work_of_other_kernels_is_not_gone_on_with(killed: pathlib.Path) -> None:
    (killed / "pallas_kernels" / "toy.py").write_text("WIDTH = 3\n")
    with pytest.raises(ValueError, match="cut off had other is_clean, kernel_sources"):
        _resume(killed)


def test_a_run_that_still_goes_on_is_left_alone(killed: pathlib.Path) -> None:
    message = "another process is measuring into it"
    with _resume(killed), pytest.raises(ValueError, match=message):
        _resume(killed)


def test_a_run_that_still_goes_on_is_not_closed(killed: pathlib.Path) -> None:
    with _resume(killed) as result:
        with pytest.raises(ValueError, match="another process is measuring into it"):
            writer.close(result.path)
        result.add_sample(result_folders.sample(1))
        result.add_sample(result_folders.sample(2))
        assert result.finish().status == "done"


def test_a_run_that_was_killed_before_its_first_sample_is_closed(killed: pathlib.Path) -> None:
    path = writer.folder_of(killed / "configs/results", result_folders.run())
    (path / "samples.jsonl").unlink()
    assert writer.close(path).num_samples == 0


def test_a_folder_has_the_day_and_the_name(killed: pathlib.Path) -> None:
    with _resume(killed) as result:
        assert writer.folder_of(killed / "configs/results", result_folders.run()) == result.path
