"""A folder of fetched parts has files of our own names alone, and one writer."""

import hashlib

import pytest

from checkpoints.errors import CheckpointError
from nanoflow_jax.split import messages
from nanoflow_jax.split.weights import store as store_lib

_DATA = b"no safetensors"


def _blob(name, data=_DATA):
    return messages.Blob(name=name, sha256=hashlib.sha256(data).hexdigest(), nbytes=len(data))


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "model.safetensors", "layer 0", ""])
def test_no_name_of_the_gateway_is_a_path(tmp_path, name):
    folder = tmp_path / "a" / "b"
    blob = _blob(name)
    with store_lib.Store.opened(folder) as store:
        store.begin([blob])
        with store.appending(blob) as file:
            file.write(_DATA)
        store.finish(blob)
        assert store.is_sound(blob)
        with pytest.raises(CheckpointError, match="says its header is"):
            store.write_index([blob])
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"fetched.json", f"{blob.sha256}.safetensors"}


def test_bytes_with_another_hash_never_get_their_name(tmp_path):
    blob = _blob("layer 0")
    with store_lib.Store.opened(tmp_path) as store:
        for data in (b"xo safetensors", b"far too many bytes of something"):
            with store.appending(blob) as file:
                file.write(data)
            assert store.num_done(blob) == blob.nbytes
            with pytest.raises(store_lib.DamagedError, match="layer 0 came with hash"):
                store.finish(blob)
            assert not list(tmp_path.iterdir())


def test_partial_file_that_is_too_long_begins_anew(tmp_path):
    blob = _blob("layer 0")
    with store_lib.Store.opened(tmp_path) as store:
        (tmp_path / f".{blob.sha256}.safetensors.partial").write_bytes(_DATA * 2)
        with store.appending(blob) as file:
            assert file.tell() == 0


def test_folder_is_held_by_one_client(tmp_path):
    with (
        store_lib.Store.opened(tmp_path),
        pytest.raises(CheckpointError, match="another client fetches into it"),
        store_lib.Store.opened(tmp_path),
    ):
        pass


def test_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(CheckpointError, match=r"holds 'thesis\.tex', which no fetch left there"),
        store_lib.Store.opened(tmp_path),
    ):
        pass


def test_path_that_can_be_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="no folder can be made there"),
        store_lib.Store.opened(tmp_path / "file" / "folder"),
    ):
        pass


@pytest.mark.parametrize(
    "text", ["{}", '{"version":2,"blobs":{}}', '{"version":1,"blobs":{"a":1}}']
)
def test_record_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "fetched.json").write_text(text)
    with (
        store_lib.Store.opened(tmp_path) as store,
        pytest.raises(CheckpointError, match="is no record of what was fetched; delete the folder"),
    ):
        store.begin([_blob("layer 0")])
