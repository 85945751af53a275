"""Settings come from flags by name, and refuse what cannot be trained."""

import dataclasses
import pathlib

import pytest
from absl import flags

from nanoflow_jax import flags as knob_flags
from nanoflow_jax.train_embedded import settings
from tests.nanoflow_jax.train_embedded import library


def _parse(*words: str) -> settings.Settings:
    values = flags.FlagValues()
    knob_flags.define_sections(settings.Settings, values)
    values(["program", *words])
    return settings.from_flags({name: values[name].value for name in values})


def test_defaults_and_overrides_come_from_flags() -> None:
    assert _parse() == settings.Settings()
    chosen = _parse("--train_num_steps=7", "--shape_num_layers=2", "--corpus_root=here")
    assert (chosen.train.num_steps, chosen.shape.num_layers) == (7, 2)
    assert chosen.corpus.root == "here"


def test_the_default_model_has_three_to_ten_million_parameters() -> None:
    assert 3e6 < settings.Settings().model_config().num_parameters < 10e6


def test_only_length_place_and_saving_may_change_on_resuming(tmp_path: pathlib.Path) -> None:
    chosen = library.tiny_settings(tmp_path)
    train = dataclasses.replace(chosen.train, num_steps=99, save_every=3)
    longer = dataclasses.replace(chosen, train=train)
    assert longer.resumable_part() == chosen.resumable_part()
    train = dataclasses.replace(chosen.train, seed=1)
    assert dataclasses.replace(chosen, train=train).resumable_part() != chosen.resumable_part()


def test_windows_that_do_not_divide_a_row_are_refused() -> None:
    message = "--train_short_len=100 does not divide --shape_context_len=1024"
    with pytest.raises(ValueError, match=message):
        settings.Settings(train=settings.TrainSettings(short_len=100))


def test_a_knob_out_of_bounds_names_its_flag() -> None:
    with pytest.raises(ValueError, match="--corpus_vocab_size=10 is not"):
        settings.CorpusSettings(vocab_size=10)
