import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import orbax_folder, orbax_store
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder
from checkpoints.orbax_folder import Manifest, OrbaxWeights

_TENSOR = np.random.default_rng(0).standard_normal((6, 50))


@pytest.fixture
def converted(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A conversion with one part."""
    source = make_model({"a": _TENSOR, "none": np.zeros((0, 2))})
    orbax_store.convert(ModelFolder.open(source), tmp_path / "out")
    return tmp_path / "out"


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def _set_tensor(**fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"]["a"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "wanted format .* version 1, got .* version 2; convert"),
        (lambda m: m.update(format="x"), "got 'x' version 1"),
        (lambda m: m.update(format={}), "got {} version 1"),
        (lambda m: m.pop("tensors"), "missing or of the wrong kind"),
        (lambda m: m.update(tensors=[]), "missing or of the wrong kind"),
        (lambda m: m.update(source_fingerprint="x"), "missing or of the wrong kind"),
        (lambda m: m["text_sha256"].update({"a": 1}), "missing or of the wrong kind"),
        (lambda m: m["text_sha256"].update({"../a": "0" * 64}), "must be a plain file name"),
        (lambda m: m["tensors"].update(a=[]), "tensor 'a': wanted dtype, shape, part"),
        (_set_tensor(dtype="X"), "tensor 'a': dtype 'X' is not read here"),
        (_set_tensor(shape=[-1]), "tensor 'a': shape must be a list"),
        (_set_tensor(part="../../x"), "tensor 'a': wanted dtype, shape, part"),
        (_set_tensor(part=0), "tensor 'a': wanted dtype, shape, part"),
        (_set_tensor(part=None), "tensor 'a': wanted dtype, shape, part"),
        (_set_tensor(sha256="00"), "tensor 'a': wanted dtype, shape, part"),
        (_set_tensor(part="00007"), "parts/00007: no such folder; the conversion is damaged"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    converted: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    _edit(converted / "manifest.json", change)
    with pytest.raises(CheckpointError, match=message):
        ModelFolder.open(converted)


@pytest.mark.parametrize("fields", [{"dtype": "F32"}, {"shape": [50, 6]}])
def test_a_manifest_that_does_not_fit_its_part_is_refused_on_reading(
    converted: Path, fields: dict[str, object]
) -> None:
    _edit(converted / "manifest.json", _set_tensor(**fields))
    with pytest.raises(
        CheckpointError, match=r"manifest\.json says .*, stored is float64\[6, 50\]"
    ):
        OrbaxWeights(converted).read("a")


def test_a_tensor_that_its_part_lacks_is_refused_on_reading(converted: Path) -> None:
    _edit(converted / "manifest.json", lambda m: m["tensors"].update(b=m["tensors"]["a"]))
    with pytest.raises(CheckpointError, match=r"tensor 'b': cannot be read .* convert again"):
        OrbaxWeights(converted).read("b")


def test_a_tensor_without_elements_needs_no_part(converted: Path) -> None:
    shutil.rmtree(converted / "parts" / "00000" / "state")
    weights = OrbaxWeights(converted)
    assert weights.read("none").shape == (0, 2)
    assert weights.read_slice("none", (slice(0, 0), slice(0, 1))).shape == (0, 1)
    assert weights.tensors["none"].part is None


def test_a_manifest_is_read_as_it_was_written(converted: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(converted / "manifest.json")
    (tmp_path / "copy.json").write_bytes(manifest.to_json())
    assert Manifest.read(tmp_path / "copy.json") == manifest


def test_a_folder_is_a_conversion_from_its_first_file_on(tmp_path: Path) -> None:
    assert not orbax_folder.is_conversion(tmp_path)
    (tmp_path / "unfinished.json").touch()
    assert orbax_folder.is_conversion(tmp_path)


def _try_read(folder: Path) -> np.ndarray | CheckpointError:
    try:
        return OrbaxWeights(folder).read("a")
    except CheckpointError as error:
        return error


def test_a_lost_file_of_a_part_is_an_error_and_not_zeros(converted: Path, tmp_path: Path) -> None:
    num_lost = 0
    for number, path in enumerate(sorted((converted / "parts").rglob("*"))):
        if path.is_dir():
            continue
        copy = tmp_path / f"copy{number}"
        shutil.copytree(converted, copy)
        (copy / path.relative_to(converted)).unlink()
        found = _try_read(copy)
        if isinstance(found, CheckpointError):
            assert "the conversion is damaged" in str(found)
            num_lost += 1
        else:
            np.testing.assert_array_equal(found, _TENSOR)
    assert num_lost >= 2


def test_a_lost_entry_of_a_part_is_an_error_and_not_zeros(converted: Path) -> None:
    base = f"file://{converted}/parts/00000/state/"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    (chunk,) = [key for key in store.list().result() if key.startswith(b"a/c/")]
    store.write(chunk, None).result()
    with pytest.raises(CheckpointError, match=r"tensor 'a': cannot be read .*missing"):
        OrbaxWeights(converted).read("a")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 100), at=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_a_damaged_part_is_refused_or_read_or_found_by_verify(
    converted: Path, which: int, at: int, bits: int
) -> None:
    paths = [path for path in sorted((converted / "parts").rglob("*")) if path.is_file()]
    path = paths[which % len(paths)]
    data = path.read_bytes()
    if not data:
        return
    at %= len(data)
    path.write_bytes(data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :])
    found = _try_read(converted)
    if isinstance(found, CheckpointError):
        assert "the conversion is damaged" in str(found)
    elif found.tobytes() != _TENSOR.tobytes():
        with pytest.raises(CheckpointError, match="sha256"):
            orbax_store.verify(converted)
    path.write_bytes(data)
