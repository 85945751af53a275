import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints import orbax_store, safetensors_file
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder

Make = Callable[..., Path]
_INDEX = "model.safetensors.index.json"


def test_a_folder_gives_its_config_tensors_and_text_files(make_model: Make) -> None:
    path = make_model({"a": np.arange(6).reshape(2, 3)})
    folder = ModelFolder.open(str(path))
    assert folder.path == path
    assert folder.config["hidden_size"] == 4
    assert folder.generation_config == {"eos_token_id": [2, 3]}
    spec = folder.tensors["a"]
    assert (spec.name, spec.dtype, spec.shape, spec.nbytes) == ("a", np.int64, (2, 3), 48)
    assert folder.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert folder.read_slice("a", (slice(1, None), slice(-2, 9))).tolist() == [[4, 5]]
    assert folder.read_slice("a", (slice(None), slice(2, 1))).shape == (2, 0)
    assert folder.text_file("tokenizer.json") == path / "tokenizer.json"
    assert folder.text_file("chat_template.jinja") is None


def test_a_folder_without_generation_config_says_none(make_model: Make) -> None:
    path = make_model({"a": np.arange(6)})
    (path / "generation_config.json").unlink()
    assert ModelFolder.open(path).generation_config is None


def test_a_missing_folder_a_file_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none: does not exist; wanted the folder of a model"):
        ModelFolder.open(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: is a file; wanted the folder of a model"):
        ModelFolder.open(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: is empty; download a model into it"):
        ModelFolder.open(tmp_path / "empty")


def test_a_missing_config_is_named(make_model: Make) -> None:
    path = make_model({"a": np.arange(6)})
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; download the whole"):
        ModelFolder.open(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", [b"", b"{'a': 1}", b"[]", b"\xff\xfe", b"<html>"])
def test_garbage_in_a_config_is_refused_by_name(make_model: Make, name: str, text: bytes) -> None:
    path = make_model({"a": np.arange(6)})
    (path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=f"{name}: the file"):
        ModelFolder.open(path)


def test_a_tensor_that_is_not_there_is_refused_with_names_near_it(make_model: Make) -> None:
    folder = ModelFolder.open(make_model({"layers.0.q": np.arange(6), "z": np.arange(6)}))
    with pytest.raises(CheckpointError, match=r"no tensor 'layers\.1\.q' among its 2 .*layers\.0"):
        folder.read("layers.1.q")
    with pytest.raises(CheckpointError, match="no tensor 'y'"):
        folder.read_slice("y", (slice(None),))


@pytest.mark.parametrize("index", [(), (slice(None), slice(None)), (slice(None, None, 2),)])
def test_an_index_that_does_not_fit_is_refused(make_model: Make, index: tuple[slice, ...]) -> None:
    folder = ModelFolder.open(make_model({"a": np.arange(6)}))
    with pytest.raises(CheckpointError, match=r"'a' has shape \[6\]: wanted one slice with step 1"):
        folder.read_slice("a", index)


@pytest.mark.parametrize("name", ["../x", "a/b", "", "/etc/passwd"])
def test_c11_a_text_file_cannot_lie_outside_the_folder(make_model: Make, name: str) -> None:
    with pytest.raises(CheckpointError, match="a text file must be a plain file name"):
        ModelFolder.open(make_model({"a": np.arange(6)})).text_file(name)


def test_c3_code_in_a_folder_is_never_run(make_model: Make, tmp_path: Path) -> None:
    path = make_model({"a": np.arange(6)})
    config = {"auto_map": {"AutoConfig": "modeling.Config"}, "trust_remote_code": True}
    (path / "config.json").write_text(json.dumps(config))
    for name in ("modeling.py", "__init__.py", "conftest.py"):
        (path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert ModelFolder.open(path).config == config
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_tells_models_apart_and_knows_a_copy(make_model: Make) -> None:
    one = {"a": np.arange(6), "b": np.arange(2)}
    path = make_model(one, name="one")
    wanted = ModelFolder.open(path).fingerprint()
    assert len(wanted) == 64
    assert ModelFolder.open(make_model(one, name="copy")).fingerprint() == wanted
    others = [
        make_model(one, name="sharded", shards=2),
        make_model({"a": np.arange(6), "c": np.arange(2)}, name="renamed"),
        make_model({"a": np.arange(6), "b": np.arange(3)}, name="longer"),
    ]
    (path / "config.json").write_text('{"hidden_size": 8}')
    found = {ModelFolder.open(other).fingerprint() for other in [*others, path]}
    assert len(found | {wanted}) == 5


def test_the_fingerprint_reads_no_weights(make_model: Make) -> None:
    path = make_model({"a": np.zeros(6)})
    wanted = ModelFolder.open(path).fingerprint()
    with open(path / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert ModelFolder.open(path).fingerprint() == wanted


def test_the_door_opens_either_form(make_model: Make, tmp_path: Path) -> None:
    source = ModelFolder.open(make_model({"a": np.arange(6.0)}, shards=1))
    orbax_store.convert(source, tmp_path / "out")
    converted = ModelFolder.open(tmp_path / "out")
    assert converted.config == source.config
    assert converted.generation_config == source.generation_config
    assert converted.text_file("tokenizer.json") == tmp_path / "out" / "tokenizer.json"
    assert converted.read_slice("a", (slice(4, None),)).tolist() == [4.0, 5.0]
    assert converted.fingerprint() != source.fingerprint()


def test_safetensors_win_over_a_stray_manifest(make_model: Make) -> None:
    path = make_model({"a": np.arange(6)})
    (path / "manifest.json").write_text("{}")
    assert ModelFolder.open(path).read("a").shape == (6,)
    assert safetensors_file.read_header(path / "model.safetensors").keys() == {"a"}
