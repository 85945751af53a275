"""What runs with and without the setting come to, worked by hand."""

from typing import Any

import msgspec
import pytest
import result_folders

from nanoflow_jax.results import checks, invariance, kind


def _runs(**speeds: list[float]) -> list[invariance.Sample]:
    """Runs of 100 tokens, by mode, at speeds in tokens per second."""
    return [
        msgspec.convert(
            {**result_folders.sample(number, seconds=100 / speed), "mode": mode},
            invariance.Sample,
        )
        for mode, of_mode in speeds.items()
        for number, speed in enumerate(of_mode)
    ]


def _evidence(samples: list[invariance.Sample], **changes: Any) -> kind.Evidence:
    run = result_folders.run(kind="invariance", num_samples=len(samples), **changes)
    return kind.Evidence(run=run, samples=samples, ceilings=None)


def test_the_cost_is_that_of_runs_of_one_round() -> None:
    samples = _runs(plain=[100.0, 200.0, 50.0], invariant=[99.0, 190.0, 50.0])
    found = {f.name: f for f in checks.derive(invariance.KIND, _evidence(samples))}
    share = found["mix: invariant of plain"]
    assert (share.unit, share.count) == ("x", 3)
    assert (share.median, share.low, share.high) == pytest.approx((0.99, 0.95, 1.0))
    assert found["mix, plain: output"].median == pytest.approx(100)
    assert found["mix, invariant: output"].median == pytest.approx(99)


def test_runs_of_one_mode_alone_say_nothing() -> None:
    evidence = _evidence(_runs(plain=[100.0]))
    assert list(checks.complaints(invariance.KIND, evidence, None)) == [
        "mix has no run of mode invariant"
    ]


def test_modes_may_give_different_tokens_and_rounds_of_one_may_not() -> None:
    one, other, *rest = _runs(plain=[100.0, 100.0], invariant=[100.0, 100.0])
    rest = [msgspec.structs.replace(run, tokens_sha256="b") for run in rest]
    assert list(checks.complaints(invariance.KIND, _evidence([one, other, *rest]), None)) == []
    other = msgspec.structs.replace(other, tokens_sha256="b")
    evidence = _evidence([one, other, *rest])
    assert list(checks.complaints(invariance.KIND, evidence, None)) == [
        "runs of mix, plain gave different tokens"
    ]


def test_requests_with_other_bits_alone_than_in_their_mix_spoil_the_result() -> None:
    tokens = kind.Tokens(hashes={"mix": {"alone": "a", "in its mix": "b"}})
    evidence = _evidence(_runs(plain=[100.0], invariant=[100.0]))
    assert list(checks.complaints(invariance.KIND, evidence, tokens)) == [
        "tokens.json: mix: modes alone and in its mix gave different tokens"
    ]


def test_the_speed_of_interpreted_kernels_is_no_measurement() -> None:
    for is_interpreted, level in ((False, kind.Level.ONE_RUN), (True, kind.Level.CPU_NUMERICS)):
        plan = {"plain": {"interpreted": False}, "invariant": {"interpreted": is_interpreted}}
        assert invariance.KIND.level(result_folders.run(plan=plan)) == level
