"""Writes a trained model as a Hugging Face folder: bfloat16 weights, tokenizer, card."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from jaxtyping import Shaped

from checkpoints import files, safetensors_file
from nanoflow_jax.models import architecture, weight_map
from nanoflow_jax.models.families import llama
from nanoflow_jax.train_embedded import tokenizer_training

_Array = Shaped[np.ndarray, "..."]


def disassemble(
    weights: Mapping[str, _Array], config: architecture.ModelConfig
) -> dict[str, _Array]:
    """Hugging Face tensors of a Llama model: the inverse of its weight map's `assemble`.

    Args:
        weights: Our weights by `ParamSpec` name.
        config: A model of family llama without biases.
    """
    c = config
    found: dict[str, _Array] = {}
    for name, source in llama.weights(config).items():
        ours = weights[name]
        if name.endswith(".qkv"):
            q, k, v = np.split(ours, [c.group_size, c.group_size + 1], axis=1)
            parts = [x.reshape(-1, c.hidden_size) for x in (q, k, v)]
        elif name.endswith(".gate_up"):
            parts = list(ours)
        else:
            (shape,) = source.shapes.values()
            parts = [ours.reshape(shape)]
        found |= dict(zip(source.shapes, parts, strict=True))
    return found


def config_json(
    config: architecture.ModelConfig, tokenizer: tokenizers.Tokenizer
) -> dict[str, Any]:
    """What config.json says of a Llama model."""
    c = config
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": tokenizer.token_to_id(tokenizer_training.BOS),
        "dtype": "bfloat16",
        "eos_token_id": tokenizer.token_to_id(tokenizer_training.EOS),
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_context_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.theta,
        "tie_word_embeddings": c.tied_embeddings,
        "vocab_size": c.vocab_size,
    }


def generation_config_json(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Both ends, of text and of a turn, stop generation."""
    ends = (tokenizer_training.EOS, tokenizer_training.END_OF_TURN)
    return {
        "bos_token_id": tokenizer.token_to_id(tokenizer_training.BOS),
        "eos_token_id": [tokenizer.token_to_id(end) for end in ends],
    }


def tokenizer_config_json(config: architecture.ModelConfig) -> dict[str, Any]:
    """Names of the special tokens, and the chat template."""
    return {
        "add_bos_token": True,
        "bos_token": tokenizer_training.BOS,
        "chat_template": tokenizer_training.CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer_training.EOS,
        "model_max_length": config.max_context_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_model(
    folder: pathlib.Path,
    *,
    weights: Mapping[str, _Array],
    config: architecture.ModelConfig,
    tokenizer: tokenizers.Tokenizer,
    card: str,
) -> None:
    """Writes the whole folder, each file by rename; config.json is last.

    Args:
        folder: Made if it is not there.
        weights: Our weights by name, in any float dtype; stored as bfloat16.
        config: The model.
        tokenizer: Its tokenizer.
        card: Text of README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = disassemble(weights, config)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    weight_map.check_complete(shapes, llama.weights(config), tied_embeddings=config.tied_embeddings)
    narrow = {name: tensors[name].astype(ml_dtypes.bfloat16) for name in sorted(tensors)}
    safetensors_file.write_safetensors(
        folder / "model.safetensors", narrow, metadata={"format": "pt"}
    )
    files.write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    files.write_atomic(folder / "README.md", card.encode())
    _write_json(folder / "tokenizer_config.json", tokenizer_config_json(config))
    _write_json(folder / "generation_config.json", generation_config_json(tokenizer))
    _write_json(folder / "config.json", config_json(config, tokenizer))


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    files.write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())
