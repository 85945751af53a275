"""The benchmark of shared layers: its ends, its flags, and what it says and leaves behind."""

import pathlib
import time
from typing import Any

import batch_runs
import pytest
import result_folders
import split_model
from absl import flags as absl_flags

from nanoflow_jax import request
from nanoflow_jax.bench import split_bench, split_command, split_ends
from nanoflow_jax.results import folder, split
from nanoflow_jax.split import interface


def _run(*arguments: str, **more: Any) -> tuple[int, list[str]]:
    values = absl_flags.FlagValues()
    split_command.define(values)
    for name in ("results", "result_name"):
        absl_flags.DEFINE_string(name, more.get(name), "", flag_values=values)
    values(["bench", *arguments])
    lines: list[str] = []
    code = split_command.run(values, say=lines.append, stream=None, command=("bench", "split"))  # type: ignore[arg-type]
    return code, lines


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--split_requests=3", "--split_requests=3 is odd: half of them are split"),
        ("--split_models=T", "--split_models: T is none of embedded, S"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    argument: str, message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        _run(argument, results=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_result_of_another_kind_is_not_drawn(tmp_path: pathlib.Path) -> None:
    path, _ = result_folders.write(result_folders.project(tmp_path))
    with pytest.raises(ValueError, match="is of kind throughput, not split"):
        _run(f"--redraw={path}")


def test_cuts_and_grid_are_at_quarters_of_the_layers() -> None:
    assert split_bench.cuts_of(8) == ((0, 8), (2, 8), (4, 8), (0, 4), (2, 6))
    assert split_bench.grid_of(8) == (2, 4, 6)
    assert split_bench.grid_of(4) == (1, 2, 3)


def test_the_shape_of_s_is_that_of_its_parameters() -> None:
    config = split_ends.source_of("S").config
    width, head = config.hidden_size, config.head_dim
    attention = 2 * width * head * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * width * config.intermediate_size
    assert round((config.num_layers * layer + 2 * config.vocab_size * width) / 1e6, 1) == 15.7


def test_a_slow_engine_counts_its_own_time_and_takes_longer() -> None:
    engine = split_ends.MeteredEngine(split_model.ToyEngine())
    params = request.SamplingParams(max_tokens=1)
    engine.open(
        interface.Piece(piece_id="a", start=0, stop=2, params=params, prompt_len=8, max_len=9)
    )
    engine.feed("a", 0, token_ids=[1, 2, 3])
    engine.slowness = 5.0
    begun_s = time.perf_counter()
    outputs = engine.step()
    took_s = time.perf_counter() - begun_s
    assert 0 < 5 * engine.busy_s <= took_s
    assert [len(one.hidden) for one in outputs if one.hidden is not None] == [3]
    engine.truncate("a", 1)
    engine.close_piece("a")
    assert not engine.has_work


@pytest.mark.slow
def test_both_ends_measured_leave_a_result_and_a_picture(tmp_path: pathlib.Path) -> None:
    done = batch_runs.bench(
        tmp_path,
        *("split", "--split_models=embedded", "--split_pairs=1", "--split_rounds=1"),
        *("--split_requests=8", "--split_output_len=8", "--results=results", "--plot=a.svg"),
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("*/*-split")
    result = folder.read(path)
    assert (result.manifest.status, result.manifest.message) == ("done", "")
    assert folder.damages(path, result.manifest, result.kind) == []
    loads = [one for one in result.samples if isinstance(one, split.Load)]
    crowd = [one.split_requests for one in loads if "planned" not in one.case]
    planned = [one.split_requests for one in loads if "planned" in one.case]
    assert crowd == [0, 4]
    assert planned in ([], [0, 4])  # a machine may have no client that saves a third
    assert (tmp_path / "a.svg").read_text() == (path / "curves.svg").read_text()
