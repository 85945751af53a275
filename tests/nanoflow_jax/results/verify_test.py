"""Every way in which a folder can be wrong is found; what is right keeps its level."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import result_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax.results import kinds, manifest, verify, writer
from nanoflow_jax.results.figures import Ceilings
from nanoflow_jax.results.kind import Level, Tokens


def _verify(path: pathlib.Path) -> verify.Verdict:
    return verify.verify(path, project=path.parents[3])


def _write(checkout: pathlib.Path, **changes: Any) -> pathlib.Path:
    return result_folders.write(checkout, **changes)[0]


def test_a_finished_run_of_a_clean_commit_is_verified(checkout: pathlib.Path) -> None:
    path = _write(checkout)
    found = _verify(path)
    assert (found.word, found.complaints, found.changed) == ("verified", (), ())
    assert verify.levels(found, [found]) == {
        "mix: output": Level.ONE_RUN,
        "mix: input and output": Level.ONE_RUN,
    }


def test_the_speed_of_interpreted_kernels_is_no_measurement(checkout: pathlib.Path) -> None:
    found = _verify(_write(checkout, plan={"interpreted": True}))
    assert set(verify.levels(found, [found]).values()) == {Level.CPU_NUMERICS}


def test_a_failed_run_is_history_and_no_claim(checkout: pathlib.Path) -> None:
    path = _write(checkout, samples=[result_folders.sample(0)])
    found = _verify(path)
    assert (found.word, found.complaints, found.is_claim) == ("failed run", (), False)


def _origin(path: pathlib.Path, **changes: Any) -> None:
    origin = manifest.read(path).origin
    result_folders.reseal(path, origin=msgspec.structs.replace(origin, **changes))


def _figure(path: pathlib.Path, **changes: Any) -> None:
    first, *others = manifest.read(path).figures
    figures = (msgspec.structs.replace(first, **changes), *others)
    result_folders.reseal(path, figures=figures)


def _other_samples(path: pathlib.Path, samples: list[dict[str, Any]], **changes: Any) -> None:
    result_folders.rewrite_samples(path, [msgspec.json.encode(one) for one in samples])
    result_folders.reseal(path, **changes)


def _raw_samples(path: pathlib.Path, data: bytes) -> None:
    (path / manifest.SAMPLES).write_bytes(data)
    result_folders.reseal(path)


def _file(path: pathlib.Path, name: str, data: bytes) -> None:
    (path / name).write_bytes(data)


def _restated(path: pathlib.Path, **changes: Any) -> None:
    """Another manifest in the same place."""
    found = msgspec.structs.replace(manifest.read(path), **changes)
    (path / manifest.MANIFEST).write_bytes(manifest.encode(found))


def _renamed(path: pathlib.Path, name: str) -> None:
    _restated(path, run=msgspec.structs.replace(manifest.read(path).run, name=name))


def _twice(path: pathlib.Path) -> None:
    """A better figure beside the right one of its name."""
    first, *others = manifest.read(path).figures
    _restated(path, figures=(msgspec.structs.replace(first, median=1e9), first, *others))


def _pipe(path: pathlib.Path) -> None:
    (path / "log.txt").unlink()
    os.mkfifo(path / "log.txt")


def _tokens(path: pathlib.Path, data: bytes) -> None:
    _file(path, manifest.TOKENS, data)
    result_folders.reseal(path)


_SAMPLES = [result_folders.sample(i) for i in range(3)]
_DRIFT = Ceilings(before={"copy_bytes_per_s": 1.0}, after={"copy_bytes_per_s": 1.1})
_WRONG: list[tuple[Callable[[pathlib.Path], object], str]] = [
    (
        lambda path: _figure(path, median=41.0),
        "manifest.json: 'mix: output' is 41 tokens/s (25 to 50 of 3), the samples give 40 tokens/s "
        "(25 to 50 of 3)",
    ),
    (lambda path: _figure(path, high=60.0), "is 40 tokens/s (25 to 60 of 3)"),
    (lambda path: _figure(path, fraction=0.5, ceiling="c"), "of 3, 0.5 of c), the samples"),
    (_twice, "manifest.json: two figures have one name"),
    (
        lambda path: _other_samples(path, [{**one, "seconds": -1.0} for one in _SAMPLES]),
        "samples.jsonl.gz: line 3 took -1.0 s",
    ),
    (
        lambda path: _other_samples(path, [{**one, "output_tokens": 10**400} for one in _SAMPLES]),
        "samples.jsonl.gz: a number is too large: int too large to convert",
    ),
    (
        lambda path: _restated(path, date="20261125"),
        "the date '20261125' is no day of the form YYYY-MM-DD",
    ),
    (lambda path: _restated(path, date="yesterday"), "the date 'yesterday' is no day of the form"),
    (lambda path: _renamed(path, "A B"), "single - _ . between them, got 'A B'"),
    (_pipe, "log.txt: it is no plain file"),
    (lambda path: _figure(path, name="best"), "the samples give no figure 'best'"),
    (lambda path: _figure(path, name="best"), "the figure 'mix: output' is missing"),
    (
        lambda path: _other_samples(path, [*_SAMPLES[:2], {**_SAMPLES[2], "seconds": 1.0}]),
        "'mix: output' is 40 tokens/s (25 to 50 of 3), the samples give 50",
    ),
    (
        lambda path: _other_samples(path, _SAMPLES[:2], num_samples=2),
        "samples.jsonl.gz: 2 samples, 3 were to be taken",
    ),
    (
        lambda path: _other_samples(path, _SAMPLES[:2]),
        "it says 3 samples were taken, 2 are there",
    ),
    (
        lambda path: _other_samples(path, [_SAMPLES[0], _SAMPLES[2]], num_samples=2),
        "after 1 rounds of case mix comes 2",
    ),
    (
        lambda path: _other_samples(path, [*_SAMPLES[:2], {**_SAMPLES[2], "tokens_sha256": "6f"}]),
        "runs of mix gave different tokens",
    ),
    (
        lambda path: result_folders.reseal(path, unfit=("other processes: 1",)),
        "the device was not fit to be measured: other processes: 1",
    ),
    (lambda path: result_folders.reseal(path, ceilings=_DRIFT), "drifted by +10.0% during the run"),
    (
        lambda path: _tokens(path, msgspec.json.encode(Tokens(hashes={"m": {"a": "1", "b": "2"}}))),
        "tokens.json: m: modes a and b gave different tokens",
    ),
    (lambda path: _tokens(path, b'{"hashes": 1}'), "tokens.json: Expected `object`, got `int`"),
    (lambda path: _tokens(path, b"[" * 100_000), "tokens.json: "),
    (lambda path: _origin(path, is_clean=False), "the tree had changes beside commit "),
    (lambda path: _origin(path, commit=None), "no commit is recorded"),
    (lambda path: _origin(path, versions={}), "the version of jaxlib is not recorded"),
    (
        lambda path: result_folders.reseal(path, status="failed"),
        "manifest.json: a failed run claims figures",
    ),
    (
        lambda path: result_folders.reseal(path, status="running"),
        "the run goes on, or was cut off; `python -m nanoflow_jax.evidence close ",
    ),
    (
        lambda path: result_folders.reseal(
            path, run=msgspec.structs.replace(manifest.read(path).run, kind="speed")
        ),
        "manifest.json: there is no kind 'speed' of results; there are ",
    ),
    (lambda path: result_folders.reseal(path, format=2), "manifest.json: format 2 is not 1"),
    (lambda path: (path / "log.txt").unlink(), "log.txt: there is no such file"),
    (
        lambda path: ((path / manifest.SAMPLES).unlink(), result_folders.reseal(path)),
        "samples.jsonl.gz: there is no such file",
    ),
    (lambda path: (path / manifest.MANIFEST).unlink(), "manifest.json: it cannot be read: No such"),
    (lambda path: _file(path, "notes.md", b""), "notes.md: no such file belongs here"),
    (
        lambda path: (_file(path, "notes.md", b""), result_folders.reseal(path)),
        "notes.md: a result has no file of that name",
    ),
    (lambda path: (path / "more").mkdir(), "more: no such file belongs here"),
    (lambda path: _file(path, "log.txt", b"x"), "log.txt: its SHA-256 is not the manifest's"),
    (lambda path: _file(path, manifest.MANIFEST, b"{"), "manifest.json: Input data was truncated"),
    (lambda path: _file(path, manifest.MANIFEST, b"\xff"), "manifest.json: "),
    (lambda path: _file(path, manifest.MANIFEST, b"{}"), "manifest.json: Object missing required"),
    (lambda path: _raw_samples(path, b"no gzip"), "samples.jsonl.gz: it is truncated or damaged"),
    (
        lambda path: _raw_samples(path, (path / manifest.SAMPLES).read_bytes()[:-9]),
        "samples.jsonl.gz: it is truncated or damaged",
    ),
    (lambda path: _raw_samples(path, gzip.compress(b"{}")), "its last line has no end"),
    (
        lambda path: _raw_samples(path, gzip.compress(b"{}\n")),
        "samples.jsonl.gz: Object missing required field `case`, in line 1",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), _WRONG)
def test_a_folder_that_is_wrong_is_refused_with_the_reason(
    spoil: Callable[[pathlib.Path], object], message: str, checkout: pathlib.Path
) -> None:
    path = _write(checkout)
    spoil(path)
    found = _verify(path)
    assert found.word == "REFUSED"
    assert any(message in said for said in found.complaints), found.complaints


def test_a_result_from_before_a_field_was_added_is_still_verified(
    checkout: pathlib.Path,
) -> None:
    path = _write(checkout)
    fields = json.loads((path / manifest.MANIFEST).read_bytes())
    del fields["load"]

    def text() -> bytes:
        return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"

    fields["digest"] = ""
    fields["digest"] = hashlib.sha256(text()).hexdigest()
    _file(path, manifest.MANIFEST, text())
    assert _verify(path).complaints == ()
    assert manifest.read(path).load is None


def test_a_folder_that_was_moved_is_refused(checkout: pathlib.Path) -> None:
    path = _write(checkout)
    moved = path.rename(path.parent / "2020-01-01-toy-mix")
    found = _verify(moved)
    (said,) = found.complaints
    place = "cpu-abacus-7-x2/2020-01-01-toy-mix"
    assert said == f"its place is cpu-abacus-7-x2/{path.name}, not {place}"


def test_a_gpus_result_needs_ceilings_and_the_drivers_version(checkout: pathlib.Path) -> None:
    device = manifest.Device(platform="gpu", name="NVIDIA H200")
    ceilings = {"copy_bytes_per_s": 4e12}
    path = _write(checkout, device=device, before=ceilings, after=ceilings)
    assert path.parent.name == "nvidia-h200"
    origin = manifest.read(path).origin
    versions = {name: v for name, v in origin.versions.items() if name != "driver"}
    _origin(path, versions=versions)
    assert _verify(path).complaints == (
        f"{path}/manifest.json: the version of driver is not recorded",
    )
    _origin(path, versions={**versions, "driver": "580.1"})
    assert _verify(path).word == "verified"
    result_folders.reseal(path, ceilings=None)
    assert _verify(path).complaints == ("no ceilings were measured before and after",)


@pytest.fixture(scope="module")
def good(first_checkout: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A good result, to be left as it was."""
    return _write(shutil.copytree(first_checkout, tmp_path_factory.mktemp("good") / "project"))


