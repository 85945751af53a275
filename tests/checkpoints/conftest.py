"""Small model folders for the tests of this library."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Shaped

from checkpoints import safetensors_file

Tensors = dict[str, Shaped[np.ndarray, "..."]]

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}


@pytest.fixture
def tensors() -> Tensors:
    """One tensor of each kind that models have, with odd sizes, no elements, and no axes."""
    random = np.random.default_rng(0)
    return {
        "embed.weight": random.standard_normal((7, 4)).astype(np.float32),
        "layers.0.q.weight": random.standard_normal((8, 16)).astype(ml_dtypes.bfloat16),
        "layers.0.q.bias": random.standard_normal(3).astype(np.float16),
        "layers.0.scale": np.array(1.5, np.float32),
        "layers.0.none": np.zeros((0, 5), ml_dtypes.bfloat16),
        "layers.1.q.weight": random.standard_normal((8, 16)).astype(ml_dtypes.float8_e4m3fn),
        "layers.1.mask": np.array([True, False, True]),
        "steps": np.array([[2**40, -1]]),
    }


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a Hugging Face folder, single or sharded."""

    def make(tensors: Mapping[str, np.ndarray], *, shards: int = 1, name: str = "model") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        if shards == 1:
            safetensors_file.write_safetensors(folder / "model.safetensors", tensors)
            return folder
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: t for i, (n, t) in enumerate(tensors.items()) if i % shards == shard}
            safetensors_file.write_safetensors(folder / file, part)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.fixture
def assert_same() -> Callable[[np.ndarray, np.ndarray], None]:
    """Compare two arrays bit by bit."""

    def check(got: np.ndarray, wanted: np.ndarray) -> None:
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert got.tobytes() == wanted.tobytes()

    return check
