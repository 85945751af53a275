"""Jobs in this process: every row answered once, and the same as the model alone answers."""

import dataclasses
import errno
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import batch_runs
import pytest

from nanoflow_jax import config, llm
from nanoflow_jax.batch import job, resume, rows, run

_SECTION = config.ModelSection(model=str(batch_runs.FOLDER), max_context_len=128)
_GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def model() -> Iterator[llm.LLM]:
    with llm.LLM(str(batch_runs.FOLDER), **batch_runs.KNOBS) as made:
        yield made


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path


def _options(folder: pathlib.Path, **changes: Any) -> resume.Options:
    merged = {
        "input": folder / "in.jsonl",
        "output": folder / "out.jsonl",
        "defaults": rows.Defaults(sampling={}, seed=0),
        **changes,
    }
    return resume.Options(**merged)


def _run(
    model: llm.LLM,
    options: resume.Options,
    *,
    stop_after: int | None = None,
    lookahead: int = 16,
    section: config.ModelSection = _SECTION,
) -> run.State:
    with job.open_job(options, section) as opened:
        limit = opened.num_rows + 1 if stop_after is None else opened.num_done + stop_after
        state = opened.run(
            model,
            lookahead=lookahead,
            report=lambda state: None,
            should_stop=lambda: opened.num_done >= limit,
        )
    assert model.generator.num_pending == 0
    return state


def _answers(
    model: llm.LLM, folder: pathlib.Path, lines: list[Any], **changes: Any
) -> list[dict[str, Any]]:
    batch_runs.write(folder / "in.jsonl", lines)
    options = _options(folder, **changes)
    _run(model, options)
    return batch_runs.read(options.shard_output)


def _body(row: dict[str, Any]) -> dict[str, Any]:
    assert row["error"] is None, row["error"]
    assert row["response"]["status_code"] == 200
    body: dict[str, Any] = row["response"]["body"]
    return body