def _check_found(file: pathlib.Path, content: bytes) -> None:
    """Puts other bytes into a file of a result for as long as it is verified."""
    before = file.read_bytes()
    try:
        file.write_bytes(content)
        found = _verify(file.parent)
    finally:
        file.write_bytes(before)
    assert found.word == "REFUSED"
    assert file.name in found.complaints[0]


@settings(max_examples=100)
@given(data=st.data())
def test_a_byte_that_was_flipped_is_found_wherever_it_was(
    data: st.DataObject, good: pathlib.Path
) -> None:
    file = data.draw(st.sampled_from(sorted(good.iterdir())))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    _check_found(file, bytes(content))


@given(data=st.data())
def test_bytes_that_were_cut_or_appended_are_found(data: st.DataObject, good: pathlib.Path) -> None:
    file = data.draw(st.sampled_from(sorted(good.iterdir())))
    content = file.read_bytes()
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    _check_found(file, data.draw(st.sampled_from([cut, content + b"\n", content + b" "])))


@pytest.mark.parametrize(
    ("kernel", "word"), [("toy", "STALE"), ("pieces", "STALE"), ("other", "verified")]
)
def test_a_result_is_stale_once_a_kernel_that_it_used_has_changed(
    kernel: str, word: str, checkout: pathlib.Path
) -> None:
    path = _write(checkout)
    (checkout / "pallas_kernels" / f"{kernel}.py").write_text("# better\n")
    found = _verify(path)
    assert found.word == word
    assert found.is_claim == (word == "verified")
    assert found.changed == ((f"pallas_kernels/{kernel}.py",) if word == "STALE" else ())
    (checkout / "pallas_kernels" / f"{kernel}.py").unlink()
    assert _verify(path).word == word


