"""An end says which model it has by the hashes of the parts that it holds."""

import shutil

import numpy as np
import pytest
import random_folder

from checkpoints import orbax_store, safetensors_file
from checkpoints.folder import ModelFolder
from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import model_source
from nanoflow_jax.split import command_flags, identity

_FLOAT32 = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=[False, True], ids=["head of its own", "tied"])
def folder(request, tmp_path):
    return random_folder.write(
        tmp_path / "model", seed=2, num_hidden_layers=3, tie_word_embeddings=request.param
    )


def _of(path, layers=None, **changes):
    section = config_lib.ModelSection(model=str(path), **changes)
    return identity.of(section, model_source.open_model(section), _FLOAT32, layers=layers)


def _copy(path, output, change):
    """A folder with other tensors."""
    shutil.copytree(path, output)
    source = ModelFolder.open(path)
    tensors = {name: np.array(source.read(name)) for name in source.tensors}
    change(tensors)
    safetensors_file.write_safetensors(output / "model.safetensors", tensors)
    return output


def test_a_model_has_its_embedding_its_layers_and_its_head(folder):
    names = [name for name, _ in _of(folder).parts]
    assert names == ["embedding", "layer 0", "layer 1", "layer 2", "head"]
    hashes = {found for _, found in _of(folder).parts}
    assert len(hashes) == 5


def test_some_layers_have_the_hashes_that_they_have_in_the_whole_model(folder):
    whole = dict(_of(folder).parts)
    first = _of(folder, [(0, 1)]).parts
    last = _of(folder, [(2, 3)]).parts
    assert [name for name, _ in first] == ["embedding", "layer 0"]
    tied = model_source.open_model(config_lib.ModelSection(model=str(folder))).config
    start = ["embedding"] if tied.tied_embeddings else []
    assert [name for name, _ in last] == [*start, "layer 2", "head"]
    assert all(whole[name] == found for name, found in (*first, *last))
    assert _of(folder, []).parts == ()


def test_a_folder_with_some_layers_alone_has_an_identity(folder, tmp_path):
    def cut(tensors):
        for name in [name for name in tensors if ".1." in name or ".2." in name]:
            del tensors[name]

    part = _copy(folder, tmp_path / "part", cut)
    assert _of(part, [(0, 1)]).parts == _of(folder, [(0, 1)]).parts
    with pytest.raises(ValueError, match=r"has no tensor 'model\.layers\.1\."):
        _of(part, [(0, 2)])


def test_a_fine_tune_with_equal_headers_differs_in_the_layer_that_was_tuned(folder, tmp_path):
    def tune(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1e-6

    tuned = _of(_copy(folder, tmp_path / "tuned", tune))
    ours = dict(_of(folder).parts)
    assert [name for name, found in tuned.parts if ours[name] != found] == ["layer 1"]
    assert tuned.config_sha256 == _of(folder).config_sha256


def test_a_conversion_to_orbax_is_the_same_model(folder, tmp_path):
    orbax_store.convert(ModelFolder.open(folder), tmp_path / "orbax")
    assert _of(tmp_path / "orbax").parts == _of(folder).parts


def test_random_weights_are_told_apart_by_their_seed(folder):
    first, again, other = (
        _of(folder, random_weights=True, weight_seed=seed).parts for seed in (1, 1, 2)
    )
    assert first == again
    assert not set(first) & {*other, *_of(folder).parts}


def test_hashing_is_told_while_it_goes_on(folder, capsys):
    section = config_lib.ModelSection(model=str(folder))
    source = model_source.open_model(section)
    identity.of(section, source, _FLOAT32, progress=command_flags.hash_meter())
    first, last = capsys.readouterr().err.splitlines()
    assert first == "hashing the weights, so that both ends can tell that they have the same"
    done, _, total = last.partition(" of ")
    assert done == total
    assert total.endswith(" kB")
