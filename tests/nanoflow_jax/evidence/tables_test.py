import pathlib

import pytest
import result_folders

from nanoflow_jax.evidence import tables
from nanoflow_jax.results import verify


def test_the_list_shows_every_result_whatever_became_of_it(checkout: pathlib.Path) -> None:
    root = checkout / "configs" / "results"
    samples = [result_folders.sample(i) for i in range(3)]
    result_folders.write(checkout, name="a-fast")
    slow = [{**one, "seconds": one["seconds"] * 3} for one in samples]
    result_folders.write(checkout, slow, name="b-slow")
    result_folders.write(checkout, samples[:1], name="c-failed")
    path, _ = result_folders.write(checkout, name="d-damaged")
    (path / "manifest.json").write_text("{")
    path, found = result_folders.write(checkout, name="e-surplus")
    (path / "notes.md").write_text("")
    result_folders.write(checkout, name="f-other", kernels=("other",))
    (checkout / "pallas_kernels" / "other.py").write_text("# better\n")

    commit = found.origin.commit[:8]
    day = f"cpu-abacus-7-x2/{found.date}"
    verdicts = verify.verify_all(root, project=checkout)
    lines = [line.split(maxsplit=5) for line in tables.results(verdicts).splitlines()[1:]]
    assert [line[0].removeprefix(f"{day}-") for line in lines] == [
        "a-fast",
        "b-slow",
        "c-failed",
        "d-damaged",
        "e-surplus",
        "f-other",
    ]
    assert lines[0][1:] == [
        "verified",
        "E3",
        "throughput",
        commit,
        "mix: output 40 tokens/s, and 1 more",
    ]
    assert lines[1][5] == "mix: output 13.33 tokens/s, and 1 more"
    assert " ".join(lines[2][1:]) == (
        f"failed run throughput {commit} samples.jsonl.gz: 1 samples, 3 were to be taken"
    )
    assert lines[3][1] == lines[4][1] == "REFUSED"
    assert "Input data was truncated" in " ".join(lines[3])
    assert "notes.md: no such file belongs here" in " ".join(lines[4])
    assert lines[5][1:3] == ["STALE", "E3"]


def test_every_figure_is_listed(checkout: pathlib.Path) -> None:
    _, found = result_folders.write(checkout)
    verdicts = verify.verify_all(checkout / "configs" / "results", project=checkout)
    lines = tables.figures(verdicts).splitlines()
    place = f"cpu-abacus-7-x2/{found.date}-toy-mix"
    assert [" ".join(line.split()) for line in lines] == [
        "result figure median low high samples of ceiling level",
        f"{place} mix: output 40 tokens/s 25 tokens/s 50 tokens/s 3 E3",
        f"{place} mix: input and output 64 tokens/s 40 tokens/s 80 tokens/s 3 E3",
    ]


def test_columns_stand_under_each_other() -> None:
    assert tables.aligned([("a", "bb", "c"), ("aaa", "b", "")]) == "a    bb  c\naaa  b"


def test_numbers_have_four_digits() -> None:
    assert [tables.number(x) for x in (0.123456, 12.3456, 999.96, 1234.56, 9.876e14)] == [
        "0.1235",
        "12.35",
        "1000",
        "1,235",
        "987,600,000,000,000",
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.905e12, "bytes/s", "3.905 TB/s"),
        (7.5e8, "FLOP/s", "750 MFLOP/s"),
        (12.0, "FLOP/s", "12 FLOP/s"),
        (7.124e14, "operations/s", "712.4 TFLOP/s"),
        (0.0123, "s", "12.3 ms"),
        (1.5e-6, "s", "1.5 us"),
        (90.0, "s", "90 s"),
        (0.0, "s", "0 s"),
        (1.25, "x", "1.25 x"),
    ],
)
def test_quantities_have_units_of_their_size(value: float, unit: str, text: str) -> None:
    assert tables.quantity(value, unit) == text


def test_both_ends_of_a_span_have_one_unit() -> None:
    assert tables.span(9.5e8, 4.1e12, "bytes/s") == "0.00095 - 4.1 TB/s"
    assert tables.span(25.0, 50.0, "tokens/s") == "25 - 50 tokens/s"
