"""What shared layers come to, worked by hand."""

import pathlib
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import result_folders

from nanoflow_jax.results import checks, folder, kind, manifest, split, split_chart, writer


def _step(mode: str, number: int, step_s: float, **changes: Any) -> dict[str, Any]:
    fields = {"case": "toy, server [0, 2)", "mode": mode, "round": number, "step_s": step_s}
    more = {"rtt_s": 0.0005, "output_tokens": 9, "tokens_sha256": "a"}
    return {"type": "step", **fields, **more, **changes}


def _load(mode: str, number: int, **changes: Any) -> dict[str, Any]:
    """Two requests of which the one is late for its first token and the other for the rest."""
    return {
        "type": "load",
        "case": "crowd",
        "mode": mode,
        "round": number,
        "requests": 4,
        "split_requests": 0 if mode == split.ALL_SERVER else 2,
        "asked_tokens": 80,
        "output_tokens": 80,
        "seconds": 4.0,
        "busy_s": 2.0,
        "cpu_s": 3.0,
        "client_cpu_s": 1.0,
        "steps": 30,
        "first_token_s": [0.1, 0.3, 0.1, 0.1],
        "per_token_s": [0.02, 0.01, 0.01, 0.01],
        "ttft_s": 0.2,
        "tpot_s": 0.015,
        "rtt_s": 0.001,
        "predicted_load": None,
        "tokens_sha256": "b",
        **changes,
    }


def _samples() -> list[dict[str, Any]]:
    return [
        _step("single", 0, 0.001),
        _step("split", 0, 0.003),
        _step("split", 1, 0.0035),
        _step("single", 1, 0.0025),
        _load("all server", 0),
        _load("shared", 0, busy_s=1.0, cpu_s=2.4, seconds=5.0, predicted_load=0.6),
    ]


def _evidence(samples: Sequence[dict[str, Any]]) -> kind.Evidence:
    run = result_folders.run(kind="split", kernels=(), num_samples=len(samples))
    typed = msgspec.convert(list(samples), list[split.Sample])
    return kind.Evidence(run=run, samples=typed, ceilings=None)


def test_pairs_of_one_round_are_compared() -> None:
    found = {one.name: one for one in checks.derive(split.KIND, _evidence(_samples()))}
    added = found["toy, server [0, 2): added to a step"]
    assert (added.unit, added.count) == ("s", 2)
    assert (added.median, added.low, added.high) == pytest.approx((0.0015, 0.001, 0.002))
    assert found["toy, server [0, 2): the link's round trip"].median == pytest.approx(0.0005)
    assert found["crowd: server's busy time, of all server"].median == pytest.approx(0.5)
    assert found["crowd: server's processor time, of all server"].median == pytest.approx(0.8)
    assert found["crowd: output, of all server"].median == pytest.approx(0.8)
    assert found["crowd: server's time that was planned"].median == pytest.approx(0.6)
    assert found["crowd, shared: output"].median == pytest.approx(16)
    assert found["crowd, shared: requests within both deadlines"].median == pytest.approx(0.5)
    assert list(checks.complaints(split.KIND, _evidence(_samples()), None)) == []


def test_other_tokens_than_one_process_gives_and_missing_ones_spoil_the_result() -> None:
    samples = _samples()
    samples[1]["tokens_sha256"] = "c"
    samples[5]["output_tokens"] = 79
    assert list(checks.complaints(split.KIND, _evidence(samples), None)) == [
        "runs of toy, server [0, 2) gave different tokens",
        "run 0 of crowd, shared, gave 79 tokens of 80",
    ]


def test_a_round_of_one_mode_says_nothing() -> None:
    assert list(checks.complaints(split.KIND, _evidence(_samples()[:1]), None)) == [
        "round 0 of toy, server [0, 2) has modes single alone"
    ]


def test_the_picture_has_a_bar_for_each_cut_and_for_each_share() -> None:
    picture = split_chart.draw(_evidence(_samples()).samples)
    for text in ("toy, server [0, 2)", "+1.50 ms", "in time 50 %, 50 %", ">0.50<", ">0.80<"):
        assert text in picture
    assert "in time" not in split_chart.draw(_evidence(_samples()[:4]).samples)


def folder_of(root: pathlib.Path) -> pathlib.Path:
    """A finished result of these samples."""
    samples = _samples()
    run = result_folders.run(kind="split", kernels=(), num_samples=len(samples))
    with writer.ResultWriter(root, run) as result:
        for one in samples:
            result.add_sample(one)
        result.add_file(manifest.CURVES, split_chart.draw(_evidence(samples).samples).encode())
        assert result.finish().status == "done"
        return result.path


def test_a_folder_is_read_as_it_was_written(tmp_path: pathlib.Path) -> None:
    path = folder_of(tmp_path)
    result = folder.read(path)
    assert folder.damages(path, result.manifest, result.kind) == []
    shown = [
        one.name
        for one in result.manifest.figures
        if split.KIND.is_headline(result.manifest.run, one)
    ]
    assert "toy, server [0, 2): added to a step" in shown
    assert "crowd, shared: output" not in shown
