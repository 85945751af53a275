import dataclasses
import pathlib

import pytest
import result_folders

from nanoflow_jax.evidence import readme
from nanoflow_jax.results import kinds, throughput, verify

_TEXT = "# Title\n\n<!-- figures: toy-mix -->\n<!-- end -->\n\nMore.\n"


def _verdicts(checkout: pathlib.Path) -> list[verify.Verdict]:
    return verify.verify_all(checkout / "configs" / "results", project=checkout)


def test_figures_are_written_between_the_markers(checkout: pathlib.Path) -> None:
    path, found = result_folders.write(checkout)
    text = readme.written(_TEXT, _verdicts(checkout))

    run = f"E3, one run: [{found.date}](configs/results/cpu-abacus-7-x2/{path.name})"
    assert text == (
        "# Title\n\n<!-- figures: toy-mix -->\n"
        "| device | what | median | from - to | samples | evidence |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        f"| Abacus 7, 2 | mix: output | 40 tokens/s | 25 - 50 tokens/s | 3 | {run} |\n"
        f"| Abacus 7, 2 | mix: input and output | 64 tokens/s | 40 - 80 tokens/s | 3 | {run} |\n"
        "<!-- end -->\n\nMore.\n"
    )
    assert readme.written(text, _verdicts(checkout)) == text
    assert readme.by_hand(text) == []


def test_a_repeated_figure_names_its_days_and_is_the_newest(checkout: pathlib.Path) -> None:
    path, found = result_folders.write(checkout)
    result_folders.reseal(path, date="2020-02-02")
    samples = [result_folders.sample(i) for i in range(3)]
    slower = [{**one, "seconds": one["seconds"] * 1.04} for one in samples]
    result_folders.write(checkout, slower)

    block = readme.block("toy-mix", _verdicts(checkout))
    folder = "configs/results/cpu-abacus-7-x2"
    assert "| mix: output | 38.46 tokens/s |" in block
    assert (
        f"| E4, repeated on another day: [{found.date}]({folder}/{found.date}-toy-mix), "
        f"[2020-02-02]({folder}/2020-02-02-toy-mix) |" in block
    )


def test_each_device_has_its_rows(checkout: pathlib.Path) -> None:
    result_folders.write(checkout)
    other = result_folders.manifest.Device(platform="cpu", name="Abacus 8")
    result_folders.write(checkout, device=other)
    block = readme.block("toy-mix", _verdicts(checkout))
    assert block.count("| Abacus 7, 2 |") == block.count("| Abacus 8 |") == 2


