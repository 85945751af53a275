"""The record of a job: what may not change, and the words for it."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from nanoflow_jax.batch import record

_IDENTITY = record.Identity(
    input="10 bytes with sha256 abc",
    model="m",
    tokenizer="t",
    dtype="float32",
    max_context_len=0,
    sampling={"max_tokens": 4, "stop": ["a"]},
    seed=0,
    shard="0 of 1",
)


def _begin(identity: record.Identity = _IDENTITY) -> record.JobRecord:
    return record.JobRecord.begin(identity, created=5, model_name="tiny")


def test_a_record_comes_back_as_it_was_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.job"
    assert record.try_read(path) is None
    _begin().write(path)
    assert record.try_read(path) == _begin()
    assert [p.name for p in tmp_path.iterdir()] == ["out.job"]


def test_the_same_settings_may_go_on() -> None:
    _begin().check_same(dataclasses.replace(_IDENTITY), pathlib.Path("out"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input", "11 bytes", "the input file changed (10 bytes with sha256 abc then, 11 bytes"),
        ("model", "other", "the model's config or weights changed (m then, other now)"),
        ("tokenizer", "u", "the model's tokenizer, chat template or generation_config.json"),
        ("dtype", "bfloat16", "--dtype, or the kind of device that --dtype=auto goes by"),
        ("max_context_len", 9, "--max_context_len changed (0 then, 9 now)"),
        ("sampling", {"max_tokens": 5, "stop": ["a"]}, "changed (max_tokens: 4 then, 5 now)"),
        ("sampling", {"max_tokens": 4}, "changed (stop: ['a'] then, None now)"),
        ("seed", 3, "--seed changed (0 then, 3 now)"),
        ("shard", "1 of 2", "--process_index or --process_count changed"),
    ],
)
def test_any_change_is_refused_by_name_with_what_to_do(
    field: str, value: Any, message: str
) -> None:
    changed = dataclasses.replace(_IDENTITY, **{field: value})
    with pytest.raises(ValueError, match="out was begun with other settings") as refused:
        _begin().check_same(changed, pathlib.Path("out"))
    assert message in str(refused.value)
    assert "--restart" in str(refused.value)


def test_every_field_of_the_identity_is_compared() -> None:
    names = {field.name for field in dataclasses.fields(record.Identity)}
    assert names == set(record._MEANINGS)


def test_jobs_have_one_name_exactly_if_they_ask_the_same() -> None:
    other = dataclasses.replace(_IDENTITY, seed=1)
    second_process = dataclasses.replace(_IDENTITY, shard="1 of 2")
    assert _begin().job == _begin(second_process).job
    assert _begin().job != _begin(other).job


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1, "identity": {}}', "\udc80"]
)
def test_a_file_that_is_no_record_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "out.job"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"out.job is not the record of a job .*delete both"):
        record.try_read(path)


def test_a_record_is_json_that_people_can_read(tmp_path: pathlib.Path) -> None:
    _begin().write(tmp_path / "out.job")
    found = json.loads((tmp_path / "out.job").read_text())
    assert found["created"] == 5
    assert found["identity"]["sampling"] == {"max_tokens": 4, "stop": ["a"]}
