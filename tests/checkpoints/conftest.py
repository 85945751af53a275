"""Small model folders for the tests of this library."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Shaped

from checkpoints import safetensors_file
from checkpoints.folder import ModelFolder

Tensors = dict[str, Shaped[np.ndarray, "..."]]
Kills = Callable[[ModuleType, Path, Path, list[str]], tuple[list[int], list[str]]]

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """Write a Hugging Face folder, single or sharded."""

    def write(folder: Path, tensors: Mapping[str, np.ndarray], *, shards: int = 1) -> Path:
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

    return write


@pytest.fixture
def make_model(write_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a Hugging Face folder of this test."""

    def make(tensors: Mapping[str, np.ndarray], *, shards: int = 1, name: str = "model") -> Path:
        return write_model(tmp_path / name, tensors, shards=shards)

    return make


@pytest.fixture
def assert_same() -> Callable[[np.ndarray, np.ndarray], None]:
    """Compare two arrays bit by bit."""

    def check(got: np.ndarray, wanted: np.ndarray) -> None:
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert got.tobytes() == wanted.tobytes()

    return check


class _StoppedError(Exception):
    pass


@pytest.fixture
def stop_after_parts() -> Callable[..., None]:
    """Convert with `orbax_store` or `safetensors_store`, broken off when some parts are done."""

    def stop(store: ModuleType, source: Path, output: Path, *, num_parts: int) -> None:
        calls = iter(range(num_parts + 1))

        def progress(done: int, total: int) -> None:
            if next(calls) == num_parts:
                raise _StoppedError

        with pytest.raises(_StoppedError):
            store.convert(ModelFolder.open(source), output, progress=progress, part_bytes=300)

    return stop


@pytest.fixture
def convert_with_kills() -> Kills:
    """Run `killed_conversion.py`.

    Gives the bytes already copied when each child came to copying, and how each child ended.
    """

    def convert(
        store: ModuleType, source: Path, output: Path, points: list[str]
    ) -> tuple[list[int], list[str]]:
        script = Path(__file__).with_name("killed_conversion.py")
        repo = Path(safetensors_file.__file__).parents[1]
        done = subprocess.run(
            [sys.executable, str(script), store.__name__, str(source), str(output), "300", *points],
            env={**os.environ, "PYTHONPATH": str(repo), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = done.stdout.splitlines()
        begun = [int(line.split()[1]) for line in lines if line.startswith("begun")]
        return begun, [line for line in lines if not line.startswith("begun")]

    return convert
