"""The weights of a Hugging Face folder: one safetensors file, or shards with an index."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Shaped

from checkpoints import files
from checkpoints.errors import CheckpointError
from checkpoints.safetensors_file import SafetensorsFile, TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_AGAIN = "download the whole model again"


class HuggingFaceWeights:
    """Every tensor of a Hugging Face folder, checked when opened and read from mapped files.

    `metadata` is the free text of each file's header, by the file's name.
    """

    def __init__(self, folder: Path):
        """Open all safetensors files of a folder and check that together they are complete.

        `model.safetensors` wins over an index beside it, as it does in transformers.

        Raises:
            CheckpointError: no safetensors weights, a broken or missing file, an index that does
                not fit its files, or a tensor stored twice.
        """
        if os.path.lexists(folder / SINGLE):
            index: Mapping[str, str] = {}
            names = [SINGLE]
        elif os.path.lexists(folder / INDEX):
            index = _read_index(folder / INDEX)
            names = sorted(set(index.values()))
        else:
            raise CheckpointError(_no_weights(folder))
        self._files = {name: SafetensorsFile(folder / name) for name in names}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._join())
        for name, file in index.items():
            if name not in self._files[file].tensors:
                raise CheckpointError(
                    f"{folder / INDEX}: says tensor {name!r} is in {file}, which does not have it; "
                    f"index and files are not of one model: {_AGAIN}"
                )
        self.metadata: Mapping[str, Mapping[str, str]] = MappingProxyType(
            {name: file.metadata for name, file in self._files.items()}
        )
        self._last: str | None = None

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A whole tensor as a read-only view of its file.

        Moving on to another tensor gives back the memory of those before it, so that a pass over
        the model holds about one tensor of it at a time.
        """
        if name != self._last:
            for file in self._files.values():
                file.give_back_memory()
            self._last = name
        return self._files[self.tensors[name].file.name].view(name)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """Part of a tensor as a read-only view; only its bytes are read, and only when used."""
        return self.read(name)[index]

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a tensor."""
        return self._files[self.tensors[name].file.name].read_range(name, start, stop)

    def files(self) -> list[Path]:
        """Every file that tensors lie in."""
        return [file.path for file in self._files.values()]

    def identity(self) -> bytes:
        """Names, sizes and header hashes of the files, which tell two sets of weights apart."""
        lines = (f"{n} {f.file_bytes} {f.header_sha256}\n" for n, f in self._files.items())
        return hashlib.sha256("".join(lines).encode()).digest()

    def _join(self) -> dict[str, TensorInfo]:
        joined: dict[str, TensorInfo] = {}
        for file in self._files.values():
            for name, info in file.tensors.items():
                if name in joined:
                    raise CheckpointError(
                        f"{file.path}: tensor {name!r} is in {joined[name].file.name} too; "
                        f"the shards are not of one model: {_AGAIN}"
                    )
                joined[name] = info
        return joined


def _read_index(path: Path) -> dict[str, str]:
    """From tensor names to file names, each a plain name of a safetensors file."""
    text = files.read_bytes(path, advice=_AGAIN)
    index = files.parse_json_object(text, file=path, unique_keys=True)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: wanted weight_map to be an object from tensor names to files, got "
            f"{type(weight_map).__name__}{' that is empty' if weight_map == {} else ''}; {_AGAIN}"
        )
    for name, file in weight_map.items():
        files.check_plain_name(file, file=path, what=f"the file of tensor {name!r}")
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {name!r} is in {file!r}, but only *.safetensors files are read; "
                f"convert the model to safetensors"
            )
    return weight_map


def _no_weights(folder: Path) -> str:
    """Say what is in a folder instead of safetensors weights, and what to do."""
    present = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in present if name.endswith(_PICKLES)]
    shards = [name for name in present if name.endswith(".safetensors")]
    if shards:
        return (
            f"{folder}: has {shards[0]} but neither {SINGLE} nor {INDEX}; "
            f"download the missing index, or rename a single file to {SINGLE}"
        )
    if pickles:
        return (
            f"{folder}: has only {pickles[0]}, a pickle, which can run code when it is read and so "
            f"is never read here; convert it to safetensors first "
            f"(model.save_pretrained(DIR, safe_serialization=True) in transformers)"
        )
    return (
        f"{folder}: has no weights (wanted {SINGLE}, {INDEX} or a converted folder); "
        f"download the whole model"
    )
