import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import files
from checkpoints.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1, 2]", "must be a JSON object, got list"),
        (b"null", "must be a JSON object, got NoneType"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b'{"a":' * 100_000, "nests JSON too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "has the key 'b' twice"),
    ],
)
def test_json_that_is_no_object_is_refused_with_its_fault(text: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        files.parse_json_object(text, file=Path("some/file.json"), unique_keys=True)
    assert "some/file.json" in str(error.value)


def test_a_key_said_twice_is_only_refused_where_keys_must_be_unique() -> None:
    assert files.parse_json_object(b'{"a": 1, "a": 2}', file=Path("f")) == {"a": 2}


@given(st.binary(max_size=40))
def test_any_bytes_parse_to_an_object_or_raise_a_checkpoint_error(text: bytes) -> None:
    fault = ""
    try:
        assert isinstance(files.parse_json_object(text, file=Path("f"), unique_keys=True), dict)
    except CheckpointError as error:
        fault = str(error)
    assert fault == "" or fault.startswith("f: ")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "..\\a", "a\0", None, 3, ["a"]])
def test_a_name_that_could_leave_its_folder_is_refused(name: object) -> None:
    with pytest.raises(CheckpointError, match="must be a plain file name inside the folder"):
        files.check_plain_name(name, file=Path("f"), what="it")


def test_a_plain_name_is_given_back() -> None:
    assert files.check_plain_name("..a b.json", file=Path("f"), what="it") == "..a b.json"


def test_a_missing_file_names_itself_and_the_advice(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.json: no such file; look again"):
        files.read_bytes(tmp_path / "x.json", advice="look again")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="no such file"):
        files.read_bytes(tmp_path / "x.json", advice="look again")


def test_a_file_too_large_for_json_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="100000001 bytes, more than the 100000000 allowed"):
        files.read_bytes(tmp_path / "x.json", advice="look again")


def test_an_unreadable_file_is_reported_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.json").write_text("{}")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read .*Permission denied.*permissions"):
        files.read_bytes(tmp_path / "x.json", advice="look again")


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "x", b"old")
    files.write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_failed_atomic_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_atomic(tmp_path / "x", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
