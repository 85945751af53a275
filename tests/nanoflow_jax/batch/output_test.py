"""Exactly one complete line per row, whatever the file holds when a job starts."""

import errno
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.batch import output


def _open(path: pathlib.Path, num_rows: int = 5, **options: Any) -> output.OutputFile:
    merged = {"job": "j", "is_mine": np.ones(num_rows, bool), **options}
    return output.OutputFile(path, **merged)


def _row(number: int, *, ok: bool = True, text: str = "x") -> dict[str, Any]:
    usage = {"prompt_tokens": 2, "completion_tokens": 3}
    body = {"usage": usage, "text": text} if ok else {"error": {}}
    return {
        "id": f"batch_req_j-{number}",
        "custom_id": "c",
        "response": {"status_code": 200 if ok else 400, "body": body},
        "error": None if ok else {"code": "x", "message": "y"},
    }


def test_rows_that_were_written_are_found_again(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out"
    first = _open(path)
    first.append(3, _row(3))
    first.append(0, _row(0, ok=False))
    first.close()
    again = _open(path)
    assert again.done.tolist() == [True, False, False, True, False]
    assert again.totals == output.Totals(num_ok=1, num_failed=1, prompt_tokens=2, output_tokens=3)
    assert again.totals == first.totals
    again.close()


@given(st.data())
def test_any_cut_of_the_file_keeps_exactly_its_complete_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "out"
    file = _open(path)
    for number in (2, 0, 4):
        file.append(number, _row(number, text="\u00e9\n"))
    file.close()
    whole = path.read_bytes()
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    path.write_bytes(cut)
    again = _open(path)
    num_lines = cut.count(b"\n")
    assert np.flatnonzero(again.done).tolist() == sorted([2, 0, 4][:num_lines])
    assert path.read_bytes() == cut[: cut.rfind(b"\n") + 1]
    again.append(1, _row(1))
    assert path.read_bytes().count(b"\n") == num_lines + 1
    again.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"hello\n", "line 2 is not an answer of this job"),
        (b"\n", "line 2 is not an answer of this job"),
        (b"\0\0\0\n", "line 2 is not an answer of this job"),
        (b"[]\n", "line 2 is not an answer of this job"),
        (b'{"id": 4}\n', "line 2 is not an answer of this job"),
        (json.dumps({**_row(1), "id": "batch_req_other-1"}).encode() + b"\n", "its id is"),
        (json.dumps({**_row(1), "id": "batch_req_j-01"}).encode() + b"\n", "its id is"),
        (json.dumps(_row(5)).encode() + b"\n", "the job has no row 5 for this process"),
        (json.dumps(_row(4)).encode() + b"\n", "the job has no row 4 for this process"),
        (json.dumps(_row(0)).encode() + b"\n", "row 0 stands there twice"),
        (b'{"id": "batch_req_j-1"}\n', "line 2 is not an answer of this job"),
    ],
)
def test_a_complete_line_that_is_not_ours_is_refused_and_kept(
    tmp_path: pathlib.Path, line: bytes, message: str
) -> None:
    path = tmp_path / "out"
    data = json.dumps(_row(0)).encode() + b"\n" + line + b"half"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as refused:
        _open(path, is_mine=np.array([1, 1, 1, 1, 0], bool))
    assert "--restart" in str(refused.value)
    assert path.read_bytes() == data


def test_a_row_is_one_write(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _open(tmp_path / "out")
    written: list[bytes] = []
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        written.append(bytes(data))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    file.append(0, _row(0))
    assert written == [(tmp_path / "out").read_bytes()]
    assert written[0].endswith(b"\n")
    file.close()


def _short_writes(error: int | None) -> Callable[[int, Any], int]:
    """Writes ten bytes at a time, and fails at the second if there is an error."""
    real, calls = os.write, 0

    def write(descriptor: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2 and error is not None:
            raise OSError(error, os.strerror(error))
        return real(descriptor, bytes(data)[:10])

    return write


def test_a_short_write_is_finished(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _open(tmp_path / "out")
    monkeypatch.setattr(os, "write", _short_writes(None))
    file.append(0, _row(0))
    assert json.loads((tmp_path / "out").read_bytes()) == _row(0)
    file.close()


def test_f4_a_full_disk_leaves_a_file_that_can_go_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _open(tmp_path / "out")
    file.append(0, _row(0))
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", _short_writes(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left on device"):
            file.append(1, _row(1))
    assert not file.done[1]
    file.close()
    again = _open(tmp_path / "out")
    assert again.done.tolist() == [True, False, False, False, False]
    again.append(1, _row(1))
    again.close()
    assert (tmp_path / "out").read_bytes().count(b"\n") == 2


def test_the_disk_is_waited_for_at_intervals(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, syncs = 0.0, 0

    def fsync(_: int) -> None:
        nonlocal syncs
        syncs += 1

    file = _open(tmp_path / "out", clock=lambda: now)
    monkeypatch.setattr(os, "fsync", fsync)
    counts = []
    for number, now in enumerate((1.0, 4.9, 5.1, 6.0, 11.0)):  # noqa: B007
        file.append(number, _row(number))
        counts.append(syncs)
    assert counts == [0, 0, 1, 1, 2]
    file.close()


def test_a_lone_surrogate_is_escaped(tmp_path: pathlib.Path) -> None:
    file = _open(tmp_path / "out")
    row = {**_row(0), "custom_id": "\ud800"}
    file.append(0, row)
    assert json.loads((tmp_path / "out").read_bytes()) == row
    file.close()


def test_a_second_job_is_refused_until_the_first_ends(tmp_path: pathlib.Path) -> None:
    lock = tmp_path / "out.jsonl.lock"
    with (
        output.locked(lock),
        pytest.raises(ValueError, match=r"another job is writing .*/out.jsonl; wait for it"),
        output.locked(lock),
    ):
        pass
    with output.locked(lock):
        pass
