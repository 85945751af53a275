"""Predictions beside what NanoFlow's paper prints."""

import dataclasses

import pytest

from nanoflow_jax.cost.nanoflow_figures import CALIBRATED_BY, FIGURE_9, FIGURE_11
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.search import paper
from nanoflow_jax.simulator.step_time import Mode

_PERCENT_OFF = {
    "512/0": (-4.9, -2.8, -0.5, 0.0),
    "1024/512": (0.2, 1.5, 1.7, 1.7),
    "512/1024": (-1.1, -2.6, -0.4, -0.3),
}


def _off(found, printed):
    return 100 * (found / printed - 1)


def _column(mix):
    printed = FIGURE_9[mix]
    for field in dataclasses.fields(printed):
        found = paper.steady(paper.Setting(mode=Mode(field.name)), mix)
        yield _off(found, getattr(printed, field.name))


def test_the_column_that_was_fitted_comes_out():
    assert list(_column(CALIBRATED_BY)) == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.mark.parametrize("mix", [mix for mix in FIGURE_9 if mix != CALIBRATED_BY], ids=str)
def test_other_columns_of_figure_9_follow_within_5_percent(mix):
    errors = list(_column(mix))
    assert errors == pytest.approx(_PERCENT_OFF[str(mix)], abs=0.06)
    assert max(map(abs, errors)) < 5


@pytest.mark.parametrize(
    ("model", "error"), [("llama-3-8b", 3.9), ("llama-3-70b", 0.3), ("qwen2-72b", 6.6)]
)
def test_other_models_follow(model, error):
    bar = FIGURE_11[model]
    setting = paper.Setting(model=model, devices=bar.devices, dense_batch=bar.dense_batch)
    found = paper.steady(setting, Mix(prompt_len=1024, output_len=512))
    assert _off(found, bar.tokens_per_s) == pytest.approx(error, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "printed", "error"),
    [("splitwise", 1259, 4.2), ("lmsys", 1247, 6.2), ("sharegpt", 1272, 2.6)],
)
def test_whole_runs_of_traces_follow(name, printed, error):
    found = paper.at_once(paper.Setting(mode=Mode.OFFLOADED), name, 5000)
    assert _off(found, printed) == pytest.approx(error, abs=0.3)
