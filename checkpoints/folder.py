"""One door to a model folder, whether it holds Hugging Face safetensors or an Orbax conversion."""

import difflib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Shaped

from checkpoints import files, huggingface, orbax_folder
from checkpoints.errors import CheckpointError
from checkpoints.huggingface import HuggingFaceWeights
from checkpoints.orbax_folder import OrbaxWeights
from checkpoints.tensor_types import TensorSpec

_CHANGED = "start again when nothing writes to the folder"


class Weights(Protocol):
    """What `ModelFolder` asks of a way to store tensors."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor, by name."""

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A whole tensor."""

    def read_slice(self, name: str, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """Part of a tensor, with nothing else read."""

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a tensor, which it has, in row-major order."""

    def files(self) -> list[Path]:
        """The files that hold the weights."""

    def identity(self) -> bytes:
        """Bytes that differ between different weights."""


class ModelFolder:
    """A model's config, weights and text files. Nothing in the folder is ever run.

    Opening reads and checks the config and every weight header, and no weights.
    """

    def __init__(self, path: Path, weights: Weights):
        """Read the JSON files beside the weights.

        Raises:
            CheckpointError: config.json is missing, or it or generation_config.json is no JSON
                object.
        """
        self.path = path
        self._weights = weights
        self._config_bytes = files.read_bytes(
            path / "config.json", advice="download the whole model, with its config.json"
        )
        self.config: dict[str, Any] = files.parse_json_object(
            self._config_bytes, file=path / "config.json"
        )
        self.generation_config: dict[str, Any] | None = None
        generation = self.text_file("generation_config.json")
        if generation is not None:
            self.generation_config = files.parse_json_object(
                files.read_bytes(generation, advice="download it again"), file=generation
            )

    @classmethod
    def open(cls, path: Path | str) -> "ModelFolder":
        """Open a folder by what is in it.

        Raises:
            CheckpointError: no such folder, or nothing in it that can be used; the message says
                what to change.
        """
        path = Path(path)
        if not os.path.isdir(path):
            problem = "is a file" if os.path.lexists(path) else "does not exist"
            raise CheckpointError(
                f"{path}: {problem}; wanted the folder of a model (config.json and *.safetensors)"
            )
        if not any(path.iterdir()):
            raise CheckpointError(f"{path}: is empty; download a model into it")
        has_safetensors = any(
            os.path.lexists(path / name) for name in (huggingface.SINGLE, huggingface.INDEX)
        )
        if not has_safetensors and orbax_folder.is_conversion(path):
            return cls(path, OrbaxWeights(path))
        return cls(path, HuggingFaceWeights(path))

    @property
    def is_orbax(self) -> bool:
        """Whether the weights are Orbax parts, made by a conversion, and not safetensors."""
        return isinstance(self._weights, OrbaxWeights)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its Hugging Face name, with dtype and shape as stored."""
        return self._weights.tensors

    def spec(self, name: str) -> TensorSpec:
        """What is known of a tensor that is not read.

        Raises:
            CheckpointError: no such tensor.
        """
        self._check_name(name)
        return self.tensors[name]

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A whole tensor as stored: a read-only view of a safetensors file, or a fresh array.

        Raises:
            CheckpointError: no such tensor, or its file changed or broke since it was opened.
        """
        self._check_name(name)
        return self._weights.read(name)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """Part of a tensor as stored, with nothing but that part read.

        Args:
            name: A key of `tensors`.
            index: One slice per axis, which may lack its ends but has no step.

        Raises:
            CheckpointError: the index does not fit the tensor, or as `read`.
        """
        self._check_name(name)
        shape = self.tensors[name].shape
        if len(index) != len(shape) or any(part.step not in (None, 1) for part in index):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has shape {list(shape)}: wanted one slice with step "
                f"1 per axis, got {index}"
            )
        bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
        return self._weights.read_slice(
            name, tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)
        )

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a tensor in row-major order, with little more than these read.

        Raises:
            CheckpointError: the tensor has not so many bytes, or as `read`.
        """
        self._check_name(name)
        nbytes = self.tensors[name].nbytes
        if not 0 <= start <= stop <= nbytes:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has bytes [0, {nbytes}); [{start}, {stop}) were "
                f"asked for"
            )
        return self._weights.read_range(name, start, stop) if start < stop else b""

    def stamp(self) -> str:
        """Hex sha256 of path, size, inode and time of change of the files that hold the weights.

        Raises:
            CheckpointError: one is not there any more.
        """
        lines = []
        for path in self._weights.files():
            try:
                found = path.stat()
            except OSError as error:
                raise CheckpointError(f"{path}: was there before: {error}; {_CHANGED}") from error
            numbers = (found.st_size, found.st_ino, found.st_mtime_ns)
            lines.append(f"{path.resolve()} {numbers}\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def changed_ns(self) -> int:
        """When the youngest of those files was changed, by the clock that stamps them."""
        return max(path.stat().st_mtime_ns for path in self._weights.files())

    def fingerprint(self) -> str:
        """Hex sha256 of config.json and of what identifies the weights, which are not read.

        A folder and its conversion have different fingerprints.
        """
        return hashlib.sha256(
            hashlib.sha256(self._config_bytes).digest() + self._weights.identity()
        ).hexdigest()

    def text_file(self, name: str) -> Path | None:
        """Where a file such as tokenizer.json is, or None if the folder has none.

        Raises:
            CheckpointError: the name has a path part.
        """
        path = self.path / files.check_plain_name(name, file=self.path, what="a text file")
        return path if os.path.isfile(path) else None

    def _check_name(self, name: str) -> None:
        if name not in self.tensors:
            close = difflib.get_close_matches(name, self.tensors, n=3) or list(self.tensors)[:3]
            raise CheckpointError(
                f"{self.path}: has no tensor {name!r} among its {len(self.tensors)} (near it: "
                f"{', '.join(close) or 'none'}); the weights do not fit the config: "
                f"check that both come from one model"
            )