def test_what_a_kind_says_of_todays_kernels_counts_until_one_changes(
    checkout: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(checkout)
    known = kinds.KINDS["throughput"]
    told = dataclasses.replace(known, complaints_today=lambda run: [f"{run.name} is another"])
    monkeypatch.setitem(kinds.KINDS, "throughput", told)
    found = _verify(path)
    assert (found.word, found.complaints) == ("REFUSED", ("toy-mix is another",))
    (checkout / "pallas_kernels" / "toy.py").write_text("# better\n")
    assert _verify(path).word == "STALE"


def _again(path: pathlib.Path, checkout: pathlib.Path, *, factor: float, **run: Any) -> None:
    """Moves a result to an earlier day, and measures again, `factor` times as slow."""
    result_folders.reseal(path, date="2020-02-02")
    slower = [{**one, "seconds": one["seconds"] * factor} for one in _SAMPLES]
    _write(checkout, samples=slower, **run)


@pytest.mark.parametrize(
    ("factor", "run", "level"),
    [
        (1.04, {}, Level.REPEATED),
        (0.96, {"seed": 7}, Level.REPEATED),
        (1.06, {}, Level.ONE_RUN),
        (0.94, {}, Level.ONE_RUN),
        (1.0, {"name": "other"}, Level.ONE_RUN),
        (1.0, {"plan": {"dense_batch": 8}}, Level.ONE_RUN),
        (1.0, {"kernels": ("other",)}, Level.ONE_RUN),
        (1.0, {"measured_by": "somebody else"}, Level.THIRD_PARTY),
    ],
)
def test_a_figure_is_repeated_if_another_day_agrees_within_five_percent(
    factor: float, run: dict[str, Any], level: Level, checkout: pathlib.Path
) -> None:
    _again(_write(checkout), checkout, factor=factor, **run)
    found = verify.verify_all(checkout / "configs" / "results", project=checkout)
    assert [one.word for one in found] == ["verified", "verified"]
    for one in found:
        assert set(verify.levels(one, found).values()) == {level}


def test_a_refused_result_repeats_nothing(checkout: pathlib.Path) -> None:
    _again(_write(checkout), checkout, factor=1.0)
    root = checkout / "configs" / "results"
    first = next(root.glob("*/2020-02-02-*"))
    _file(first, "log.txt", b"")
    found = verify.verify_all(root, project=checkout)
    assert [one.word for one in found] == ["REFUSED", "verified"]
    assert set(verify.levels(found[1], found).values()) == {Level.ONE_RUN}


def test_numbers_of_a_cpu_are_no_measurement_however_often_they_are_repeated(
    checkout: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kinds.KINDS, "toy", result_folders.TOY)
    root = checkout / "configs" / "results"
    for day in ("2020-01-01", "2020-01-02"):
        run = result_folders.run(kind="toy", num_samples=8)
        with writer.ResultWriter(root, run, project=checkout) as result:
            result.set_ceilings(before={"flops_per_s": 10}, after={"flops_per_s": 10.1})
            for one in result_folders.toy_samples():
                result.add_sample(msgspec.structs.asdict(one))
            result.set_tokens(Tokens(hashes={"mix": {"a": "5e", "b": "5e"}}))
            assert result.finish().message == ""
        result_folders.reseal(result.path, date=day)
    found = verify.verify_all(root, project=checkout)
    assert [verify.levels(one, found) for one in found] == [{"speed": Level.CPU_NUMERICS}] * 2


def test_a_kinds_file_that_is_missing_makes_a_failed_run(
    checkout: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kinds.KINDS, "toy", result_folders.TOY)
    run = result_folders.run(kind="toy", num_samples=8)
    with writer.ResultWriter(checkout, run, project=checkout) as result:
        result.set_ceilings(before={"flops_per_s": 10}, after={"flops_per_s": 10})
        for one in result_folders.toy_samples():
            result.add_sample(msgspec.structs.asdict(one))
        assert result.finish().message == "tokens.json is missing"


def test_all_results_are_verified_and_what_is_no_result_is_refused(
    checkout: pathlib.Path,
) -> None:
    path = _write(checkout)
    root = path.parents[1]
    (root / "notes.md").write_text("")
    (path.parent / "empty").mkdir()
    found = verify.verify_all(root, project=checkout)
    assert [(one.path.name, one.word) for one in found] == [
        (path.name, "verified"),
        ("empty", "REFUSED"),
        ("notes.md", "REFUSED"),
    ]
    with pytest.raises(ValueError, match="none: there is no such folder of results"):
        verify.verify_all(root / "none", project=checkout)
