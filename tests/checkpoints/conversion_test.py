import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import conversion, orbax_store, safetensors_store
from checkpoints.errors import CheckpointError, WritingError
from checkpoints.folder import ModelFolder
from checkpoints.orbax_folder import OrbaxTensor

Make = Callable[..., Path]
Tensors = dict[str, np.ndarray]
both_ways = pytest.mark.parametrize("store", [orbax_store, safetensors_store])


def _specs(sizes: list[int]) -> list[OrbaxTensor]:
    return [
        OrbaxTensor(name=str(i), dtype=np.dtype(np.uint8), shape=(size,), part="00000", sha256="")
        for i, size in enumerate(sizes)
    ]


def test_a_part_is_closed_when_the_next_tensor_has_no_room() -> None:
    parts = conversion.plan_parts(_specs([4, 6, 1, 20, 0, 10]), part_bytes=10)
    assert [[spec.nbytes for spec in part] for part in parts] == [[4, 6], [1], [20], [0, 10]]


@given(st.lists(st.integers(0, 30)), st.integers(0, 40))
def test_parts_hold_every_tensor_in_order_and_only_one_if_too_large(
    sizes: list[int], part_bytes: int
) -> None:
    specs = _specs(sizes)
    parts = conversion.plan_parts(specs, part_bytes=part_bytes)
    assert [spec for part in parts for spec in part] == specs
    for part in parts:
        large = [spec for spec in part if spec.nbytes > part_bytes]
        assert conversion.part_nbytes(part) <= part_bytes or len(large) == 1
        assert not large or [spec for spec in part if spec.nbytes] == large


@both_ways
def test_progress_counts_every_byte_once(
    store: ModuleType, make_model: Make, tmp_path: Path, tensors: Tensors
) -> None:
    total = sum(tensor.nbytes for tensor in tensors.values())
    copied: list[tuple[int, int]] = []
    source = ModelFolder.open(make_model(tensors))
    store.convert(
        source, tmp_path / "out", progress=lambda *args: copied.append(args), part_bytes=300
    )
    assert copied[0] == (0, total)
    assert copied[-1] == (total, total)
    assert len(copied) > 2
    assert [done for done, _ in copied] == sorted({done for done, _ in copied})


def _stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@both_ways
def test_converting_again_changes_nothing(
    store: ModuleType, make_model: Make, tmp_path: Path
) -> None:
    source = ModelFolder.open(make_model({"a": np.arange(6), "b": np.arange(6)}))
    store.convert(source, tmp_path / "out", part_bytes=48)
    before = _stamps(tmp_path / "out")
    store.convert(source, tmp_path / "out")
    assert _stamps(tmp_path / "out") == before


@both_ways
def test_an_unfinished_conversion_says_to_run_convert_again(
    store: ModuleType,
    make_model: Make,
    stop_after_parts: Callable[..., None],
    tmp_path: Path,
    tensors: Tensors,
) -> None:
    stop_after_parts(store, make_model(tensors), tmp_path / "out", num_parts=1)
    with pytest.raises(CheckpointError, match=r"conversion unfinished .*: run convert again"):
        ModelFolder.open(tmp_path / "out")
    with pytest.raises(CheckpointError, match="conversion unfinished"):
        orbax_store.verify(tmp_path / "out")


@both_ways
def test_a_changed_source_is_not_mixed_with_what_is_done(
    store: ModuleType,
    make_model: Make,
    stop_after_parts: Callable[..., None],
    tmp_path: Path,
    tensors: Tensors,
) -> None:
    source, output = make_model(tensors), tmp_path / "out"
    stop_after_parts(store, source, output, num_parts=1)
    (source / "config.json").write_text('{"hidden_size": 5}')
    with pytest.raises(CheckpointError, match="has changed since that conversion began; give"):
        store.convert(ModelFolder.open(source), output)


@pytest.mark.parametrize(
    ("first", "second"), [(orbax_store, safetensors_store), (safetensors_store, orbax_store)]
)
def test_a_conversion_of_the_other_kind_is_not_gone_on_with(
    first: ModuleType,
    second: ModuleType,
    make_model: Make,
    stop_after_parts: Callable[..., None],
    tmp_path: Path,
    tensors: Tensors,
) -> None:
    source, output = make_model(tensors), tmp_path / "out"
    stop_after_parts(first, source, output, num_parts=1)
    before = _stamps(output)
    with pytest.raises(CheckpointError, match=r"wanted format .*; convert into a new folder"):
        second.convert(ModelFolder.open(source), output)
    assert _stamps(output) == before


@both_ways
def test_another_model_does_not_replace_a_finished_conversion(
    store: ModuleType, make_model: Make, tmp_path: Path
) -> None:
    store.convert(ModelFolder.open(make_model({"a": np.arange(6)})), tmp_path / "out")
    other = make_model({"b": np.arange(6)}, name="other")
    with pytest.raises(CheckpointError, match="holds a conversion of another model"):
        store.convert(ModelFolder.open(other), tmp_path / "out")


@both_ways
def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(
    store: ModuleType, make_model: Make, tmp_path: Path
) -> None:
    source = make_model({"a": np.arange(6)})
    for output in (tmp_path / "out", source):
        output.mkdir(exist_ok=True)
        (output / "a note").touch()
        before = _stamps(output)
        with pytest.raises(CheckpointError, match="holds 'a note', which no conversion left"):
            store.convert(ModelFolder.open(source), output)
        assert _stamps(output) == before


@both_ways
def test_an_output_that_is_a_file_is_refused(
    store: ModuleType, make_model: Make, tmp_path: Path
) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(CheckpointError, match=r"no folder can be made there .*File exists"):
        store.convert(ModelFolder.open(make_model({"a": np.arange(6)})), tmp_path / "out")


@both_ways
def test_two_conversions_do_not_write_to_one_folder(
    store: ModuleType, make_model: Make, tmp_path: Path
) -> None:
    source = ModelFolder.open(make_model({"a": np.arange(6)}))

    def progress(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="another conversion is writing there; wait"):
            store.convert(source, tmp_path / "out")

    store.convert(source, tmp_path / "out", progress=progress)


@both_ways
def test_too_little_room_is_said_before_anything_is_copied(
    store: ModuleType, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelFolder.open(make_model({"a": np.arange(6)}))
    usage = shutil.disk_usage(tmp_path)._replace(free=47)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WritingError, match=r"48 bytes are still to be written .* has 47 free"):
        store.convert(source, tmp_path / "out")
    assert not {"parts/00000", "model.safetensors"} & {
        os.path.relpath(path, tmp_path / "out") for path in (tmp_path / "out").rglob("*")
    }
