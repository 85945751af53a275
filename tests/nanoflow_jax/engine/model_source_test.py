"""Models that knobs name, those that cannot be opened, and the dtype that they run in."""

import json
import re

import jax.numpy as jnp
import pytest
from golden import cases

from nanoflow_jax import config
from nanoflow_jax.engine import model_source


def _raises(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def _open(**knobs):
    return model_source.open_model(config.ModelSection(**knobs))


def test_a_preset_needs_random_weights():
    with _raises(
        "--model=preset:llama-3-8b is a shape without weights; add --random_weights, or name a "
        "folder"
    ):
        _open(model="preset:llama-3-8b")
    opened = _open(model="preset:llama-3-8b", random_weights=True)
    assert opened.folder is None
    assert opened.config.hidden_size == 4096
    assert opened.stored_dtype == "bfloat16"
    assert opened.eos_ids == frozenset()


def test_a_name_that_is_no_folder_is_answered_with_the_download_command():
    with _raises(
        "--model=meta/Llama-9 is no folder. To download a model from Hugging Face:\n"
        "  pip install huggingface_hub && hf download meta/Llama-9 --local-dir Llama-9\n"
        "then use --model=Llama-9"
    ):
        _open(model="meta/Llama-9")


@pytest.mark.parametrize("name", ["/models/llama", "./llama", "~/llama", "a/b/c"])
def test_a_path_that_is_no_folder_is_not_offered_for_download(name):
    with _raises(
        f"--model={name} is no folder; give the path of a model folder, or a name as on Hugging "
        "Face: OWNER/MODEL"
    ):
        _open(model=name)


def test_an_opened_folder_knows_its_shape_and_its_ends():
    opened = _open(model=str(cases.load("llama3").path))
    assert opened.config.vocab_size == 307
    assert len(opened.eos_ids) == 3  # of generation_config.json
    assert opened.stored_dtype == "float32"


def _with_ends(folder, ids):
    source = cases.load("llama").path
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "eos_token_id": ids}))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return _open(model=str(folder))


def test_ends_outside_the_vocabulary_are_left_out_and_named(tmp_path, caplog):
    assert _with_ends(tmp_path, [2, 353]).eos_ids == {2}
    assert "end-of-text ids [353] of" in caplog.text
    assert "are outside the vocabulary of 353 and are left out" in caplog.text


def test_more_ends_than_a_row_can_ban_are_refused(tmp_path):
    assert len(_with_ends(tmp_path, list(range(84))).eos_ids) == 84
    with _raises(
        f"{tmp_path} names 85 end-of-text ids, more than 84; name fewer in generation_config.json "
        "and config.json"
    ):
        _with_ends(tmp_path, list(range(85)))


@pytest.mark.parametrize(
    ("choice", "stored", "platform", "wanted"),
    [
        ("auto", "bfloat16", "cpu", jnp.float32),
        ("auto", "bfloat16", "gpu", jnp.bfloat16),
        ("auto", "float16", "gpu", jnp.bfloat16),
        ("auto", "float32", "gpu", jnp.float32),
        ("bfloat16", "float32", "cpu", jnp.bfloat16),
        ("float32", "bfloat16", "gpu", jnp.float32),
    ],
)
def test_the_run_dtype_follows_device_and_checkpoint_unless_it_is_named(
    choice, stored, platform, wanted
):
    assert model_source.run_dtype(config.Dtype(choice), stored, platform) == wanted