def test_a_kind_says_which_figures_are_headlines(
    checkout: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = dataclasses.replace(
        throughput.KIND, is_headline=lambda run, figure: figure.name == "mix: output"
    )
    monkeypatch.setitem(kinds.KINDS, "throughput", chosen)
    result_folders.write(checkout)
    block = readme.block("toy-mix", _verdicts(checkout))
    assert [line.split(" | ")[1] for line in block.splitlines()] == ["what", "---", "mix: output"]


def _stale(checkout: pathlib.Path) -> None:
    result_folders.write(checkout)
    (checkout / "pallas_kernels" / "toy.py").write_text("# better\n")


def _refused(checkout: pathlib.Path) -> None:
    path, _ = result_folders.write(checkout)
    (path / "log.txt").write_text("")


def _failed(checkout: pathlib.Path) -> None:
    result_folders.write(checkout, [])


def _dirty(checkout: pathlib.Path) -> None:
    (checkout / "new.py").write_text("")
    result_folders.write(checkout)


def _interpreted(checkout: pathlib.Path) -> None:
    result_folders.write(checkout, plan={"interpreted": True})


@pytest.mark.parametrize("spoil", [_stale, _refused, _failed, _dirty, _interpreted])
def test_only_verified_measurements_feed_the_readme(spoil, checkout: pathlib.Path) -> None:
    spoil(checkout)
    with pytest.raises(ValueError, match="no verified result of today's kernels is named toy-mix"):
        readme.written(_TEXT, _verdicts(checkout))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- figures: a -->\n", "<!-- figures: a --> has no <!-- end -->"),
        ("x\n<!-- end -->\n", "line 2: <!-- end --> stands without its counterpart"),
        (
            "<!-- figures: a -->\n<!-- figures: b -->\n<!-- end -->\n",
            "line 2: <!-- figures: b --> stands without its counterpart",
        ),
    ],
)
def test_a_marker_without_its_counterpart_is_refused(text: str, message: str) -> None:
    for use in (lambda: readme.written(text, []), lambda: readme.by_hand(text)):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize(
    "text",
    [
        "It generates 412.3 tokens/s.",
        "It generates 412.3 tok/s.",
        "1,234 tokens per second",
        "12k tokens/sec on one GPU",
        "**412** tokens a second",
        "412 output tokens/s",
        "about 412\ntokens/s on two cores",
        "30 requests/s",
        "712 TFLOP/s",
        "712 TFLOPS",
        "712 TFLOP/s/GPU and 1.2e9 FLOP/s",
        "3.9 TB/s of memory",
        "13 GB/s on one core",
        "900 GiB per second",
        "a step takes 6.5 ms",
        "a step takes 6.5ms",
        "120 µs",
        "250 microseconds",
        "2x faster than cuBLAS",
        "1.2x over the two in sequence",
        "1.2×",
        "3 times faster",
        "3 times the throughput",
        "twice as fast",
        "four times faster",
        "30 % faster",
        "30 percent more throughput, 5% slower",
        "faster by 20 %",
        "a speedup of 1.7x",
        "85 % of cuBLASLt",
        "85% of the copy ceiling",
        "80 % of the measured copy bandwidth",
        "45 % MFU",
        "| decode | 412 tokens/s |",
        "| what | tokens/s |\n|---|---|\n| decode | 412 |",
        "| what | time, ms |\n|---|---|\n| decode | 6.5 |",
        "```\noutput 412.3 tokens/s, input and output 600.0 tokens/s\n```",
    ],
)
def test_a_figure_that_a_hand_wrote_is_found(text: str) -> None:
    found = readme.by_hand(f"# Title\n\n{text}\n")
    assert found
    assert found[0].startswith("line ")
    inside = f"<!-- figures: a -->\n{text}\n<!-- end -->\n"
    assert readme.by_hand(inside) == []


@pytest.mark.parametrize(
    "text",
    [
        "An 8 GB GPU holds it; 80 GiB are better.",
        "Llama-3-8B on one H200, 70B on 8 of them",
        "8x NVIDIA H200, or 2 x 4090",
        "products of 4096x4096x14336 and 128 x 128",
        "Python 3.11, jax 0.10.2, [2408.12757]",
        "--request_timeout_s=3600, --max_tokens 32",
        "proxy_read_timeout 3600s;          # as --request_timeout_s",
        "client_max_body_size 512m;             # as --max_file_bytes",
        "At most 8192 `allowed_token_ids`, pages of 64 tokens, steps of 2,048 rows",
        "It asks 200 clients for 600 s.",
        "A row's `timeout_s` counts from when it is handed to the engine.",
        "prints tokens/s, TFLOP/s and GB/s, medians in ms",
        "90 % of memory is given to the cache",
        "a third of them leave; 3 times out of 10 they come back",
        "it runs up to 32 steps ahead",
        "a queue of 64 requests, served in turn",
        "it is faster than one at a time, and uses 100 % of the SMs",
        "| knob | default |\n|---|---|\n| --page_size | 64 |",
        "| what | tokens/s |\n|---|---|\n| decode | see below |",
    ],
)
def test_prose_and_knobs_are_no_figures_of_speed(text: str) -> None:
    assert readme.by_hand(f"# Title\n\n{text}\n") == []


def test_a_figure_is_found_with_its_line_after_a_block_of_figures() -> None:
    text = "<!-- figures: a -->\n5 ms\n<!-- end -->\n\nIt takes 6 ms.\n\nAlso 7 ms.\n"
    assert readme.by_hand(text) == ["line 5: 6 ms", "line 7: 7 ms"]
