"""Random access to lines against splitting the whole file."""

import hashlib
import json
import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.batch import source
from nanoflow_jax.openai import errors


def _open(tmp_path: pathlib.Path, data: bytes) -> source.JsonlSource:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    return source.JsonlSource(path)


@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b".").replace(b"\r", b"."))),
    st.booleans(),
)
def test_lines_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ends: bool
) -> None:
    data = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    found = _open(tmp_path_factory.mktemp("lines"), data)
    wanted = data.split(b"\n")
    if wanted[-1] == b"":
        wanted.pop()
    assert [found[i] for i in range(len(found))] == list(enumerate(wanted))
    assert found.blank_lines().tolist() == [line == b"" for line in wanted]
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.num_bytes == len(data)
    found.close()


def test_lines_longer_than_a_chunk_are_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_CHUNK_BYTES", 3)
    found = _open(tmp_path, b"abcdefg\nh\n\nijk")
    assert [found[i][1] for i in range(len(found))] == [b"abcdefg", b"h", b"", b"ijk"]


def test_marks_of_other_systems_are_no_part_of_a_line(tmp_path: pathlib.Path) -> None:
    found = _open(tmp_path, b"\xef\xbb\xbf{}\r\n\r\n{}\r\n")
    assert [found[i][1] for i in range(3)] == [b"{}", b"", b"{}"]
    assert found.blank_lines().tolist() == [False, True, False]


def test_an_empty_file_has_no_lines(tmp_path: pathlib.Path) -> None:
    assert len(_open(tmp_path, b"")) == 0


def test_a_missing_file_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"--input=.*none.jsonl: there is no such file"):
        source.JsonlSource(tmp_path / "none.jsonl")


def test_what_is_no_plain_file_is_refused(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is not a plain file; rows are read by their place"):
            source.JsonlSource(path)


def test_a_file_that_shrinks_or_shifts_is_noticed(tmp_path: pathlib.Path) -> None:
    found = _open(tmp_path, b"abc\ndef\n")
    found.path.write_bytes(b"abc\nd")
    with pytest.raises(OSError, match="changed while it was read"):
        _ = found[1]
    found.path.write_bytes(b"abcdefghi")
    with pytest.raises(OSError, match="changed while it was read"):
        _ = found[0]


def test_a_row_too_long_is_cut_and_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MAX_ROW_BYTES", 10)
    found = _open(tmp_path, b'"' + b"x" * 50 + b'"\n{}\n')
    assert len(found[0][1]) == 11
    with pytest.raises(errors.ApiError, match="line 1 is longer than 10 bytes"):
        source.parse_object(found[0][1], line=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "line 4 is not JSON"),
        (b'{"a": NaN}', "line 4 is not JSON: NaN is no JSON"),
        (b'{"a": "\xff"}', "line 4 is not JSON"),
        (b"[" * 200_000, "line 4 nests JSON too deeply"),
        (b"[1]", "line 4 is not a JSON object, but list"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 4 is not JSON"),
        (b"  ", "line 4 is not JSON"),
    ],
)
def test_what_is_no_json_object_is_refused_with_its_line(data: bytes, message: str) -> None:
    with pytest.raises(errors.ApiError, match=message):
        source.parse_object(data, line=3)


@given(st.lists(st.sampled_from(["a", "b", "c", "\u00e9", None, 5])))
def test_repeated_ids_are_those_that_stood_before(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str | int | None]
) -> None:
    rows = [{"prompt": "x"} if name is None else {"custom_id": name} for name in ids]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    found = _open(tmp_path_factory.mktemp("ids"), data)
    wanted = {
        i: ids.index(name)
        for i, name in enumerate(ids)
        if isinstance(name, str) and ids.index(name) < i
    }
    assert source.repeated_ids(found) == wanted
    found.close()


def test_an_id_is_the_same_however_json_spells_it(tmp_path: pathlib.Path) -> None:
    data = (
        b'{"custom_id": "a"}\n{"cust\\u006fm_id": "\\u0061"}\n{"custom_id": "b"\n{"custom_id": 1}'
    )
    assert source.repeated_ids(_open(tmp_path, data)) == {1: 0}


def test_ids_that_only_share_a_hash_are_not_repeated(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SameDigest:
        def __init__(self, *_: object, **__: object) -> None: ...

        def digest(self) -> bytes:
            return b"12345678"

    monkeypatch.setattr(source.hashlib, "blake2b", SameDigest)
    data = b'{"custom_id": "a"}\n{"custom_id": "b"}\n{"custom_id": "a"}\n'
    assert source.repeated_ids(_open(tmp_path, data)) == {2: 0}
