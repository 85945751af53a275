"""The program's output and exit codes, in processes of their own: its flags are global."""

import pathlib
import subprocess
import sys

import batch_runs
import pytest
import result_folders

from nanoflow_jax.results import manifest, provenance


def _evidence(folder: pathlib.Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "nanoflow_jax.evidence", *arguments],
        env=batch_runs.environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to do: verify, list, readme, close"),
        (["prove"], "name what to do: verify, list, readme, close"),
        (["verify"], "give folders of results to verify, or --all"),
        (["verify", "--all", "x"], "give folders of results to verify, or --all"),
        (["verify", "none"], "none: there is no such folder"),
        (["verify", "/"], "/: it is no folder of a result"),
        (
            ["verify", "--all", "--results=none"],
            "none: there is no such folder of results; see --results",
        ),
        (["list", "x"], "unknown argument 'x'; flags begin with --"),
        (["readme", "--readme=none.md"], "[Errno 2] No such file or directory: 'none.md'"),
        (["close"], "give the folder of one run that was cut off"),
    ],
)
def test_wrong_use_is_one_message(
    arguments: list[str], message: str, tmp_path: pathlib.Path
) -> None:
    assert _evidence(tmp_path, *arguments) == (2, "", f"error: {message}\n")


def test_results_are_verified_and_a_damaged_one_fails(checkout: pathlib.Path) -> None:
    good, _ = result_folders.write(checkout, kernels=())
    failed, _ = result_folders.write(checkout, [], name="failed", kernels=())
    root = "configs/results"
    shown = (
        f"failed run: {failed.relative_to(checkout)}\n"
        "  samples.jsonl.gz: 0 samples, 3 were to be taken\n"
        f"verified: {good.relative_to(checkout)}: E3\n"
        "results: 2, refused: 0\n"
    )
    assert _evidence(checkout, "verify", "--all") == (0, shown, "")

    (good / "log.txt").write_text("")
    code, shown, _ = _evidence(checkout, "verify", str(good), str(failed))
    assert code == 1
    assert shown.startswith(
        f"REFUSED: {good}\n  {good}/log.txt: its SHA-256 is not the manifest's\nfailed run: "
    )
    assert shown.endswith("results: 2, refused: 1\n")

    code, shown, _ = _evidence(checkout, "list", f"--results={root}")
    assert code == 0
    assert [line.split()[1] for line in shown.splitlines()[1:]] == ["failed", "REFUSED"]
    code, shown, _ = _evidence(checkout, "list", "--figures")
    assert (code, len(shown.splitlines())) == (0, 1)


def test_a_result_of_kernels_that_are_not_those_of_today_is_stale(checkout: pathlib.Path) -> None:
    path, _ = result_folders.write(checkout)
    code, shown, _ = _evidence(path, "verify", ".")
    assert code == 0
    assert shown == (
        f"STALE: {path}: E3\n  pallas_kernels/pieces.py has changed since\n"
        "  pallas_kernels/toy.py has changed since\nresults: 1, refused: 0\n"
    )


def test_a_run_that_was_cut_off_is_closed(checkout: pathlib.Path) -> None:
    path, _ = result_folders.write(checkout, kernels=())
    (path / manifest.SAMPLES).unlink()
    (path / "samples.jsonl").write_text("")
    result_folders.reseal(path, status="running", files={}, figures=(), num_samples=0)
    assert _evidence(checkout, "verify", "--all")[0] == 1
    assert _evidence(checkout, "close", str(path)) == (
        0,
        "a failed run of 0 samples: the run was cut off\n",
        "",
    )
    assert _evidence(checkout, "verify", "--all")[0] == 0
    code, _, said = _evidence(checkout, "close", str(path))
    assert (code, said) == (2, f"error: {path}: the run has ended: its status is failed\n")


def test_the_readmes_figures_are_checked_and_written(checkout: pathlib.Path) -> None:
    result_folders.write(checkout, kernels=())
    readme = checkout / "README.md"
    readme.write_text("<!-- figures: toy-mix -->\n| by hand |\n<!-- end -->\nText.\n")

    code, _, said = _evidence(checkout, "readme", "--check")
    assert (code, said) == (
        1,
        "error: README.md: its figures are not those of the results; write them with `python -m "
        "nanoflow_jax.evidence readme`\n",
    )
    assert _evidence(checkout, "readme") == (0, "wrote the figures of README.md\n", "")
    assert "| mix: output | 40 tokens/s |" in readme.read_text()
    assert _evidence(checkout, "readme", "--check") == (
        0,
        "the figures of README.md are those of the results\n",
        "",
    )

    readme.write_text(f"{readme.read_text()}\nIt makes 412 tokens/s.\n")
    code, _, said = _evidence(checkout, "readme", "--check")
    assert (code, said) == (
        1,
        "error: README.md: line 9: 412 tokens/s: figures of speed are written by this program, "
        "from results\n",
    )

    readme.write_text("<!-- figures: none -->\n<!-- end -->\n")
    code, _, said = _evidence(checkout, "readme")
    assert code == 1
    assert said.startswith("error: README.md: no verified result of today's kernels is named none")


def test_the_results_and_the_readme_of_this_project_are_as_they_should_be() -> None:
    for arguments in (["verify", "--all"], ["readme", "--check"]):
        code, shown, said = _evidence(provenance.PROJECT, *arguments)
        assert code == 0, f"{shown}{said}"
