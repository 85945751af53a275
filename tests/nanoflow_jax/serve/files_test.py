"""The file store: whole files or none, and never a path of somebody else's making."""

import errno
import json
import os
import pathlib
from typing import Any

import pytest

from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.serve import data_dir, files


def _put(store: files.FileStore, data: bytes = b"{}\n", name: str = "a.jsonl") -> files.FileInfo:
    with store.upload() as upload:
        upload.write(data)
        return upload.commit(filename=name)


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_again_after_a_restart(tmp_path: pathlib.Path) -> None:
    store = files.FileStore(tmp_path, clock=lambda: 5.5)
    info = _put(store, b"one\ntwo\n")
    assert info == files.FileInfo(
        id=info.id, bytes=8, created_at=5, filename="a.jsonl", purpose="batch"
    )
    again = files.FileStore(tmp_path)
    assert again.all() == [info]
    found, file = again.open(info.id)
    with file:
        assert (found, file.read()) == (info, b"one\ntwo\n")


def test_an_upload_that_is_not_committed_leaves_nothing(tmp_path: pathlib.Path) -> None:
    store = files.FileStore(tmp_path)
    with store.upload() as upload:
        upload.write(b"half")
        assert store.all() == []
    assert _names(tmp_path) == []


def test_what_a_killed_upload_left_is_removed_at_the_next_start_and_nothing_else(
    tmp_path: pathlib.Path,
) -> None:
    info = _put(files.FileStore(tmp_path))
    lost = "file-" + 24 * "0"
    for name in (f".{lost}.partial", lost, f".{info.id}.json.partial", "precious", "file-x"):
        (tmp_path / name).write_text("x")
    store = files.FileStore(tmp_path)
    assert store.all() == [info]
    assert _names(tmp_path) == sorted([info.id, f"{info.id}.json", "precious", "file-x"])


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", "", "a\0b", "x" * 10_000, "\U0001f600"]
)
def test_c11_the_name_that_a_client_gives_is_text_and_never_a_path(
    tmp_path: pathlib.Path, name: str
) -> None:
    store = files.FileStore(tmp_path / "files")
    info = _put(store, name=name)
    assert info.filename == name[: files.MAX_NAME_LEN]
    assert _names(tmp_path) == ["files"]
    assert _names(tmp_path / "files") == sorted([info.id, f"{info.id}.json"])


@pytest.mark.parametrize("name", ["../secret", "file-../../secret", ".", "", "file-1", "secret"])
def test_c11_an_id_that_the_store_did_not_draw_finds_nothing(
    tmp_path: pathlib.Path, name: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    store = files.FileStore(tmp_path / "files")
    for call in (store.get, store.path, store.open, store.hold, store.delete):
        with pytest.raises(ApiError, match="there is no file") as caught:
            call(name)
        assert caught.value.status_code == 404
    assert (tmp_path / "secret").exists()


def test_a_file_above_the_size_or_the_lines_is_refused(tmp_path: pathlib.Path) -> None:
    store = files.FileStore(tmp_path, files.Limits(max_file_bytes=10, max_file_lines=3))
    assert _put(store, b"0123456789").bytes == 10
    with pytest.raises(ApiError, match="more than 10 bytes; split it") as caught:
        _put(store, b"0123456789a")
    assert caught.value.status_code == 413
    with pytest.raises(ApiError, match="more than 3 lines; split it"):
        _put(store, b"\n\n\n\n")
    assert len(_names(tmp_path)) == 2


def test_an_empty_file_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ApiError, match="the file is empty"):
        _put(files.FileStore(tmp_path), b"")
    assert _names(tmp_path) == []


