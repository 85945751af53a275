"""Made-up requests beside those of a file."""

import gzip

import numpy as np
import pytest

from nanoflow_jax.workload import trace_check, traces


@pytest.mark.parametrize(
    "names",
    [
        "arrival_s,input_tokens,output_tokens",
        "index,input,output",
        "T,ContextTokens,GeneratedTokens",
    ],
)
def test_lengths_are_read_by_the_names_of_their_columns(tmp_path, names):
    path = tmp_path / "trace.csv"
    path.write_text(f"{names}\n0,374,44\n1,5,6\n")
    np.testing.assert_array_equal(trace_check.read(path), [[374, 44], [5, 6]])
    packed = tmp_path / "trace.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    np.testing.assert_array_equal(trace_check.read(packed), trace_check.read(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has columns \(none\); wanted are those of one of input_tokens and output_tokens;"),
        ("a,b\n1,2\n", "has columns a, b; wanted are those of one of"),
        ("input,output\n", "has no request below its line of names"),
        ("input,output\n1,2\n3\n", "row 3: '3' has no positive numbers of prompt and output"),
        ("input,output\n1,two\n", "row 2: '1,two' has no positive numbers of prompt and output"),
        ("input,output\n1,0\n", "row 2: '1,0' has no positive numbers of prompt and output"),
        ("input,output\n\n", "row 2: '' has no positive numbers of prompt and output"),
    ],
)
def test_a_file_that_is_no_trace_is_a_message_that_names_the_row(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        trace_check.read(path)


def test_a_file_that_is_not_packed_or_missing_is_a_message(tmp_path):
    path = tmp_path / "trace.csv.gz"
    path.write_text("input,output\n")
    for one in (path, tmp_path / "none.csv"):
        with pytest.raises(ValueError, match=f"{one.name} cannot be read as CSV"):
            trace_check.read(one)


def _made(name, count, seed):
    made = traces.generate(name, count, seed=seed, limits=traces.NO_LIMITS)
    return np.stack([made.input_lens, made.output_lens], axis=1)


@pytest.mark.parametrize("name", ["splitwise", "lmsys", "sharegpt"])
def test_as_many_requests_of_another_seed_are_within_3_percent(name):
    text, worst = trace_check.compare(name, _made(name, 20_000, 1), seed=2)
    assert worst < 0.03
    assert text.splitlines()[-1].startswith("no mean, deviation or quantile")
    assert f"{name}, within NanoFlow's limits" in text


def test_lengths_that_are_not_those_of_the_trace_are_told():
    real = _made("lmsys", 20_000, 1)
    real[:, 1] = np.ceil(real[:, 1] * 1.1)
    text, worst = trace_check.compare("lmsys", real, seed=2)
    assert worst > 0.07
    assert text.splitlines()[-1].startswith("a mean, deviation or quantile in steps of 1 % is off")


@pytest.mark.parametrize(
    ("real", "message"),
    [
        (np.full((100, 2), 500), "of the file's 100 requests, all requests are 100, whose prompts"),
        (np.array([[5000, 1], [4000, 2]]), "within NanoFlow's limits are 0, whose prompts"),
    ],
)
def test_lengths_that_do_not_differ_cannot_be_compared(real, message):
    with pytest.raises(ValueError, match=message):
        trace_check.compare("lmsys", real, seed=0)
