import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import result_folders

from nanoflow_jax.results import folder, manifest, writer
from nanoflow_jax.results.kind import Tokens


def test_a_finished_run_is_a_folder_with_its_figures(checkout: pathlib.Path) -> None:
    path, found = result_folders.write(checkout)

    assert path == checkout / "configs/results/cpu-abacus-7-x2" / f"{found.date}-toy-mix"
    assert sorted(file.name for file in path.iterdir()) == [
        "log.txt",
        "manifest.json",
        "samples.jsonl.gz",
    ]
    assert (found.status, found.message, found.num_samples) == ("done", "", 3)
    output, both = found.figures
    assert (output.name, output.median, output.low, output.high) == ("mix: output", 40, 25, 50)
    assert both.median == 160 / 2.5
    assert manifest.read(path) == found
    assert [one.seconds for one in folder.read(path).samples] == [2.0, 2.5, 4.0]


def test_a_result_knows_the_code_that_made_it(
    checkout: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    head = result_folders.git(checkout, "rev-parse", "HEAD")
    _, found = result_folders.write(checkout)

    assert (found.origin.commit, found.origin.is_clean) == (head, True)
    assert list(found.origin.kernel_sources) == [
        "pallas_kernels/pieces.py",
        "pallas_kernels/toy.py",
    ]
    assert found.origin.versions["python"] == sys.version.split()[0]
    assert found.origin.versions["jax"]
    assert found.origin.environment["JAX_PLATFORMS"] == "cpu"
    assert "JAX_COMPILATION_CACHE_DIR" not in found.origin.environment
    assert found.load is not None
    assert found.load >= 0


def test_a_second_result_is_of_a_clean_tree_although_the_first_is_not_committed(
    checkout: pathlib.Path,
) -> None:
    result_folders.write(checkout)
    _, found = result_folders.write(checkout, name="again")
    assert found.origin.is_clean


def test_a_changed_or_a_new_file_makes_the_tree_dirty(checkout: pathlib.Path) -> None:
    (checkout / "new.py").write_text("")
    _, found = result_folders.write(checkout)
    assert not found.origin.is_clean


def test_no_checkout_gives_no_commit(checkout: pathlib.Path) -> None:
    inside = checkout / "site-packages"
    (inside / "pallas_kernels").mkdir(parents=True)
    _, found = result_folders.write(inside, kernels=())
    assert (found.origin.commit, found.origin.is_clean) == (None, False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_an_exception_leaves_a_failed_result_with_what_was_measured(
    error: BaseException, message: str, checkout: pathlib.Path
) -> None:
    result = writer.ResultWriter(checkout, result_folders.run(), project=checkout)

    def measure() -> None:
        with result:
            result.add_sample(result_folders.sample(0))
            raise error

    with pytest.raises(type(error)):
        measure()

    found = manifest.read(result.path)
    assert (found.status, found.message) == ("failed", message)
    assert found.num_samples == len(folder.read(result.path).samples) == 1
    assert found.figures == ()


def test_a_run_that_nobody_finished_has_failed(checkout: pathlib.Path) -> None:
    with writer.ResultWriter(checkout, result_folders.run(), project=checkout) as result:
        pass
    assert manifest.read(result.path).message == "it was not finished"


def test_what_may_not_be_claimed_makes_a_failed_result(checkout: pathlib.Path) -> None:
    _, found = result_folders.write(
        checkout, before={"copy_bytes_per_s": 1.0}, after={"copy_bytes_per_s": 0.9}
    )
    assert found.status == "failed"
    assert found.message == ("the ceiling copy_bytes_per_s drifted by -10.0% during the run")
    assert found.figures == ()


_KILLED = """
import pathlib, sys, os, signal
import result_folders
from nanoflow_jax.results import writer
checkout = pathlib.Path(sys.argv[1])
result = writer.ResultWriter(checkout, result_folders.run(), project=checkout)
for i in range(2):
    result.add_sample(result_folders.sample(i))
print(result.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_samples_survive_kill_nine(checkout: pathlib.Path) -> None:
    tests = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(checkout)],
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    path = pathlib.Path(done.stdout.strip())
    assert manifest.read(path).status == "running"
    with open(path / "samples.jsonl", "ab") as samples:
        samples.write(b'{"case": "mi')  # a line that was being written

    found = writer.close(path)

    assert (found.status, found.message, found.num_samples) == (
        "failed",
        "the run was cut off",
        2,
    )
    assert len(folder.read(path).samples) == 2
    assert not (path / "samples.jsonl").exists()
    with pytest.raises(ValueError, match="the run has ended: its status is failed"):
        writer.close(path)


def test_a_plan_and_a_log_are_kept_even_if_the_run_fails(checkout: pathlib.Path) -> None:
    result = writer.ResultWriter(checkout, result_folders.run(), project=checkout)
    result.set_plan({"dense_batch": 8})
    result.add_log("start 1.0 s")
    assert (result.path / "log.txt").read_text() == "start 1.0 s\n"
    result.add_log("done")
    found = result.fail("cold")
    assert found.run.plan == {"dense_batch": 8}
    assert (result.path / "log.txt").read_text() == "start 1.0 s\ndone\n"
    assert list(found.files) == ["log.txt", "samples.jsonl.gz"]


def test_kernels_that_an_engine_chose_join_those_of_the_run(checkout: pathlib.Path) -> None:
    result = writer.ResultWriter(checkout, result_folders.run(), project=checkout)
    with pytest.raises(ValueError, match="is no kernel"):
        result.set_plan({}, kernels=["none"])
    result.set_plan({}, kernels=["other", "toy"])
    found = result.fail("cold")
    assert found.run.kernels == ("other", "toy")
    assert list(found.origin.kernel_sources) == [
        f"pallas_kernels/{name}.py" for name in ("other", "pieces", "toy")
    ]


def test_the_same_samples_give_the_same_bytes(checkout: pathlib.Path) -> None:
    one, _ = result_folders.write(checkout)
    other, _ = result_folders.write(checkout, name="again")
    assert (one / manifest.SAMPLES).read_bytes() == (other / manifest.SAMPLES).read_bytes()
    lines = gzip.decompress((one / manifest.SAMPLES).read_bytes()).splitlines()
    assert [json.loads(line) for line in lines] == [result_folders.sample(i) for i in range(3)]


def test_what_cannot_be_written_is_refused(checkout: pathlib.Path) -> None:
    made = writer.ResultWriter(checkout, result_folders.run(), project=checkout)
    for wrong, message in (
        ({"case": "mix"}, "no sample of kind throughput: .*missing required field"),
        (result_folders.sample(0, seconds=float("nan")), "got `null`"),
        (result_folders.sample(0, colour="red"), "unknown field `colour`"),
        (result_folders.sample(0, seconds=object()), "no sample of kind throughput"),
    ):
        with pytest.raises(ValueError, match=message):
            made.add_sample(wrong)
    for name in ("notes.md", manifest.SAMPLES, manifest.MANIFEST, "../log.txt"):
        with pytest.raises(ValueError, match="a result has no file"):
            made.add_file(name, b"")
    with pytest.raises(ValueError, match="is there already; give the result another name"):
        writer.ResultWriter(checkout, result_folders.run(), project=checkout)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "speed"}, "there is no kind 'speed' of results; there are throughput"),
        ({"name": "Big Mix"}, "letters a-z, digits and single .* got 'Big Mix'"),
        ({"name": "../x"}, "letters a-z"),
        ({"kernels": ("no_kernel",)}, "pallas_kernels/no_kernel.py is no kernel: No such file"),
    ],
)
def test_a_run_that_no_folder_can_hold_is_refused(
    changes: dict[str, object], message: str, checkout: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        writer.ResultWriter(checkout, result_folders.run(**changes), project=checkout)
    assert not list(checkout.glob("cpu*"))


def test_tokens_that_differ_between_modes_make_a_failed_result(checkout: pathlib.Path) -> None:
    with writer.ResultWriter(checkout, result_folders.run(), project=checkout) as result:
        for i in range(3):
            result.add_sample(result_folders.sample(i))
        result.set_tokens(Tokens(hashes={"mix": {"plain": "aa", "overlapped": "ab"}}))
        found = result.finish()
    assert found.message == ("tokens.json: mix: modes plain and overlapped gave different tokens")