def test_files_and_uploads_at_once_are_bounded(tmp_path: pathlib.Path) -> None:
    store = files.FileStore(tmp_path, files.Limits(max_files=2, max_uploads=1))
    with store.upload() as upload:
        with pytest.raises(ApiError, match="1 uploads are under way") as caught, store.upload():
            pass
        assert caught.value.status_code == 429
        upload.write(b"x")
        upload.commit(filename="x")
    info = _put(store)
    with pytest.raises(ApiError, match="2 files are stored, which is the most; delete some"):
        _put(store)
    store.delete(info.id)
    _put(store)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (errno.ENOSPC, 507, "the server's disk is full; nothing was stored"),
        (errno.EDQUOT, 507, "the server's disk is full; nothing was stored"),
        (errno.EROFS, 503, r"the server's storage fails \(Read-only file system\)"),
    ],
)
def test_f4_a_disk_that_refuses_leaves_nothing_behind_and_is_said(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    status: int,
    message: str,
) -> None:
    store = files.FileStore(tmp_path)

    def refuse(*_: Any) -> Any:
        raise OSError(number, os.strerror(number), str(tmp_path))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(ApiError, match=message) as caught:
            _put(store)
    assert caught.value.status_code == status
    assert str(tmp_path) not in str(caught.value)
    assert _names(tmp_path) == []
    assert files.FileStore(tmp_path).all() == store.all() == []
    _put(store)


def test_a_file_that_is_held_is_not_deleted(tmp_path: pathlib.Path) -> None:
    store = files.FileStore(tmp_path)
    info = _put(store)
    store.hold(info.id)
    store.hold(info.id)
    store.release(info.id)
    with pytest.raises(ApiError, match=f"a batch still reads {info.id}") as caught:
        store.delete(info.id)
    assert caught.value.status_code == 409
    store.release(info.id)
    store.delete(info.id)
    assert _names(tmp_path) == []
    assert not store.has(info.id)


def test_a_delete_that_the_disk_refuses_leaves_the_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = files.FileStore(tmp_path)
    info = _put(store)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        with pytest.raises(ApiError, match="the server's storage fails"):
            store.delete(info.id)
    assert store.all() == [info]


def test_a_download_outlives_the_delete_of_its_file(tmp_path: pathlib.Path) -> None:
    store = files.FileStore(tmp_path)
    info = _put(store, b"abc")
    _, file = store.open(info.id)
    with file:
        store.delete(info.id)
        assert file.read() == b"abc"


def test_a_write_after_the_upload_was_closed_goes_nowhere(tmp_path: pathlib.Path) -> None:
    store = files.FileStore(tmp_path / "files")
    with store.upload() as upload:
        pass
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    try:
        upload.write(b"late")
    finally:
        os.close(other)
    assert (tmp_path / "other").read_bytes() == b""


@pytest.mark.parametrize("damage", ["{", '{"id": "../x"}', "[]", "missing"])
def test_damage_is_named_at_the_start(tmp_path: pathlib.Path, damage: str) -> None:
    info = _put(files.FileStore(tmp_path))
    if damage == "missing":
        (tmp_path / info.id).unlink()
    else:
        (tmp_path / f"{info.id}.json").write_text(damage)
    with pytest.raises(ValueError, match=rf"{info.id}\.json is damaged .*move it out of"):
        files.FileStore(tmp_path)


def test_a_record_under_another_name_is_damage(tmp_path: pathlib.Path) -> None:
    info = _put(files.FileStore(tmp_path))
    value = json.loads((tmp_path / f"{info.id}.json").read_text())
    value["id"] = "file-" + 24 * "1"
    (tmp_path / f"{info.id}.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="it speaks of 'file-1111"):
        files.FileStore(tmp_path)


def test_a_data_dir_belongs_to_one_server(tmp_path: pathlib.Path) -> None:
    with (
        data_dir.opened(tmp_path / "data" / "here") as place,
        pytest.raises(ValueError, match=r"--data_dir=.*here is in use by another server"),
        data_dir.opened(place),
    ):
        pass
    with data_dir.opened(tmp_path / "data" / "here"):
        pass


def test_a_data_dir_that_cannot_be_made_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "plain").write_text("")
    with (
        pytest.raises(ValueError, match=r"--data_dir=.*plain cannot be used .*give a folder"),
        data_dir.opened(tmp_path / "plain"),
    ):
        pass