def test_rows_of_all_forms_are_answered_as_the_model_alone_answers(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    asked = [
        batch_runs.batch_row("text", prompt="Hello there", return_token_ids=True, **_GREEDY),
        batch_runs.batch_row("ids", prompt=[5, 6, 7], return_token_ids=True, **_GREEDY),
        batch_runs.batch_row("chat", messages=chat, return_token_ids=True, **_GREEDY),
        {"prompt": "Hello there", "return_token_ids": True, "seed": 3, "max_tokens": 6},
        {"messages": chat, "return_token_ids": True, **_GREEDY},
    ]
    found = _answers(model, folder, asked)
    greedy = llm.SamplingParams(temperature=0, max_tokens=6)
    seeded = llm.SamplingParams(seed=3, max_tokens=6)
    wanted = [
        *model.generate(["Hello there", [5, 6, 7]], greedy),
        *model.chat(chat, greedy),
        *model.generate("Hello there", seeded),
        *model.chat(chat, greedy),
    ]
    assert [row["custom_id"] for row in found] == ["text", "ids", "chat", "row-3", "row-4"]
    for row, result in zip(found, wanted, strict=True):
        choice = _body(row)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert (text, choice["token_ids"]) == (result.text, list(result.token_ids))
        assert _body(row)["usage"]["prompt_tokens"] == result.num_prompt_tokens


def test_an_output_row_has_openais_fields(model: llm.LLM, folder: pathlib.Path) -> None:
    lines = [batch_runs.batch_row("a", prompt="x", **_GREEDY), "broken"]
    good, bad = _answers(model, folder, lines)
    assert list(good) == list(bad) == ["id", "custom_id", "response", "error"]
    name = good["id"].removeprefix("batch_req_")
    assert good["response"]["request_id"] == f"req_{name}"
    assert _body(good)["id"] == f"cmpl-{name}"
    assert _body(good)["model"] == "qwen3"
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"]["type"] == "invalid_request_error"
    assert bad["error"]["code"] == "invalid_json"
    assert bad["error"]["message"] == bad["response"]["body"]["error"]["message"]


def test_bad_rows_fail_alone(model: llm.LLM, folder: pathlib.Path) -> None:
    lines = [
        "not json",
        batch_runs.batch_row("a", prompt="x", **_GREEDY),
        batch_runs.batch_row("a", prompt="y", **_GREEDY),
        batch_runs.batch_row("b", prompt=[1] * 128, **_GREEDY),
        batch_runs.batch_row("c", prompt=[1, 10**6], **_GREEDY),
        batch_runs.batch_row("d", prompt=["fine", [1]], **_GREEDY),
        batch_runs.batch_row("e", prompt=[[1], [1] * 500], **_GREEDY),
        batch_runs.batch_row("f", messages=[{"role": 5}], **_GREEDY),
        batch_runs.batch_row("g", prompt="x", response_format={"type": "poem"}),
        batch_runs.batch_row("h", prompt="x", logit_bias={"100000": 1}),
        batch_runs.batch_row("i", prompt="\ud800"),
        batch_runs.batch_row("z", prompt="x", **_GREEDY),
    ]
    found = _answers(model, folder, lines)
    assert batch_runs.numbers(found) == list(range(len(lines)))
    messages = {
        row["custom_id"]: row["error"]["message"] for row in found if row["error"] is not None
    }
    assert _body(found[1])["choices"][0]["text"] == _body(found[-1])["choices"][0]["text"]
    wanted = {
        "row-0": "line 1 is not JSON",
        "a": "custom_id 'a' was used before, in line 2",
        "b": "the prompt has 128 tokens and the context holds 128",
        "c": "1000000 is not a token id of this model",
        "d": "is not text, a list of texts",
        "e": "the prompt has 500 tokens and the context holds 128",
        "f": "messages[0] needs a role that is text",
        "g": "response_format",
        "h": "logit_bias: 100000 is not a token id",
        "i": "lone surrogate",
    }
    assert messages.keys() == wanted.keys()
    for name, message in wanted.items():
        assert message in messages[name]


def test_a_request_that_memory_cannot_hold_fails_alone(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    big, fits = _answers(
        model,
        folder,
        [
            {"prompt": [1] * 100, "max_tokens": 20},
            {"prompt": [1] * 5, "max_tokens": 9, "ignore_eos": True},
        ],
    )
    assert "no memory for this request: it may grow to 120 tokens" in big["error"]["message"]
    assert _body(fits)["usage"]["completion_tokens"] == 9


def test_several_prompts_and_choices_of_one_row_are_one_answer(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    together = {"prompt": ["ab", "cd"], "n": 2, "seed": 4, "max_tokens": 5}
    alone = [{**together, "prompt": prompt} for prompt in together["prompt"]]
    found = [_body(row) for row in _answers(model, folder, [together, *alone])]
    texts = [choice["text"] for choice in found[0]["choices"]]
    assert texts == [choice["text"] for body in found[1:] for choice in body["choices"]]
    assert [choice["index"] for choice in found[0]["choices"]] == [0, 1, 2, 3]
    assert texts[0] != texts[1]
    assert found[0]["usage"]["completion_tokens"] == 20


def test_logprobs_echo_and_prompt_logprobs_reach_the_answer(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 2, "prompt_logprobs": 1, **_GREEDY}
    (row,) = _answers(model, folder, [body])
    choice = _body(row)["choices"][0]
    assert choice["text"].startswith("abc")
    shown = choice["logprobs"]
    assert len(shown["tokens"]) == len(shown["top_logprobs"]) == 3 + 6
    assert shown["token_logprobs"][0] is None
    prompt = choice["prompt_logprobs"]
    assert prompt[0] is None
    for position in (1, 2):
        first = next(iter(prompt[position].values()))
        assert first["logprob"] == shown["token_logprobs"][position]


def test_defaults_of_the_run_hold_where_a_row_does_not_say(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    defaults = rows.Defaults(sampling={"max_tokens": 2, "temperature": 0.0}, seed=0)
    lines = [{"prompt": "x"}, {"prompt": "x", "max_tokens": 4}]
    found = [_body(row) for row in _answers(model, folder, lines, defaults=defaults)]
    assert [body["usage"]["completion_tokens"] for body in found] == [2, 4]
    texts = [body["choices"][0]["text"] for body in found]
    assert texts[1].startswith(texts[0].rstrip("\ufffd"))


def test_rows_draw_from_the_seed_of_the_job(model: llm.LLM, tmp_path: pathlib.Path) -> None:
    lines = [{"prompt": "x", "max_tokens": 8}] * 2
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        defaults = rows.Defaults(sampling={}, seed=seed)
        found = _answers(model, tmp_path / name, lines, defaults=defaults)
        texts.append([_body(row)["choices"][0]["text"] for row in found])
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 4


def test_blank_lines_are_no_rows(model: llm.LLM, folder: pathlib.Path) -> None:
    found = _answers(model, folder, ["", {"prompt": "x", **_GREEDY}, "", ""])
    assert batch_runs.numbers(found) == [1]


def test_an_empty_input_is_finished_at_once(model: llm.LLM, folder: pathlib.Path) -> None:
    assert _answers(model, folder, []) == []


def test_a_job_goes_on_where_it_stopped_and_ends_up_the_same(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    lines: list[Any] = [
        {"prompt": f"row {i}", "max_tokens": 3 + i % 5, "n": 1 + i % 2} for i in range(20)
    ]
    batch_runs.write(folder / "in.jsonl", [*lines, "bad", batch_runs.batch_row("a", prompt="x")])
    whole, parts = _options(folder), _options(folder, output=folder / "parts.jsonl")
    with job.open_job(whole, _SECTION):
        pass
    record = (folder / "out.jsonl.job").read_bytes()
    (folder / "parts.jsonl.job").write_bytes(record)
    _run(model, whole)
    starts = 0
    while True:
        state = _run(model, parts, stop_after=4)
        starts += 1
        assert state.totals.num_rows == len(batch_runs.read(folder / "parts.jsonl"))
        if state.totals.num_rows == 22:
            break
        with open(folder / "parts.jsonl", "ab") as file:
            file.write(b'{"id": "batch_req_')
    assert starts >= 3
    one, other = (
        sorted((folder / n).read_bytes().splitlines()) for n in ("out.jsonl", "parts.jsonl")
    )
    assert one == other
    assert (folder / "out.jsonl.job").read_bytes() == record


def test_a_repeated_id_is_known_even_if_the_repetition_was_answered_first(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    lines = [
        batch_runs.batch_row("a", prompt="x", max_tokens=30, ignore_eos=True),
        batch_runs.batch_row("a", prompt="y"),
        batch_runs.batch_row("b", prompt="z", max_tokens=1),
    ]
    batch_runs.write(folder / "in.jsonl", lines)
    _run(model, _options(folder), stop_after=1)
    assert 0 not in batch_runs.numbers(batch_runs.read(folder / "out.jsonl"))
    _run(model, _options(folder))
    found = batch_runs.read(folder / "out.jsonl")
    assert [row["error"] is None for row in found] == [True, False, True]


def test_processes_share_the_rows_and_answer_as_one_does(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    lines = [{"prompt": f"row {i}", "max_tokens": 4} for i in range(11)]
    lines += [batch_runs.batch_row("a", prompt="x"), batch_runs.batch_row("a", prompt="x")]
    single = _answers(model, folder, lines, output=folder / "one.jsonl")
    shared = []
    for k in range(3):
        options = _options(folder, process_index=k, process_count=3)
        assert options.shard_output.name == f"out.jsonl.{k}-of-3"
        _run(model, options)
        shared.append(batch_runs.read(options.shard_output))
        assert batch_runs.numbers(shared[-1]) == list(range(k, len(lines), 3))
    together = sorted((row for part in shared for row in part), key=batch_runs.row_number)
    for row, other in zip(single, together, strict=True):
        # `created` is each process's own.
        for body in (row["response"]["body"], other["response"]["body"]):
            body.pop("created", None)
        assert row == other


def test_rows_wait_outside_the_engine_until_they_are_needed(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x", **_GREEDY, "n": 2}] * 30)
    most = 0

    def report(state: run.State) -> None:
        nonlocal most
        most = max(most, model.generator.num_pending)

    with job.open_job(_options(folder), _SECTION) as opened:
        opened.run(model, lookahead=5, report=report)
        assert opened.is_finished
    assert most == 3


def test_the_summary_counts_rows_and_tokens_of_all_runs(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    lines = [{"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}] * 12
    batch_runs.write(folder / "in.jsonl", [*lines, "bad"])
    first = _run(model, _options(folder), stop_after=2)
    last = _run(model, _options(folder))
    totals = last.totals
    assert (totals.num_ok, totals.num_failed) == (12, 1)
    assert (totals.prompt_tokens, totals.output_tokens) == (36, 48)
    assert last.num_before == first.totals.num_rows
    assert 0 < last.tokens < 48
    assert last.tokens_per_s == pytest.approx(last.tokens / last.seconds)


def test_a_model_that_a_row_names_and_that_is_not_ours_is_noted(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x", "model": "gpt-x", **_GREEDY}])
    assert _run(model, _options(folder)).other_model == "gpt-x"
    own = _options(folder, output=folder / "own.jsonl", restart=True)
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x", "model": "qwen3", **_GREEDY}])
    assert _run(model, own).other_model is None


def test_f4_a_full_disk_ends_the_run_and_the_next_one_goes_on(
    model: llm.LLM, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x", **_GREEDY}] * 6)
    real, left = os.write, 3

    def write(descriptor: int, data: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space left on device"):
            _run(model, _options(folder))
    assert model.generator.num_pending == 0
    assert len(batch_runs.read(folder / "out.jsonl")) == 3
    _run(model, _options(folder))
    assert batch_runs.numbers(batch_runs.read(folder / "out.jsonl")) == list(range(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("input", "the input file changed"),
        ("model", "the model's config or weights changed"),
        ("tokenizer", "the model's tokenizer, chat template or generation_config.json changed"),
        ("dtype", "--dtype, or the kind of device"),
        ("context", "--max_context_len changed"),
        ("seed", "--seed changed"),
        ("sampling", "the sampling defaults changed"),
    ],
)
def test_a_job_whose_answers_would_change_is_refused(
    folder: pathlib.Path, change: str, message: str
) -> None:
    copy = folder / "model"
    copy.mkdir()
    for path in batch_runs.FOLDER.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x"}])
    section = config.ModelSection(model=str(copy))
    with job.open_job(_options(folder), section):
        pass
    options = _options(folder)
    if change == "input":
        batch_runs.write(folder / "in.jsonl", [{"prompt": "y"}])
    elif change == "model":
        weights = (copy / "model.safetensors").read_bytes()
        size = int.from_bytes(weights[:8], "little")
        header = weights[8 : 8 + size].replace(b"}}", b"} }", 1)
        (copy / "model.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + weights[8 + size :]
        )
    elif change == "tokenizer":
        (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    elif change == "dtype":
        section = dataclasses.replace(section, dtype=config.Dtype.BFLOAT16)
    elif change == "context":
        section = dataclasses.replace(section, max_context_len=64)
    elif change == "seed":
        options = _options(folder, defaults=rows.Defaults(sampling={}, seed=1))
    else:
        options = _options(folder, defaults=rows.Defaults(sampling={"top_p": 0.5}, seed=0))
    with pytest.raises(ValueError, match=message), job.open_job(options, section):
        pass
    with job.open_job(dataclasses.replace(options, restart=True), section) as opened:
        assert not opened.is_finished


def test_restart_begins_again(model: llm.LLM, folder: pathlib.Path) -> None:
    found = _answers(model, folder, [{"prompt": "x", **_GREEDY}])
    again = _answers(model, folder, [{"prompt": "yz", **_GREEDY}], restart=True)
    assert len(again) == 1
    assert again[0]["id"] != found[0]["id"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_file_that_no_job_wrote_is_never_touched(folder: pathlib.Path, restart: bool) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x"}])
    (folder / "out.jsonl").write_text("precious")
    with (
        pytest.raises(ValueError, match=r"was not written by a batch job .*move it away"),
        job.open_job(_options(folder, restart=restart), _SECTION),
    ):
        pass
    assert (folder / "out.jsonl").read_text() == "precious"


def test_a_line_of_somebody_else_is_refused(model: llm.LLM, folder: pathlib.Path) -> None:
    _answers(model, folder, [{"prompt": "x", **_GREEDY}])
    with open(folder / "out.jsonl", "a") as file:
        file.write("hello\n")
    with (
        pytest.raises(ValueError, match="line 2 is not an answer of this job"),
        job.open_job(_options(folder), _SECTION),
    ):
        pass


def test_a_second_job_on_the_same_output_is_refused(folder: pathlib.Path) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x"}])
    with (
        job.open_job(_options(folder), _SECTION),
        pytest.raises(ValueError, match=r"another job is writing .*out\.jsonl"),
        job.open_job(_options(folder), _SECTION),
    ):
        pass


def test_places_that_cannot_be_an_output_are_refused(folder: pathlib.Path) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x"}])
    for changes, message in (
        ({"output": folder / "none" / "out.jsonl"}, "there is no folder .*none; make it first"),
        ({"output": folder}, "is not a plain file; give the name of a new one"),
        ({"output": folder / "in.jsonl"}, "is the input itself; give another file"),
        ({"output": folder / "in.jsonl", "restart": True}, "is the input itself"),
        ({"input": folder / "none.jsonl"}, "there is no such file"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            job.open_job(_options(folder, **changes), _SECTION),
        ):
            pass
    assert (folder / "in.jsonl").read_text() == '{"prompt": "x"}\n'
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]


def test_a_change_of_the_number_of_processes_is_refused(folder: pathlib.Path) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x"}])
    with job.open_job(_options(folder, process_index=1, process_count=2), _SECTION):
        pass
    for count in (1, 3):
        with (
            pytest.raises(ValueError, match=f"job of 2 processes and --process_count is {count}"),
            job.open_job(_options(folder, process_count=count), _SECTION),
        ):
            pass
    single = _options(folder, output=folder / "single.jsonl")
    with job.open_job(single, _SECTION):
        pass
    with (
        pytest.raises(ValueError, match="belongs to a job of one process"),
        job.open_job(dataclasses.replace(single, process_count=2), _SECTION),
    ):
        pass


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 1)])
def test_a_process_number_outside_the_count_is_refused(
    folder: pathlib.Path, index: int, count: int
) -> None:
    with pytest.raises(ValueError, match=f"--process_index={index} is not from 0 to"):
        _options(folder, process_index=index, process_count=count)


def test_a_row_with_a_grammar_is_answered_in_its_form_and_a_bad_one_fails_alone(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    lines = [
        batch_runs.batch_row("a", prompt="x", structured_outputs={"choice": ["red", "blue"]}),
        batch_runs.batch_row("b", prompt="x", guided_regex="("),
    ]
    good, bad = _answers(model, folder, lines)
    assert _body(good)["choices"][0]["text"].strip() in ("red", "blue")
    assert "the regular expression cannot be used" in str(bad)


def test_a_row_says_how_its_prompt_becomes_tokens(folder: pathlib.Path) -> None:
    asked = {"return_token_ids": True, **_GREEDY}
    lines = [
        {"prompt": "Hello there", **asked},
        {"prompt": "Hello there", "add_special_tokens": False, **asked},
        {"prompt": ["Hello there", "x"], "truncate_prompt_tokens": 2, **asked},
        {"messages": [{"role": "user", "content": "Hi"}], "truncate_prompt_tokens": 3, **asked},
        {"prompt": [5, 6, 7], "add_special_tokens": False, "truncate_prompt_tokens": 2, **asked},
    ]
    llama = str(batch_runs.FOLDER.parent / "llama")  # its tokenizer puts a BOS first
    section = dataclasses.replace(_SECTION, model=llama)
    batch_runs.write(folder / "in.jsonl", lines)
    with llm.LLM(llama, **batch_runs.KNOBS) as made:
        _run(made, _options(folder), section=section)
        whole, short = made.encode("Hello there"), made.encode("x")
        chat = made.encode_chat([{"role": "user", "content": "Hi"}])
    found = [_body(row) for row in batch_runs.read(folder / "out.jsonl")]
    shown = [[c.get("prompt_token_ids") for c in body["choices"]] for body in found]
    assert shown[0] == [whole]
    assert shown[1] == [whole[1:]]
    assert shown[2] == [whole[-2:], short[-2:]]
    assert found[3]["usage"]["prompt_tokens"] == len(chat[-3:])
    assert shown[4] == [[6, 7]]
