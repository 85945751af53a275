"""The benchmark of --batch_invariant: what it runs, and that it sees where the setting fails."""

import json
import pathlib

import batch_runs
import pytest
from engine_runs import build_small
from llama_engine import CASE, KNOBS

from nanoflow_jax import config
from nanoflow_jax.bench import invariance
from nanoflow_jax.results import folder
from nanoflow_jax.workload.file import WorkRequest

_MIX = [WorkRequest(prompt_ids=tuple(CASE.prompts[i]), output_len=6 + i) for i in range(5)]


def test_engines_differ_in_the_setting_alone_and_share_the_memory() -> None:
    asked = config.EngineConfig.from_knobs(max_requests=4, cache_memory_fraction=0.9)
    found = invariance.configs(asked)
    assert [one.batch.batch_invariant for one in found.values()] == [False, True]
    assert list(found) == ["plain", "invariant"]
    assert [one.batch.max_requests for one in found.values()] == [4, 4]
    assert [one.cache.memory_fraction for one in found.values()] == pytest.approx([0.3, 0.3])


def test_a_request_that_depends_on_its_mix_is_found() -> None:
    found = {}
    for is_invariant in (False, True):
        knobs = {**KNOBS, "buckets": "", "batch_invariant": is_invariant}
        engine = build_small(CASE.path, **knobs)
        found[is_invariant] = invariance.hashes(engine, _MIX)
        engine.close()
    assert invariance.differing({"without": found[False], "with": found[True]}) == ["without"]


def test_a_benchmark_leaves_a_result_folder(tmp_path: pathlib.Path) -> None:
    mix = [{"prompt": list(range(1, 4 + 7 * i)), "out": 6 + i} for i in range(5)]
    (tmp_path / "work.json").write_text(json.dumps({"a": mix}))
    knobs = batch_runs.flags(buckets="")
    done = batch_runs.bench(
        tmp_path,
        *("invariance", "--workload=work.json", "--result_name=try", "--results=results"),
        *("--repeats=2", "--json=rows.jsonl", *knobs),
        # As users have it: tests let XLA optimise less.
        XLA_FLAGS="",
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("*/*-try")
    result = folder.read(path)
    assert (result.manifest.status, result.manifest.message) == ("done", "")
    assert folder.damages(path, result.manifest, result.kind) == []
    order = [(run.mode, run.round) for run in result.samples]
    assert order == [("plain", 0), ("invariant", 0), ("invariant", 1), ("plain", 1)]
    assert result.tokens is not None
    assert len(set(result.tokens.hashes["a"].values())) == 1
    assert [plan["batch_invariant"] for plan in result.manifest.run.plan.values()] == [False, True]
    assert "a: invariant of plain: median " in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["mode"] for row in rows] == [mode for mode, _ in order]
