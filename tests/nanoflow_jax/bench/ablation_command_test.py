"""The command: its flags, and what it says and leaves behind."""

import batch_runs
import pytest
from absl import flags as absl_flags

from nanoflow_jax import config, flags
from nanoflow_jax.bench import ablation_command, ablation_scale
from nanoflow_jax.bench.steady_state import Lengths
from nanoflow_jax.results import folder


def _scale(*arguments, on_gpu=False):
    values = absl_flags.FlagValues()
    flags.define_sections(config.EngineConfig, values)
    ablation_command.define(values)
    values(["bench", *arguments])
    return ablation_command.scale(values, on_gpu=on_gpu)


def test_the_paper_s_workloads_are_measured_in_steps_enough_for_a_claim():
    found = _scale(on_gpu=True)
    assert {str(one) for one in found.lengths} == {"512/0", "512/512", "1024/512", "512/1024"}
    assert found.rounds >= 5
    assert found.rounds * found.steps >= 300
    assert (min(found.sweep), max(found.sweep)) == (16, 4096)
    assert _scale() == ablation_scale.CPU


def test_flags_change_what_is_measured():
    found = _scale(
        "--lengths=6/4,6/0,6/4", "--sweep=8,16,8", "--rounds=1", "--steps=7", "--dense_batch=24"
    )
    assert found.lengths == (Lengths(prompt=6, output=4), Lengths(prompt=6, output=0))
    assert (found.sweep, found.rounds, found.control_rounds) == ((8, 16), 1, 1)
    assert (found.steps, found.dense_batch) == (7, 24)
    assert _scale("--sweep=").sweep == ()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--lengths=512", "--lengths: '512' is not PROMPT/OUTPUT in tokens, such as 512/512 or"),
        ("--sweep=16,x", "--sweep: 'x' is no number of tokens from 2 on"),
        ("--sweep=1", "--sweep: '1' is no number of tokens from 2 on"),
    ],
)
def test_flags_of_another_form_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        _scale(argument)


def test_the_command_measures_compares_and_leaves_a_folder(tmp_path):
    done = batch_runs.bench(
        tmp_path,
        *("ablation", f"--model={batch_runs.FOLDER}", "--cache_page_size=8", "--dense_batch=16"),
        *("--lengths=6/4", "--sweep=", "--rounds=1", "--steps=2", "--results=results"),
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("*/*-ablation")
    result = folder.read(path)
    assert (result.manifest.status, result.manifest.message) == ("done", "")
    assert folder.damages(path, result.manifest, result.kind) == []
    assert "6/4, tokens/s: median, and all of so many rounds" in done.stdout
    assert "ok: 6/4, split only: 0 of " in done.stdout
    assert "not there: overlapped (graph): " in done.stdout
    assert "on a CPU nothing overlaps: these times say nothing about a GPU" in done.stdout
    assert "met: " not in done.stdout
    assert "of 4 rounds" in done.stderr
