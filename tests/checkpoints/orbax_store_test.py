import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from checkpoints import orbax_store
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder
from checkpoints.orbax_folder import Manifest, OrbaxWeights

Make = Callable[..., Path]
Kills = Callable[..., tuple[list[int], list[str]]]
Tensors = dict[str, np.ndarray]
_REPO = Path(orbax_store.__file__).parents[1]


def _check_conversion(
    path: Path, tensors: Tensors, assert_same: Callable[..., None], *, num_parts: int
) -> None:
    orbax_store.verify(path)
    folder = ModelFolder.open(path)
    assert folder.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(folder.read(name), tensor)
        index = tuple(slice(size // 3, size // 2 + 1) for size in tensor.shape)
        assert_same(folder.read_slice(name, index), tensor[index])
    assert sorted(os.listdir(path)) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "parts",
        "tokenizer.json",
    ]
    assert sorted(os.listdir(path / "parts")) == [f"{part:05d}" for part in range(num_parts)]


@pytest.mark.parametrize(("shards", "part_bytes", "num_parts"), [(1, 1 << 20, 1), (3, 300, 3)])
def test_a_conversion_holds_every_tensor_bit_by_bit(
    make_model: Make,
    tmp_path: Path,
    tensors: Tensors,
    assert_same: Callable[..., None],
    shards: int,
    part_bytes: int,
    num_parts: int,
) -> None:
    source = make_model(tensors, shards=shards)
    (source / "modeling.py").write_text("raise SystemExit")
    orbax_store.convert(ModelFolder.open(source), tmp_path / "out", part_bytes=part_bytes)
    _check_conversion(tmp_path / "out", tensors, assert_same, num_parts=num_parts)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_parts_are_checkpoints_that_orbax_itself_restores_and_shards(
    make_model: Make, tmp_path: Path, tensors: Tensors, assert_same: Callable[..., None]
) -> None:
    orbax_store.convert(ModelFolder.open(make_model(tensors)), tmp_path / "out")
    restored = ocp.load(tmp_path / "out" / "parts" / "00000")
    assert restored.keys() == tensors.keys() - {"layers.0.none"}
    for name, tensor in restored.items():
        assert_same(tensor, tensors[name])
    name = "layers.0.q.weight"
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("x",))
    wanted = jax.ShapeDtypeStruct(
        tensors[name].shape,
        tensors[name].dtype,
        sharding=NamedSharding(mesh, PartitionSpec(None, "x")),
    )
    abstract = {other: wanted if other == name else ... for other in restored}
    sharded = ocp.load(tmp_path / "out" / "parts" / "00000", abstract)[name]
    assert sharded.sharding == wanted.sharding
    assert_same(np.asarray(sharded), tensors[name])


def test_a_conversion_of_a_conversion_is_the_same_model(
    make_model: Make, tmp_path: Path, tensors: Tensors, assert_same: Callable[..., None]
) -> None:
    orbax_store.convert(ModelFolder.open(make_model(tensors)), tmp_path / "one")
    orbax_store.convert(ModelFolder.open(tmp_path / "one"), tmp_path / "two", part_bytes=300)
    _check_conversion(tmp_path / "two", tensors, assert_same, num_parts=3)


