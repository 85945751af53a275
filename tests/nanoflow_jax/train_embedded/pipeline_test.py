"""From a folder of sources to a model folder, killed or not."""

import json
import pathlib

import numpy as np
import pytest

from nanoflow_jax.models import huggingface
from nanoflow_jax.train_embedded import corpus, pipeline, settings
from tests.nanoflow_jax.train_embedded import library


@pytest.fixture
def chosen(tmp_path: pathlib.Path) -> settings.Settings:
    return library.tiny_settings(library.write(tmp_path / "sources"), save_every=4)


def test_rows_are_the_same_every_time_and_hold_no_held_out_file(
    chosen: settings.Settings, tmp_path: pathlib.Path
) -> None:
    prepared = pipeline.prepare(chosen, tmp_path / "one")
    again = pipeline.prepare(chosen, tmp_path / "two")
    np.testing.assert_array_equal(prepared.train_rows, again.train_rows)
    assert prepared.tokenizer.to_str() == again.tokenizer.to_str()
    kept, held_out = corpus.split(corpus.read_corpus(tmp_path / "sources"), one_in=4)
    trained = prepared.tokenizer.decode(prepared.train_rows[:, 1:].reshape(-1).tolist())
    for files, wanted in ((kept, True), (held_out, False)):
        # The first line of a file names its number.
        titles = [f.text.split("\n")[0] for f in files]
        assert all((title in trained) == wanted for title in titles[:3])
    assert prepared.facts.num_held_out == len(held_out)
    assert prepared.bytes_per_token > 1


def _train(
    chosen: settings.Settings, folder: pathlib.Path, *, stop_after: int | None = None
) -> dict[int, float]:
    """Losses by step; stops as a killed process does, with nothing saved on the way out."""
    losses = {}

    class KilledError(Exception):
        pass

    def on_step(step: int, loss: float) -> None:
        losses[step] = loss
        if step == stop_after:
            raise KilledError

    prepared = pipeline.prepare(chosen, folder)
    try:
        pipeline.train(chosen, prepared, folder, report=lambda progress: None, on_step=on_step)
    except KilledError:
        assert stop_after is not None
    return losses


def test_a_killed_run_goes_on_with_the_losses_of_an_unbroken_one(
    chosen: settings.Settings, tmp_path: pathlib.Path
) -> None:
    whole = _train(chosen, tmp_path / "whole")
    assert sorted(whole) == list(range(1, 21))
    before = _train(chosen, tmp_path / "killed", stop_after=6)
    after = _train(chosen, tmp_path / "killed")
    assert sorted(after) == list(range(5, 21))
    assert before == {step: whole[step] for step in before}
    assert after == {step: whole[step] for step in after}


def test_a_finished_run_reports_and_exports(
    chosen: settings.Settings, tmp_path: pathlib.Path
) -> None:
    prepared = pipeline.prepare(chosen, tmp_path / "work")
    reports: list[pipeline.Progress] = []
    trainer = pipeline.train(chosen, prepared, tmp_path / "work", report=reports.append)
    assert (reports[-1].step, reports[-1].num_steps, reports[-1].eta_s) == (20, 20, 0)
    assert reports[-1].tokens_per_s > 0
    assert reports[-1].loss < np.log(320)
    folder = tmp_path / "model"
    validation = pipeline.finish(chosen, prepared, trainer, folder)
    assert 0 < validation.code_nats < np.log(320)
    config = huggingface.read_config(json.loads((folder / "config.json").read_text()))
    assert config == chosen.model_config()
    assert f"{validation.chat_nats:.4f}" in (folder / "README.md").read_text()


def test_other_text_is_refused_on_resuming(
    chosen: settings.Settings, tmp_path: pathlib.Path
) -> None:
    _train(chosen, tmp_path / "work", stop_after=5)
    (tmp_path / "sources" / "package_0" / "new.py").write_text("x = 1\n" * 30)
    with pytest.raises(ValueError, match=r"other settings \(corpus: "):
        _train(chosen, tmp_path / "work")
