"""The card says how the model came about, and what it cost."""

import math
import pathlib

import pytest

from nanoflow_jax.train_embedded import card
from tests.nanoflow_jax.train_embedded import library

_FACTS = card.CorpusFacts(
    num_files=24,
    num_bytes=12_340_000,
    num_held_out=5,
    num_conversations=300,
    num_tokens=3_450_000,
    num_chat_tokens=560_000,
    digest="abc123",
)
_VALIDATION = card.Validation(code_nats=2.5 * math.log(2) * 3, chat_nats=4.25, bytes_per_token=3)


def _training(*schedules: tuple[int, int]) -> card.Training:
    return card.Training(num_steps=20, step_tokens=128, busy_s=150, schedules=schedules)


def test_bits_per_byte_by_hand() -> None:
    assert _VALIDATION.code_bits_per_byte == pytest.approx(2.5)


def test_the_card_has_the_command_the_figures_and_no_path_of_this_machine(
    tmp_path: pathlib.Path,
) -> None:
    chosen = library.tiny_settings(tmp_path / "sources")
    text = card.render(chosen, _FACTS, _training((0, 20)), _VALIDATION)
    for wanted in (
        "python -m nanoflow_jax.train_embedded --work_dir=WORK",
        "--shape_hidden_size=32",
        "--train_num_steps=20",
        "24 files, 12.34 MB",
        "`abc123`",
        "20 steps of 128 tokens",
        "| source files | 5.1986 | 2.5000 |",
        "| conversations | 4.2500 | |",
        "PSF License Agreement",
        card.hardware(),
    ):
        assert wanted in text
    assert str(tmp_path) not in text
    assert "resumed" not in text


def test_a_run_of_two_lengths_says_so(tmp_path: pathlib.Path) -> None:
    chosen = library.tiny_settings(tmp_path)
    text = card.render(chosen, _FACTS, _training((0, 50), (7, 20)), _VALIDATION)
    assert "--train_num_steps=50 from step 0, --train_num_steps=20 from step 7" in text
