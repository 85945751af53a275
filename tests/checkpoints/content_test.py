"""Parts of a model are known by what is in them, and their hashes are computed once."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints import content, orbax_store, safetensors_file
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder

Make = Callable[..., Path]
Tensors = dict[str, np.ndarray]
_NAMES = ("layers.0.q.weight", "embed.weight", "layers.0.none", "layers.0.scale")


def _parts(path: Path, names: tuple[str, ...] = _NAMES) -> tuple[ModelFolder, content.Part]:
    folder = ModelFolder.open(path)
    return folder, content.Part(folder, names)


def _hash(path: Path, cache: Path | None = None) -> tuple[str, list[int]]:
    """The hash of a part, and how many bytes were read for it."""
    folder, part = _parts(path)
    read: list[int] = []
    found = content.hashes(
        folder, {"it": part}, cache=cache, progress=lambda done, total: read.append(done)
    )
    return found["it"], read


def _settle(path: Path, age_s: float = 60.0) -> None:
    """Files look as if they had not been changed lately."""
    then = time.time() - age_s
    for file in path.rglob("*"):
        os.utime(file, (then, then))


def test_a_part_is_a_safetensors_file_of_its_tensors(
    make_model: Make, tensors: Tensors, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    _, part = _parts(make_model(tensors, shards=3))
    written = tmp_path / "part.safetensors"
    written.write_bytes(b"".join(part.chunks()))
    assert written.stat().st_size == part.nbytes
    file = safetensors_file.SafetensorsFile(written)
    assert sorted(file.tensors) == sorted(_NAMES)
    for name in _NAMES:
        assert_same(file.view(name), tensors[name])
    assert content.file_sha256(written) == content.sha256_of(part.chunks())


def test_any_range_of_a_part_is_a_piece_of_the_whole(make_model: Make, tensors: Tensors) -> None:
    path = make_model(tensors, shards=2)
    orbax_store.convert(ModelFolder.open(path), path.parent / "orbax")
    for folder in (path, path.parent / "orbax"):
        _, part = _parts(folder)
        whole = part.read(0, part.nbytes)
        for start in range(0, part.nbytes, 37):
            for size in (1, 8, 61, part.nbytes):
                assert part.read(start, start + size) == whole[start : start + size]


def test_the_same_tensors_stored_otherwise_have_the_same_hash(
    make_model: Make, tensors: Tensors
) -> None:
    one, many = make_model(tensors), make_model(dict(reversed(tensors.items())), shards=3, name="m")
    orbax_store.convert(ModelFolder.open(one), one.parent / "orbax")
    found = [_hash(path)[0] for path in (one, many, one.parent / "orbax")]
    assert len(set(found)) == 1
    whole = b"".join(_parts(one)[1].chunks())
    assert found[0] == hashlib.sha256(whole).hexdigest()


def test_another_value_or_shape_has_another_hash(make_model: Make, tensors: Tensors) -> None:
    changed = tensors | {"layers.0.scale": np.array(1.25, np.float32)}
    reshaped = tensors | {"embed.weight": tensors["embed.weight"].reshape(4, 7)}
    paths = [make_model(some, name=str(i)) for i, some in enumerate((tensors, changed, reshaped))]
    assert len({_hash(path)[0] for path in paths}) == 3


def test_hashes_are_computed_once_for_files_that_do_not_change(
    make_model: Make, tensors: Tensors, tmp_path: Path
) -> None:
    path, cache = make_model(tensors), tmp_path / "cache"
    _settle(path)
    first, read = _hash(path, cache)
    assert read
    assert _hash(path, cache) == (first, [])
    (path / "model.safetensors").touch()
    found, read = _hash(path, cache)
    assert found == first
    assert read


def test_a_changed_byte_is_found_though_hashes_were_kept(
    make_model: Make, tensors: Tensors, tmp_path: Path
) -> None:
    path, cache = make_model(tensors), tmp_path / "cache"
    _settle(path)
    first, _ = _hash(path, cache)
    file = path / "model.safetensors"
    data = file.read_bytes()
    place = safetensors_file.read_header(file)["embed.weight"].start
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert _hash(path, cache)[0] != first


def test_hashes_of_files_that_were_just_changed_are_not_kept(
    make_model: Make, tensors: Tensors, tmp_path: Path
) -> None:
    """The next change might leave their times as they are."""
    path, cache = make_model(tensors), tmp_path / "cache"
    _settle(path, age_s=-60.0)
    _hash(path, cache)
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["empty", "no json", "other hash", "other form"])
def test_kept_hashes_that_are_damaged_are_computed_again(
    make_model: Make, tensors: Tensors, tmp_path: Path, damage: str
) -> None:
    path, cache = make_model(tensors), tmp_path / "cache"
    _settle(path)
    first, _ = _hash(path, cache)
    (kept,) = cache.iterdir()
    whole = json.loads(kept.read_text())
    if damage == "other hash":
        whole["fields"]["parts"] = dict.fromkeys(whole["fields"]["parts"], "f" * 64)
    texts = {"empty": "", "no json": "{", "other form": "[]"}
    kept.write_text(texts.get(damage, json.dumps(whole)))
    found, read = _hash(path, cache)
    assert found == first
    assert read
    assert _hash(path, cache) == (first, [])


def test_hashes_that_cannot_be_kept_are_told_and_computed(
    make_model: Make, tensors: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, cache = make_model(tensors), tmp_path / "cache"
    cache.write_text("a file")
    _settle(path)
    assert _hash(path, cache)[0] == _hash(path)[0]
    assert "hashes of weights are not kept" in caplog.text


def test_files_that_change_while_they_are_read_are_refused(
    make_model: Make, tensors: Tensors
) -> None:
    path = make_model(tensors)
    folder, part = _parts(path)
    with pytest.raises(CheckpointError, match="changed while it was read; start again when noth"):
        content.hashes(folder, {"it": part}, progress=lambda *_: _settle(path))
    (path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="are not there any more; it changed while it was"):
        part.read(0, part.nbytes)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        part.read(0, part.nbytes)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was there before"):
        folder.stamp()


def test_a_tensor_or_a_range_that_is_not_there_is_refused(
    make_model: Make, tensors: Tensors
) -> None:
    path = make_model(tensors)
    with pytest.raises(CheckpointError, match="has no tensor 'head'"):
        _parts(path, ("head",))
    with pytest.raises(CheckpointError, match=r"has bytes \[0, 4\); \[2, 5\) were asked for"):
        ModelFolder.open(path).read_range("layers.0.scale", 2, 5)
