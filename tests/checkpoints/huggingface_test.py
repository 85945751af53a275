import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import safetensors_file
from checkpoints.errors import CheckpointError
from checkpoints.huggingface import HuggingFaceWeights

Make = Callable[..., Path]
_INDEX = "model.safetensors.index.json"
_FIRST = "model-00001-of-00002.safetensors"
_SECOND = "model-00002-of-00002.safetensors"


def _two(make_model: Make) -> Path:
    return make_model({"a": np.arange(3), "b": np.arange(4)}, shards=2)


def _write_index(folder: Path, weight_map: object) -> None:
    (folder / _INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_tensor_is_read_bit_by_bit_whole_and_in_part(
    make_model: Make,
    tensors: dict[str, np.ndarray],
    assert_same: Callable[..., None],
    shards: int,
) -> None:
    weights = HuggingFaceWeights(make_model(tensors, shards=shards))
    assert set(weights.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(weights.read(name), tensor)
        index = tuple(slice(size // 3, size // 2 + 1) for size in tensor.shape)
        assert_same(weights.read_slice(name, index), tensor[index])


def test_a_single_file_wins_over_an_index_beside_it(make_model: Make) -> None:
    folder = _two(make_model)
    safetensors_file.write_safetensors(folder / "model.safetensors", {"c": np.arange(2)})
    assert set(HuggingFaceWeights(folder).tensors) == {"c"}


def test_links_are_followed_as_the_hub_cache_needs(make_model: Make, tmp_path: Path) -> None:
    folder = _two(make_model)
    (folder / _FIRST).rename(tmp_path / "blob")
    (folder / _FIRST).symlink_to(tmp_path / "blob")
    assert HuggingFaceWeights(folder).read("a").tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", [_FIRST, _SECOND])
def test_a_missing_shard_is_named(make_model: Make, name: str) -> None:
    folder = _two(make_model)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: no such file; download"):
        HuggingFaceWeights(folder)


def test_a_link_to_nothing_is_a_missing_file_and_not_no_weights(make_model: Make) -> None:
    folder = make_model({"a": np.arange(3)})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        HuggingFaceWeights(folder)


def test_a_truncated_shard_is_named(make_model: Make) -> None:
    folder = _two(make_model)
    os.truncate(folder / _SECOND, (folder / _SECOND).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{_SECOND}: the header describes a file of"):
        HuggingFaceWeights(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", r"index\.json: the file is not JSON"),
        (b"[]", "must be a JSON object, got list"),
        (b"{}", "wanted weight_map to be an object from tensor names to files, got NoneType"),
        (b'{"weight_map": ["a"]}', "files, got list"),
        (b'{"weight_map": {}}', "files, got dict that is empty"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "has the key 'a' twice"),
    ],
)
def test_a_broken_index_is_refused(make_model: Make, index: bytes, message: str) -> None:
    folder = _two(make_model)
    (folder / _INDEX).write_bytes(index)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceWeights(folder)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "", "..", 3, None]
)
def test_c11_an_index_cannot_lead_out_of_its_folder(make_model: Make, file: Any) -> None:
    folder = _two(make_model)
    _write_index(folder, {"a": file})
    with pytest.raises(CheckpointError, match="the file of tensor 'a' must be a plain file name"):
        HuggingFaceWeights(folder)


def test_c3_an_index_to_a_pickle_is_refused(make_model: Make) -> None:
    folder = _two(make_model)
    _write_index(folder, {"a": "pytorch_model.bin"})
    with pytest.raises(CheckpointError, match=r"'pytorch_model.bin', but only \*\.safetensors"):
        HuggingFaceWeights(folder)


def test_a_tensor_that_is_not_where_the_index_says_is_named(make_model: Make) -> None:
    folder = _two(make_model)
    _write_index(folder, {"a": _FIRST, "b": _SECOND, "c": _FIRST})
    with pytest.raises(CheckpointError, match=f"says tensor 'c' is in {_FIRST}, which does not"):
        HuggingFaceWeights(folder)


def test_a_tensor_in_two_files_is_refused(make_model: Make) -> None:
    folder = _two(make_model)
    both = {"a": np.arange(3), "b": np.arange(4)}
    safetensors_file.write_safetensors(folder / _SECOND, both)
    with pytest.raises(CheckpointError, match=f"{_SECOND}: tensor 'a' is in {_FIRST} too"):
        HuggingFaceWeights(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-2.bin", "x.pth"])
def test_c3_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=f"only {name}, a pickle.*convert it to safetensors"):
        HuggingFaceWeights(tmp_path)


def test_shards_without_an_index_ask_for_it(make_model: Make) -> None:
    folder = _two(make_model)
    (folder / _INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"has {_FIRST} but neither .* missing index"):
        HuggingFaceWeights(folder)


def test_a_folder_without_weights_says_what_was_wanted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no weights \(wanted model\.safetensors, "):
        HuggingFaceWeights(tmp_path)


def _mapped_kib(path: Path) -> int:
    """Memory that this process holds of a mapped file."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        int(next(line for line in lines if line.startswith("Rss:")).split()[1])
        for line in lines
        if line.endswith(str(path))
    )


def test_a_pass_over_the_model_holds_one_tensor_of_it_at_a_time(make_model: Make) -> None:
    many = {f"t{i}": np.ones(1 << 18, np.float32) for i in range(12)}
    folder = make_model(many, shards=3)
    paths = list(folder.glob("*.safetensors"))
    weights = HuggingFaceWeights(folder)
    most = 0
    for name in many:
        assert weights.read(name).sum() == 1 << 18
        most = max(most, sum(_mapped_kib(path) for path in paths))
    # One tensor is 1024 KiB; the kernel maps some pages around those that are used.
    assert 1024 <= most < 2 * 1024
