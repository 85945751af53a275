"""Model folders with random weights, of any shape."""

import json
import pathlib
from typing import Any

import numpy as np

from checkpoints import safetensors_file
from nanoflow_jax.models import huggingface

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 101,
}


def write(folder: pathlib.Path, *, seed: int, spread: float = 0.3, **changes: Any) -> pathlib.Path:
    """A small Llama whose config is changed as said; logits are spread enough to be compared."""
    raw = _LLAMA | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    random = np.random.default_rng(seed)
    tensors = {
        name: (random.standard_normal(shape) * spread + (len(shape) == 1)).astype(np.float32)
        for source in huggingface.weights_of(huggingface.read_config(raw)).values()
        for name, shape in source.shapes.items()
    }
    safetensors_file.write_safetensors(folder / "model.safetensors", tensors, {"format": "np"})
    return folder