def test_kill_9_at_any_change_costs_at_most_one_part(
    make_model: Make,
    convert_with_kills: Kills,
    tmp_path: Path,
    tensors: Tensors,
    assert_same: Callable[..., None],
) -> None:
    source = make_model(tensors, shards=2)
    points = [
        "1@.unfinished.json",  # The folder holds nothing but half a file.
        "2@.unfinished.json",  # A part is there, but not entered in the list of finished parts.
        "4@/parts/00001.",  # A part is half written.
        "1@.manifest.json",  # All parts are done.
        "0@/unfinished.json",  # The manifest is there, and the list of finished parts too.
    ]
    begun, ends = convert_with_kills(orbax_store, source, tmp_path / "out", points)
    _check_conversion(tmp_path / "out", tensors, assert_same, num_parts=3)
    assert ends == ["killed"] * len(points) + ["finished"]
    assert begun == sorted(begun)  # No finished part was ever done again,
    assert begun[-1] > 0  # and the last child found some.


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 56, 8))
def test_kill_9_at_every_single_change_loses_nothing(
    make_model: Make,
    convert_with_kills: Kills,
    tmp_path: Path,
    tensors: Tensors,
    assert_same: Callable[..., None],
    first: int,
) -> None:
    source = make_model(tensors, shards=2)
    for point in range(first, first + 8):
        output = tmp_path / str(point)
        convert_with_kills(orbax_store, source, output, [f"{point}@", f"{point // 2}@"])
        _check_conversion(output, tensors, assert_same, num_parts=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kill_9_at_random_moments_loses_nothing(
    make_model: Make,
    convert_with_kills: Kills,
    tmp_path: Path,
    tensors: Tensors,
    assert_same: Callable[..., None],
    seed: int,
) -> None:
    moments = random.Random(seed)
    points = [f"{moments.uniform(0.05, 0.4):.3f}" for _ in range(8)]
    convert_with_kills(orbax_store, make_model(tensors, shards=2), tmp_path / "out", points)
    _check_conversion(tmp_path / "out", tensors, assert_same, num_parts=3)


def test_finished_parts_are_kept_and_a_lost_part_is_made_again(
    make_model: Make,
    stop_after_parts: Callable[..., None],
    tmp_path: Path,
    tensors: Tensors,
    assert_same: Callable[..., None],
) -> None:
    source, output = make_model(tensors), tmp_path / "out"
    stop_after_parts(orbax_store, source, output, num_parts=2)
    kept = (output / "parts" / "00000").stat().st_ino
    shutil.rmtree(output / "parts" / "00001")
    (output / "parts" / "00002.orbax-checkpoint-tmp-5").mkdir()
    orbax_store.convert(ModelFolder.open(source), output, part_bytes=300)
    _check_conversion(output, tensors, assert_same, num_parts=3)
    assert (output / "parts" / "00000").stat().st_ino == kept


def test_a_name_that_orbax_would_split_is_refused(make_model: Make, tmp_path: Path) -> None:
    source = ModelFolder.open(make_model({"a/b": np.arange(6)}))
    with pytest.raises(CheckpointError, match="'a/b' has '/' in its name"):
        orbax_store.convert(source, tmp_path / "out")


_FULL_DISK = """
import resource, sys
from checkpoints import errors, orbax_store
from checkpoints.folder import ModelFolder
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    orbax_store.convert(ModelFolder.open(sys.argv[1]), sys.argv[2])
except errors.WritingError as error:
    sys.exit(f"refused: {error}")
"""


def test_a_disk_that_fills_up_says_to_make_room_and_the_rest_follows(
    make_model: Make, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    tensors = {"a": np.random.default_rng(0).standard_normal(50_000)}
    source, output = make_model(tensors), tmp_path / "out"
    failed = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(source), str(output)],
        env={**os.environ, "PYTHONPATH": str(_REPO), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert failed.returncode == 1
    assert re.search(r"refused: .*writing failed \(.*; make room or check", failed.stderr), (
        failed.stderr
    )
    orbax_store.convert(ModelFolder.open(source), output)
    _check_conversion(output, tensors, assert_same, num_parts=1)


def test_verify_finds_a_changed_byte_of_a_tensor_and_of_a_text_file(
    make_model: Make, tmp_path: Path
) -> None:
    tensor = np.random.default_rng(0).standard_normal(5000)
    orbax_store.convert(ModelFolder.open(make_model({"a": tensor})), tmp_path / "out")
    orbax_store.verify(tmp_path / "out")
    _flip_stored(tmp_path / "out", tensor.tobytes()[2000:2010])
    with pytest.raises(CheckpointError, match=r"tensor 'a': sha256 was .* when it was copied"):
        orbax_store.verify(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: sha256 was .* convert again"):
        orbax_store.verify(tmp_path / "out")


def _flip_stored(folder: Path, needle: bytes) -> None:
    """Change one byte of a tensor in the file of the part that holds it."""
    for path in (folder / "parts").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        if needle in data:
            at = data.index(needle)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            return
    pytest.fail("the tensor is not stored as plain bytes")


def test_hashes_are_of_the_bytes_copied(make_model: Make, tmp_path: Path) -> None:
    # printf '\1\2\3\4' | sha256sum
    wanted = "9f64a747e1b97f131fabb6b447296c9b6f0201e79fb3c5356e6c77e89b6a806a"
    tensor = np.array([[1, 2], [3, 4]], np.uint8)
    orbax_store.convert(ModelFolder.open(make_model({"a": tensor})), tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out" / "manifest.json")
    assert manifest.tensors["a"].sha256 == wanted
    assert OrbaxWeights(tmp_path / "out").manifest == manifest
    assert json.loads(manifest.to_json())["tensors"]["a"]["part"] == "00000"
