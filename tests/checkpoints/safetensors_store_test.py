import dataclasses
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest

from checkpoints import orbax_store, safetensors_file, safetensors_store
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder
from checkpoints.orbax_folder import Manifest

Make = Callable[..., Path]
Tensors = dict[str, np.ndarray]
_INDEX = "model.safetensors.index.json"
_TEXTS = ["config.json", "generation_config.json", "tokenizer.json"]
_PARTS = [f"model-{part:05d}-of-00003.safetensors" for part in (1, 2, 3)]


@pytest.fixture(scope="module")
def whole_orbax(
    write_model: Make, tensors: Tensors, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An Orbax conversion of a sharded model, which no test may change."""
    folder = tmp_path_factory.mktemp("source")
    source = ModelFolder.open(write_model(folder / "model", tensors, shards=2))
    orbax_store.convert(source, folder / "orbax", part_bytes=200)
    return folder / "orbax"


@pytest.fixture
def orbax(whole_orbax: Path, tmp_path: Path) -> Path:
    """A copy of that conversion."""
    return Path(shutil.copytree(whole_orbax, tmp_path / "orbax"))


def _check_conversion(
    source: Path, path: Path, tensors: Tensors, assert_same: Callable[..., None], files: list[str]
) -> None:
    safetensors_store.verify(ModelFolder.open(source), path)
    folder = ModelFolder.open(path)
    assert not folder.is_orbax
    assert folder.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(folder.read(name), tensor)
    assert sorted(os.listdir(path)) == sorted([*_TEXTS, *files])
    for name in _TEXTS:
        assert (path / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("part_bytes", "files"), [(1 << 20, ["model.safetensors"]), (300, [*_PARTS, _INDEX])]
)
def test_a_model_comes_back_from_orbax_bit_by_bit(
    orbax: Path,
    tmp_path: Path,
    tensors: Tensors,
    assert_same: Callable[..., None],
    part_bytes: int,
    files: list[str],
) -> None:
    source = ModelFolder.open(orbax)
    assert source.is_orbax
    safetensors_store.convert(source, str(tmp_path / "out"), part_bytes=part_bytes)
    _check_conversion(orbax, tmp_path / "out", tensors, assert_same, files)


def test_the_index_names_the_part_of_every_tensor_and_their_bytes(
    orbax: Path, tmp_path: Path, tensors: Tensors
) -> None:
    safetensors_store.convert(ModelFolder.open(orbax), tmp_path / "out", part_bytes=300)
    index = json.loads((tmp_path / "out" / _INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    wanted = {
        name: part
        for part in _PARTS
        for name in safetensors_file.read_header(tmp_path / "out" / part)
    }
    assert index["weight_map"] == wanted
    assert list(index["weight_map"]) == sorted(tensors)


def test_the_reference_reads_the_parts_and_finds_every_tensor_aligned(
    make_model: Make, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    reference = pytest.importorskip("safetensors")
    mixed = {
        "a": np.arange(3, dtype=np.int8),
        "b": np.arange(3).astype(ml_dtypes.bfloat16),
        "c": np.arange(3.0),
        "d": np.arange(3, dtype=np.float32),
    }
    safetensors_store.convert(ModelFolder.open(make_model(mixed)), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    read = dict(reference.deserialize(path.read_bytes()))
    assert {name: bytes(entry["data"]) for name, entry in read.items()} == {
        name: tensor.tobytes() for name, tensor in mixed.items()
    }
    infos = safetensors_file.read_header(path)
    assert list(infos) == ["c", "d", "b", "a"]
    assert all(info.start % info.dtype.itemsize == 0 for info in infos.values())
    assert safetensors_file.SafetensorsFile(path).metadata["format"] == "pt"


def test_a_model_without_tensors_is_an_empty_file(make_model: Make, tmp_path: Path) -> None:
    source = ModelFolder.open(make_model({}))
    for _ in range(2):
        safetensors_store.convert(source, tmp_path / "out")
    assert not ModelFolder.open(tmp_path / "out").tensors


def test_kill_9_costs_at_most_one_part(
    orbax: Path,
    convert_with_kills: Callable[..., tuple[list[int], list[str]]],
    tmp_path: Path,
    tensors: Tensors,
    assert_same: Callable[..., None],
) -> None:
    points = [
        "1@.unfinished.json",  # The folder holds nothing but half a file.
        f"1@.{_PARTS[1]}",  # The second part is written, but not yet renamed.
        f"1@.{_INDEX}",  # All parts are done, and the index is written, but not yet renamed.
        "0@/unfinished.json",  # The index is there, and the record of unfinished work too.
    ]
    begun, ends = convert_with_kills(safetensors_store, orbax, tmp_path / "out", points)
    assert ends == ["killed"] * len(points) + ["finished"]
    total = sum(tensor.nbytes for tensor in tensors.values())
    first = sum(
        i.nbytes for i in safetensors_file.read_header(tmp_path / "out" / _PARTS[0]).values()
    )
    assert begun == [0, first, total]
    _check_conversion(orbax, tmp_path / "out", tensors, assert_same, [*_PARTS, _INDEX])


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def _parts_kept(source: Path, output: Path, stop: Callable[..., None], damage: object) -> list[str]:
    """Stop when two parts are done, do some damage to the second, finish; the parts kept."""
    stop(safetensors_store, source, output, num_parts=2)
    before = {name: _stamp(output / name) for name in _PARTS[:2]}
    assert callable(damage)
    damage(output / _PARTS[1])
    safetensors_store.convert(ModelFolder.open(source), output, part_bytes=300)
    return [name for name in before if _stamp(output / name) == before[name]]


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _rewrite(path: Path, tensors: Tensors, **metadata: str) -> None:
    """Put other tensors, or tensors of another source, in place of a part."""
    file = safetensors_file.SafetensorsFile(path)
    whole = {name: np.array(file.view(name)) for name in file.tensors}
    safetensors_file.write_safetensors(path, {**whole, **tensors}, {**file.metadata, **metadata})


@pytest.mark.parametrize(
    ("damage", "num_kept"),
    [
        (lambda path: None, 2),
        (lambda path: path.unlink(), 1),
        (_truncate, 1),
        (lambda path: _rewrite(path, {"extra": np.arange(2)}), 1),
        (lambda path: _rewrite(path, {"layers.1.q.weight": np.zeros((8, 16), np.int8)}), 1),
        (lambda path: _rewrite(path, {}, source_fingerprint="0" * 64), 1),
    ],
    ids=["none", "lost", "truncated", "one too many", "another dtype", "another source"],
)
def test_a_finished_part_is_kept_only_if_it_is_what_is_planned(
    orbax: Path,
    stop_after_parts: Callable[..., None],
    tmp_path: Path,
    tensors: Tensors,
    assert_same: Callable[..., None],
    damage: Callable[[Path], None],
    num_kept: int,
) -> None:
    kept = _parts_kept(orbax, tmp_path / "out", stop_after_parts, damage)
    assert kept == _PARTS[:num_kept]
    _check_conversion(orbax, tmp_path / "out", tensors, assert_same, [*_PARTS, _INDEX])


def test_parts_of_another_size_are_replaced_and_none_is_left_over(
    orbax: Path,
    stop_after_parts: Callable[..., None],
    tmp_path: Path,
    tensors: Tensors,
    assert_same: Callable[..., None],
) -> None:
    stop_after_parts(safetensors_store, orbax, tmp_path / "out", num_parts=2)
    (tmp_path / "out" / f".{_PARTS[2]}.partial").touch()
    safetensors_store.convert(ModelFolder.open(orbax), tmp_path / "out")
    _check_conversion(orbax, tmp_path / "out", tensors, assert_same, ["model.safetensors"])


def test_a_model_that_was_not_converted_here_is_refused_and_left_alone(
    make_model: Make, orbax: Path, tensors: Tensors
) -> None:
    mine = make_model(tensors, name="mine", shards=2)
    before = sorted(os.listdir(mine))
    with pytest.raises(CheckpointError, match=r"holds 'config\.json', which no conversion left"):
        safetensors_store.convert(ModelFolder.open(orbax), mine)
    (mine / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds weights that are not whole .* new folder"):
        safetensors_store.convert(ModelFolder.open(orbax), mine)
    assert sorted(os.listdir(mine)) == before


def test_a_damaged_source_is_found_by_its_hash_while_it_is_copied(
    orbax: Path, tmp_path: Path
) -> None:
    manifest = Manifest.read(orbax / "manifest.json")
    wrong = dataclasses.replace(manifest.tensors["steps"], sha256="0" * 64)
    manifest = dataclasses.replace(
        manifest, tensors=MappingProxyType({**manifest.tensors, "steps": wrong})
    )
    (orbax / "manifest.json").write_bytes(manifest.to_json())
    with pytest.raises(CheckpointError, match=r"orbax: tensor 'steps': sha256 was 0000.* damaged"):
        safetensors_store.convert(ModelFolder.open(orbax), tmp_path / "out")


@pytest.mark.parametrize("name", ["__metadata__", "a\nb", ""])
def test_a_name_that_safetensors_cannot_hold_is_refused(
    orbax: Path, tmp_path: Path, name: str
) -> None:
    manifest = Manifest.read(orbax / "manifest.json")
    odd = dataclasses.replace(manifest.tensors["steps"], name=name)
    manifest = dataclasses.replace(manifest, tensors=MappingProxyType({name: odd}))
    (orbax / "manifest.json").write_bytes(manifest.to_json())
    with pytest.raises(CheckpointError, match="cannot be the name of a tensor in a safetensors"):
        safetensors_store.convert(ModelFolder.open(orbax), tmp_path / "out")


def test_verify_finds_a_changed_byte_of_a_tensor_and_of_a_text_file(
    orbax: Path, make_model: Make, tensors: Tensors, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    safetensors_store.convert(ModelFolder.open(orbax), output)
    checked: list[tuple[int, int]] = []
    safetensors_store.verify(
        ModelFolder.open(orbax), output, progress=lambda *args: checked.append(args)
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert checked[-1] == (total, total)
    with open(output / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    unhashed = ModelFolder.open(make_model(tensors, name="plain"))
    for source in (ModelFolder.open(orbax), unhashed):
        with pytest.raises(CheckpointError, match=r"out: tensor .*: sha256 was .* convert again"):
            safetensors_store.verify(source, output)
    (output / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: differs from .*; convert again"):
        safetensors_store.verify(ModelFolder.open(orbax), output)


def test_memory_is_bounded_by_a_part(make_model: Make, tmp_path: Path) -> None:
    num_bytes = 1 << 20
    large = {f"w{i}": np.full(num_bytes, i, np.uint8) for i in range(6)}
    source = ModelFolder.open(make_model(large))
    tracemalloc.start()
    try:
        safetensors_store.convert(source, tmp_path / "out", part_bytes=2 * num_bytes)
        _, peak = tracemalloc.get_traced_memory()  # Of what numpy owns; mapped files are not.
    finally:
        tracemalloc.stop()
    assert 2 * num_bytes <= peak < 2.5 * num_bytes
