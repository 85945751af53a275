"""An exported folder reads back as the model that was trained."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from checkpoints import safetensors_file
from nanoflow_jax.models import architecture, huggingface, weight_map
from nanoflow_jax.train_embedded import export, model_training, tokenizer_training
from tests.nanoflow_jax.train_embedded import library


@pytest.fixture(scope="module")
def config() -> architecture.ModelConfig:
    return library.tiny_settings(pathlib.Path()).model_config()


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    text = [f"def f_{i}(x):\n    return x * {i}\n" for i in range(200)]
    return tokenizer_training.train_tokenizer(text, vocab_size=320)


def _weights(config: architecture.ModelConfig) -> dict[str, np.ndarray]:
    """Random weights, norms included, that bfloat16 holds exactly."""
    rng = np.random.default_rng(0)
    first = model_training.first_weights(config, seed=3)
    noisy = {n: np.asarray(w) + rng.normal(0, 0.1, w.shape) for n, w in first.items()}
    return {n: w.astype(ml_dtypes.bfloat16).astype(np.float32) for n, w in noisy.items()}


def _read(folder: pathlib.Path, model: architecture.ModelConfig) -> dict[str, np.ndarray]:
    """The folder's weights, put together by the weight map that serving uses."""
    file = safetensors_file.SafetensorsFile(folder / "model.safetensors")
    weights = huggingface.weights_of(model)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    weight_map.check_complete(shapes, weights, tied_embeddings=model.tied_embeddings)
    return {
        name: source.assemble([np.array(file.view(n)) for n in source.shapes])
        for name, source in weights.items()
    }


def test_the_exported_folder_gives_the_same_logits(
    tmp_path: pathlib.Path, config: architecture.ModelConfig, tokenizer: tokenizers.Tokenizer
) -> None:
    ours = _weights(config)
    export.write_model(tmp_path, weights=ours, config=config, tokenizer=tokenizer, card="# Card\n")
    read = huggingface.read_config(json.loads((tmp_path / "config.json").read_text()))
    assert read == config
    theirs = _read(tmp_path, read)
    assert {w.dtype for w in theirs.values()} == {np.dtype(ml_dtypes.bfloat16)}
    theirs = {name: w.astype(np.float32) for name, w in theirs.items()}
    ids = jnp.arange(24) * 13 % 320
    run = jax.jit(functools.partial(model_training.logits, config=config, row_len=24))
    both = [np.asarray(run(weights, ids)) for weights in (ours, theirs)]
    np.testing.assert_array_equal(*both)
    assert np.abs(both[0]).max() > 0.1


def test_disassembled_tensors_have_their_rows_where_llama_has_them(
    config: architecture.ModelConfig,
) -> None:
    weights = _weights(config)
    tensors = export.disassemble(weights, config)
    qkv = weights["layers.0.qkv"]  # [K, G + 2, H, D] with K = 2, G = 2, H = 8
    prefix = "model.layers.0.self_attn"
    q, k, v = (tensors[f"{prefix}.{n}_proj.weight"] for n in "qkv")
    np.testing.assert_array_equal(q[8 * 3 + 5], qkv[1, 1, 5])  # query head 3
    np.testing.assert_array_equal(k[8 * 1 + 2], qkv[1, 2, 2])
    np.testing.assert_array_equal(v[8 * 0 + 7], qkv[0, 3, 7])
    gate = tensors["model.layers.0.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(gate, weights["layers.0.gate_up"][0])


def test_tokens_that_end_text_and_turns_are_in_the_generation_config(
    tmp_path: pathlib.Path, config: architecture.ModelConfig, tokenizer: tokenizers.Tokenizer
) -> None:
    export.write_model(
        tmp_path, weights=_weights(config), config=config, tokenizer=tokenizer, card="# Card\n"
    )
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [saved.id_to_token(end) for end in ends] == ["<|eos|>", "<|end|>"]
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert about["chat_template"] == tokenizer_training.CHAT_TEMPLATE
    assert (tmp_path / "README.md").read_text() == "# Card\n"
