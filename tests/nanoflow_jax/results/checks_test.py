import dataclasses

import msgspec
import pytest
import result_folders
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.results import checks, figures, kind, throughput

_CEILINGS = figures.Ceilings(before={"flops_per_s": 10.0}, after={"flops_per_s": 10.0})
_GOOD = kind.Evidence(
    run=result_folders.run(num_samples=None),
    samples=result_folders.toy_samples(),
    ceilings=_CEILINGS,
)


def _said(evidence: kind.Evidence, tokens: kind.Tokens | None = None) -> list[str]:
    return list(checks.complaints(result_folders.TOY, evidence, tokens))


def test_a_good_run_gives_no_complaint() -> None:
    same = kind.Tokens(hashes={"mix": {"a": "5e", "b": "5e"}, "other": {"a": "6f", "b": "6f"}})
    assert _said(_GOOD, same) == []


@given(st.integers(0, 7))
def test_a_step_that_is_missing_is_found_wherever_it_was(gone: int) -> None:
    left = [one for i, one in enumerate(result_folders.toy_samples()) if i != gone]
    run = result_folders.run(num_samples=8)
    found = _said(dataclasses.replace(_GOOD, samples=left, run=run))
    assert "samples.jsonl.gz: 7 samples, 8 were to be taken" in found
    last_of_its_round = gone % 2 == 1
    assert last_of_its_round or any("0 steps of case x, mode" in said for said in found)


def test_a_round_that_is_missing_is_found() -> None:
    left = [one for one in _GOOD.samples if (one.mode, one.round) != ("b", 0)]
    assert _said(dataclasses.replace(_GOOD, samples=left)) == [
        "samples.jsonl.gz: after 0 rounds of case x, mode b comes 1"
    ]


def test_a_step_that_is_there_twice_is_found() -> None:
    twice = [*_GOOD.samples, _GOOD.samples[-1]]
    assert _said(dataclasses.replace(_GOOD, samples=twice)) == [
        "samples.jsonl.gz: after 2 steps of case x, mode a, round 1 comes 1"
    ]


def test_nothing_is_claimed_from_a_device_that_is_not_fit_or_that_nobody_looked_at() -> None:
    unfit = dataclasses.replace(_GOOD, unfit=("clocks: held down", "ceilings: too low"))
    assert _said(unfit) == [
        "the device was not fit to be measured: clocks: held down",
        "the device was not fit to be measured: ceilings: too low",
    ]
    needing = dataclasses.replace(result_folders.TOY, needs_fitness=lambda run: True)
    assert list(checks.complaints(needing, dataclasses.replace(_GOOD, unfit=()), None)) == []
    assert list(checks.complaints(needing, _GOOD, None)) == [
        "nobody looked whether the device is fit to be measured"
    ]


@pytest.mark.parametrize(("after", "is_refused"), [(10.5, False), (10.51, True), (9.4, True)])
def test_a_ceiling_may_drift_by_five_percent(after: float, is_refused: bool) -> None:
    drifted = figures.Ceilings(before={"flops_per_s": 10.0}, after={"flops_per_s": after})
    found = _said(dataclasses.replace(_GOOD, ceilings=drifted))
    change = f"{after / 10 - 1:+.1%}"
    wanted = [f"the ceiling flops_per_s drifted by {change} during the run"]
    assert found == (wanted if is_refused else [])


@pytest.mark.parametrize(
    ("ceilings", "message"),
    [
        (None, "no ceilings were measured before and after"),
        (
            figures.Ceilings(before={"flops_per_s": 9.0}, after={}),
            "other ceilings were measured before than after",
        ),
        (
            figures.Ceilings(before={"flops_per_s": 0.0}, after={"flops_per_s": 9.0}),
            "the ceiling flops_per_s is not above 0",
        ),
    ],
)
def test_ceilings_that_are_no_ceilings_are_refused(
    ceilings: figures.Ceilings | None, message: str
) -> None:
    assert message in _said(dataclasses.replace(_GOOD, ceilings=ceilings))


def test_more_than_a_ceiling_is_refused() -> None:
    fast = result_folders.toy_samples(flops_per_s=10.5)
    assert _said(dataclasses.replace(_GOOD, samples=fast)) == [
        "speed: 105.0% of the ceiling flops_per_s"
    ]


def test_other_tokens_in_another_mode_are_refused() -> None:
    tokens = kind.Tokens(hashes={"mix": {"a": "5e", "b": "5e", "c": "6f"}})
    assert _said(_GOOD, tokens) == [
        "tokens.json: mix: modes b and c gave different tokens",
    ]


def test_no_samples_give_no_figures() -> None:
    assert _said(dataclasses.replace(_GOOD, samples=[])) == ["there are no samples of speed"]


def test_two_figures_of_one_name_are_refused() -> None:
    def twice(evidence: kind.Evidence) -> list[figures.Figure]:
        return result_folders.TOY.figures(evidence) * 2

    doubled = dataclasses.replace(result_folders.TOY, figures=twice)
    with pytest.raises(ValueError, match="two figures of kind toy have one name"):
        checks.derive(doubled, _GOOD)


def test_a_run_of_a_mix_that_took_no_time_or_is_there_twice_is_refused() -> None:
    sample = result_folders.throughput_sample
    runs = [sample(0), sample(1, seconds=0.0), sample(1)]
    evidence = kind.Evidence(run=result_folders.run(), samples=runs, ceilings=None)
    assert list(checks.complaints(throughput.KIND, evidence, None)) == [
        "samples.jsonl.gz: round 1 of case mix is there twice",
        "samples.jsonl.gz: a sample took no time",
    ]


def test_runs_of_a_mix_that_gave_other_tokens_are_refused() -> None:
    runs = [result_folders.throughput_sample(i) for i in range(3)]
    runs[2] = msgspec.structs.replace(runs[2], tokens_sha256="6f" * 32)
    evidence = kind.Evidence(run=result_folders.run(), samples=runs, ceilings=None)
    assert list(checks.complaints(throughput.KIND, evidence, None)) == [
        "runs of mix gave different tokens"
    ]


def test_a_run_that_did_not_give_all_tokens_is_refused() -> None:
    runs = [result_folders.throughput_sample(i, output_tokens=100 - i // 2) for i in range(3)]
    evidence = kind.Evidence(run=result_folders.run(), samples=runs, ceilings=None)
    assert list(checks.complaints(throughput.KIND, evidence, None)) == [
        "run 2 of mix gave 99 tokens of 100"
    ]
