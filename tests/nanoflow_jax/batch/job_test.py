"""Jobs in this process: every row answered once, and the same as the model alone answers."""

import dataclasses
import pathlib

import batch_runs
import pytest
from job_runs import GREEDY, SECTION, answers_of, body_of, make_options, run_job

from nanoflow_jax import llm
from nanoflow_jax.batch import job, rows, run


def test_rows_of_all_forms_are_answered_as_the_model_alone_answers(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    asked = [
        batch_runs.batch_row("text", prompt="Hello there", return_token_ids=True, **GREEDY),
        batch_runs.batch_row("ids", prompt=[5, 6, 7], return_token_ids=True, **GREEDY),
        batch_runs.batch_row("chat", messages=chat, return_token_ids=True, **GREEDY),
        {"prompt": "Hello there", "return_token_ids": True, "seed": 3, "max_tokens": 6},
        {"messages": chat, "return_token_ids": True, **GREEDY},
    ]
    found = answers_of(model, folder, asked)
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
        choice = body_of(row)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert (text, choice["token_ids"]) == (result.text, list(result.token_ids))
        assert body_of(row)["usage"]["prompt_tokens"] == result.num_prompt_tokens


def test_an_output_row_has_openais_fields(model: llm.LLM, folder: pathlib.Path) -> None:
    lines = [batch_runs.batch_row("a", prompt="x", **GREEDY), "broken"]
    good, bad = answers_of(model, folder, lines)
    assert list(good) == list(bad) == ["id", "custom_id", "response", "error"]
    name = good["id"].removeprefix("batch_req_")
    assert good["response"]["request_id"] == f"req_{name}"
    assert body_of(good)["id"] == f"cmpl-{name}"
    assert body_of(good)["model"] == "qwen3"
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"]["type"] == "invalid_request_error"
    assert bad["error"]["code"] == "invalid_json"
    assert bad["error"]["message"] == bad["response"]["body"]["error"]["message"]


def test_bad_rows_fail_alone(model: llm.LLM, folder: pathlib.Path) -> None:
    lines = [
        "not json",
        batch_runs.batch_row("a", prompt="x", **GREEDY),
        batch_runs.batch_row("a", prompt="y", **GREEDY),
        batch_runs.batch_row("b", prompt=[1] * 128, **GREEDY),
        batch_runs.batch_row("c", prompt=[1, 10**6], **GREEDY),
        batch_runs.batch_row("d", prompt=["fine", [1]], **GREEDY),
        batch_runs.batch_row("e", prompt=[[1], [1] * 500], **GREEDY),
        batch_runs.batch_row("f", messages=[{"role": 5}], **GREEDY),
        batch_runs.batch_row("g", prompt="x", response_format={"type": "poem"}),
        batch_runs.batch_row("h", prompt="x", logit_bias={"100000": 1}),
        batch_runs.batch_row("i", prompt="\ud800"),
        batch_runs.batch_row("z", prompt="x", **GREEDY),
    ]
    found = answers_of(model, folder, lines)
    assert batch_runs.numbers(found) == list(range(len(lines)))
    messages = {
        row["custom_id"]: row["error"]["message"] for row in found if row["error"] is not None
    }
    assert body_of(found[1])["choices"][0]["text"] == body_of(found[-1])["choices"][0]["text"]
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
    big, fits = answers_of(
        model,
        folder,
        [
            {"prompt": [1] * 100, "max_tokens": 20},
            {"prompt": [1] * 5, "max_tokens": 9, "ignore_eos": True},
        ],
    )
    assert "no memory for this request: it may grow to 120 tokens" in big["error"]["message"]
    assert body_of(fits)["usage"]["completion_tokens"] == 9


def test_several_prompts_and_choices_of_one_row_are_one_answer(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    together = {"prompt": ["ab", "cd"], "n": 2, "seed": 4, "max_tokens": 5}
    alone = [{**together, "prompt": prompt} for prompt in together["prompt"]]
    found = [body_of(row) for row in answers_of(model, folder, [together, *alone])]
    texts = [choice["text"] for choice in found[0]["choices"]]
    assert texts == [choice["text"] for body in found[1:] for choice in body["choices"]]
    assert [choice["index"] for choice in found[0]["choices"]] == [0, 1, 2, 3]
    assert texts[0] != texts[1]
    assert found[0]["usage"]["completion_tokens"] == 20


def test_logprobs_echo_and_prompt_logprobs_reach_the_answer(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 2, "prompt_logprobs": 1, **GREEDY}
    (row,) = answers_of(model, folder, [body])
    choice = body_of(row)["choices"][0]
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
    found = [body_of(row) for row in answers_of(model, folder, lines, defaults=defaults)]
    assert [body["usage"]["completion_tokens"] for body in found] == [2, 4]
    texts = [body["choices"][0]["text"] for body in found]
    assert texts[1].startswith(texts[0].rstrip("\ufffd"))


def test_rows_draw_from_the_seed_of_the_job(model: llm.LLM, tmp_path: pathlib.Path) -> None:
    lines = [{"prompt": "x", "max_tokens": 8}] * 2
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        defaults = rows.Defaults(sampling={}, seed=seed)
        found = answers_of(model, tmp_path / name, lines, defaults=defaults)
        texts.append([body_of(row)["choices"][0]["text"] for row in found])
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 4


def test_blank_lines_are_no_rows(model: llm.LLM, folder: pathlib.Path) -> None:
    found = answers_of(model, folder, ["", {"prompt": "x", **GREEDY}, "", ""])
    assert batch_runs.numbers(found) == [1]


def test_an_empty_input_is_finished_at_once(model: llm.LLM, folder: pathlib.Path) -> None:
    assert answers_of(model, folder, []) == []


def test_rows_wait_outside_the_engine_until_they_are_needed(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x", **GREEDY, "n": 2}] * 30)
    most = 0

    def report(state: run.State) -> None:
        nonlocal most
        most = max(most, model.generator.num_pending)

    with job.open_job(make_options(folder), SECTION) as opened:
        opened.run(model, lookahead=5, report=report)
        assert opened.is_finished
    assert most == 3


def test_the_summary_counts_rows_and_tokens_of_all_runs(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    lines = [{"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}] * 12
    batch_runs.write(folder / "in.jsonl", [*lines, "bad"])
    first = run_job(model, make_options(folder), stop_after=2)
    last = run_job(model, make_options(folder))
    totals = last.totals
    assert (totals.num_ok, totals.num_failed) == (12, 1)
    assert (totals.prompt_tokens, totals.output_tokens) == (36, 48)
    assert last.num_before == first.totals.num_rows
    assert 0 < last.tokens < 48
    assert last.tokens_per_s == pytest.approx(last.tokens / last.seconds)


def test_a_model_that_a_row_names_and_that_is_not_ours_is_noted(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x", "model": "gpt-x", **GREEDY}])
    assert run_job(model, make_options(folder)).other_model == "gpt-x"
    own = make_options(folder, output=folder / "own.jsonl", restart=True)
    batch_runs.write(folder / "in.jsonl", [{"prompt": "x", "model": "qwen3", **GREEDY}])
    assert run_job(model, own).other_model is None


def test_a_row_with_a_grammar_is_answered_in_its_form_and_a_bad_one_fails_alone(
    model: llm.LLM, folder: pathlib.Path
) -> None:
    lines = [
        batch_runs.batch_row("a", prompt="x", structured_outputs={"choice": ["red", "blue"]}),
        batch_runs.batch_row("b", prompt="x", guided_regex="("),
    ]
    good, bad = answers_of(model, folder, lines)
    assert body_of(good)["choices"][0]["text"].strip() in ("red", "blue")
    assert "the regular expression cannot be used" in str(bad)


def test_a_row_says_how_its_prompt_becomes_tokens(folder: pathlib.Path) -> None:
    asked = {"return_token_ids": True, **GREEDY}
    lines = [
        {"prompt": "Hello there", **asked},
        {"prompt": "Hello there", "add_special_tokens": False, **asked},
        {"prompt": ["Hello there", "x"], "truncate_prompt_tokens": 2, **asked},
        {"messages": [{"role": "user", "content": "Hi"}], "truncate_prompt_tokens": 3, **asked},
        {"prompt": [5, 6, 7], "add_special_tokens": False, "truncate_prompt_tokens": 2, **asked},
    ]
    llama = str(batch_runs.FOLDER.parent / "llama")  # its tokenizer puts a BOS first
    section = dataclasses.replace(SECTION, model=llama)
    batch_runs.write(folder / "in.jsonl", lines)
    with llm.LLM(llama, **batch_runs.KNOBS) as made:
        run_job(made, make_options(folder), section=section)
        whole, short = made.encode("Hello there"), made.encode("x")
        chat = made.encode_chat([{"role": "user", "content": "Hi"}])
    found = [body_of(row) for row in batch_runs.read(folder / "out.jsonl")]
    shown = [[c.get("prompt_token_ids") for c in body["choices"]] for body in found]
    assert shown[0] == [whole]
    assert shown[1] == [whole[1:]]
    assert shown[2] == [whole[-2:], short[-2:]]
    assert found[3]["usage"]["prompt_tokens"] == len(chat[-3:])
    assert shown[4] == [[6, 7]]
