"""Training is the served model's forward pass, and its checkpoints lose nothing."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflow_jax.models import transformer
from nanoflow_jax.nanobatch.executor import Call
from nanoflow_jax.nanobatch.plan import TokenRange
from nanoflow_jax.train_embedded import model_training, rows, settings
from tests.nanoflow_jax.train_embedded import library


@pytest.fixture
def chosen(tmp_path: pathlib.Path) -> settings.Settings:
    return library.tiny_settings(tmp_path)


def _rows(count: int, *, seed: int = 0) -> np.ndarray:
    """Rows that count upwards from a random token: easy to learn, never twice the same."""
    starts = np.random.default_rng(seed).integers(0, 300, (count, 1))
    return ((starts + np.arange(65)[None, :]) % 300).astype(np.int32)


def test_first_weights_have_every_name_and_smaller_ones_at_the_residual(
    chosen: settings.Settings,
) -> None:
    config = chosen.model_config()
    weights = model_training.first_weights(config, seed=0)
    assert list(weights) == [s.name for s in transformer.parameter_specs(config)]
    assert float(jnp.abs(weights["norm"] - 1).max()) == 0
    inner, outer = (float(weights[f"layers.0.{n}"].std()) for n in ("qkv", "o"))
    assert outer == pytest.approx(inner / 2**0.5, rel=0.1)  # 1 / sqrt(2 * 1 layer)


def test_a_later_token_changes_no_earlier_logits_nor_other_rows(
    chosen: settings.Settings,
) -> None:
    config = chosen.model_config()
    weights = model_training.first_weights(config, seed=1)
    ids = jnp.asarray(_rows(3)[:, :16]).reshape(-1)
    changed = ids.at[16 + 5].set(7)
    run = jax.jit(functools.partial(model_training.logits, config=config, row_len=16))
    before, after = (np.asarray(run(weights, x)).reshape(3, 16, -1) for x in (ids, changed))
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    np.testing.assert_array_equal(before[1, :5], after[1, :5])
    assert np.abs(before[1, 5:] - after[1, 5:]).max(axis=-1).min() > 0


def test_attention_of_two_tokens_by_hand() -> None:
    q = jnp.asarray([[[1.0, 0.0]], [[0.0, 2.0]]])
    k = jnp.asarray([[[0.5, 0.0]], [[0.0, jnp.log(3.0)]]])
    v = jnp.asarray([[[4.0, 0.0]], [[0.0, 8.0]]])
    spec = transformer.AttentionSpec(scale=0.5, window=None, softcap=None)
    attention, tokens = model_training.WholeRows(2), TokenRange(0, 2)
    cache = attention.append(k, v, None, tokens)
    call = Call(
        layer=0,
        operation="prefill_attention",
        key="prefill_attention.0",
        tokens=tokens,
        num_ctas=None,
        token=None,
    )
    attended = attention.joined((None,), attention.attend_prefill(q, cache, spec, call), tokens)
    # The second token scores 0 and log 3: shares 1/4 and 3/4.
    np.testing.assert_allclose(attended, [[[4.0, 0.0]], [[1.0, 6.0]]], rtol=1e-6)


def test_the_rate_warms_up_and_ends_at_a_twentieth(chosen: settings.Settings) -> None:
    rate = model_training.learning_rate(chosen.train)
    found = [float(rate(step)) for step in (0, 1, 2, 20)]
    np.testing.assert_allclose(found, [0.0, 1.5e-3, 3e-3, 1.5e-4], rtol=1e-6)


def test_windows_grow_to_the_whole_context(tmp_path: pathlib.Path) -> None:
    trainer = model_training.Trainer(library.tiny_settings(tmp_path, short_len=16))
    assert trainer.row_len == 16
    trainer.num_done = 17
    assert trainer.row_len == 64


def test_twenty_steps_of_short_and_long_windows_lower_the_loss(tmp_path: pathlib.Path) -> None:
    trainer = model_training.Trainer(library.tiny_settings(tmp_path, short_len=16))
    held_out = _rows(4, seed=99)
    before = trainer.validate(held_out)
    for step in range(20):
        trainer.step(_rows(2, seed=step))
    assert before == pytest.approx(np.log(320), rel=0.05)
    assert trainer.validate(held_out) < before - 0.5
    assert trainer.num_done == 20


def test_a_restored_trainer_repeats_what_the_first_one_did(
    chosen: settings.Settings, tmp_path: pathlib.Path
) -> None:
    source = rows.RowSource(_rows(40))
    first, data = model_training.Trainer(chosen), rows.batches(source, batch_rows=2, seed=0)
    saved = model_training.Checkpoints(tmp_path / "saved")
    fingerprint = chosen.resumable_part()
    assert not saved.restore(first, data, fingerprint=fingerprint)
    for _ in range(5):
        first.step(next(data))
    saved.save(first, data, fingerprint=fingerprint)
    wanted = [first.step(next(data)) for _ in range(4)]
    second, data = model_training.Trainer(chosen), rows.batches(source, batch_rows=2, seed=0)
    assert saved.restore(second, data, fingerprint=fingerprint)
    assert second.num_done == 5
    assert [second.step(next(data)) for _ in range(4)] == wanted
    for ours, theirs in zip(
        jax.tree.leaves(second.state), jax.tree.leaves(first.state), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    saved.close()


def test_a_checkpoint_of_other_settings_is_refused(
    chosen: settings.Settings, tmp_path: pathlib.Path
) -> None:
    source = rows.RowSource(_rows(4))
    trainer, data = model_training.Trainer(chosen), rows.batches(source, batch_rows=2, seed=0)
    saved = model_training.Checkpoints(tmp_path / "saved")
    trainer.step(next(data))
    saved.save(trainer, data, fingerprint=chosen.resumable_part())
    train = dataclasses.replace(chosen.train, peak_rate=0.5, num_steps=99)
    other = dataclasses.replace(chosen, train=train)
    message = r"other settings \(train_peak_rate: 0.003 then, 0.5 now\).*another --work_dir"
    with pytest.raises(ValueError, match=message):
        saved.restore(trainer, data, fingerprint=other.resumable_part())
    saved.close()


def test_a_resumed_run_remembers_the_schedules_it_followed(
    chosen: settings.Settings,
) -> None:
    trainer = model_training.Trainer(chosen)
    trainer.num_done = 7
    trainer.resume_schedules([(0, 20)])
    assert trainer.schedules == [(0, 20)]
    trainer.resume_schedules([(0, 50)])
    assert trainer.schedules == [(0, 50), (7, 20)]
