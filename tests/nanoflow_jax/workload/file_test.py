import json

import pytest

from nanoflow_jax.workload import file as workload_file


def _write(tmp_path, content):
    path = tmp_path / "mix.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_mix_is_one_request_or_a_list_of_them(tmp_path):
    path = _write(
        tmp_path, {"many": [{"prompt": [1, 2], "out": 3}] * 2, "one": {"prompt": [4], "out": 5}}
    )

    mixes = workload_file.load(path)

    assert [len(mixes[name]) for name in ("many", "one")] == [2, 1]
    assert mixes["one"][0] == workload_file.WorkRequest(prompt_ids=(4,), output_len=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ([1], "is not an object from names to requests"),
        ({}, "is not an object from names to requests"),
        ({"a": [{"prompt": [1]}]}, r"entry a\[0\] is not"),
        ({"a": [{"prompt": [], "out": 1}]}, r"entry a\[0\] is not"),
        ({"a": {"prompt": ["x"], "out": 1}}, r"entry a\[0\] is not"),
        ({"a": [{"prompt": [1], "out": 0}]}, r"entry a\[0\] is not"),
        ({"a": [{"prompt": [1], "out": True}]}, r"entry a\[0\] is not"),
        ({"a": ["x"]}, r"entry a\[0\] is not"),
    ],
)
def test_a_file_of_another_form_is_refused_by_place(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        workload_file.load(_write(tmp_path, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no\.json cannot be read"):
        workload_file.load(tmp_path / "no.json")
