import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from golden import cases

from nanoflow_jax import config, request
from nanoflow_jax.engine import model_source
from nanoflow_jax.llm import LLM, FinishReason, SamplingParams, with_seed

_CASE = cases.load("llama")
_KNOBS = {
    "max_requests": 12,
    "dense_batch": 24,
    "buckets": "24:12:12",
    "cache_page_size": 5,
    "penalty_requests": 2,
}
_GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    with LLM(_CASE.path, dtype="float32", **_KNOBS) as made:
        yield made


def test_token_ids_in_greedy_tokens_out(llm):
    results = llm.generate(_CASE.prompts, _GREEDY)
    assert [result.token_ids for result in results] == [
        tuple(row[:8].tolist()) for row in _CASE.tokens
    ]
    for prompt, result in zip(_CASE.prompts, results, strict=True):
        assert result.prompt_ids == tuple(prompt)
        assert result.num_prompt_tokens == len(prompt)
        assert result.finish_reason is FinishReason.LENGTH
        assert (result.logprobs, result.prompt_logprobs) == (None, None)
        assert result.text == result.choices[0].text


def test_a_text_begins_with_one_bos(llm):
    (result,) = llm.generate("Hello there!", _GREEDY)
    bos = llm.tokenizer.bos_id
    assert result.prompt_ids[0] == bos
    assert result.prompt_ids.count(bos) == 1
    assert result.prompt_ids == tuple(_CASE.texts[0]["token_ids"])
    (doubled,) = llm.generate("<s>Hello there!", _GREEDY)
    assert doubled.prompt_ids.count(bos) == 1


@pytest.mark.parametrize("kind", ["one text", "one list of ids", "texts", "mixed"])
def test_prompts_come_in_every_shape(llm, kind):
    ids = _CASE.prompts[3]
    prompts = {
        "one text": "Hello there!",
        "one list of ids": ids,
        "texts": ["Hello there!", "a"],
        "mixed": ["Hello there!", ids],
    }[kind]
    results = llm.generate(prompts, _GREEDY)
    assert len(results) == (2 if kind in ("texts", "mixed") else 1)
    if kind in ("one list of ids", "mixed"):
        assert results[-1].token_ids == tuple(_CASE.tokens[3][:8].tolist())


def test_token_ids_may_be_numpy_integers_in_a_list_or_in_an_array(llm):
    array = np.asarray(_CASE.prompts[3])
    for prompts in (array, list(array), [array], [list(array)]):
        (result,) = llm.generate(prompts, _GREEDY)
        assert result.token_ids == tuple(_CASE.tokens[3][:8].tolist())
        assert all(type(token) is int for token in result.prompt_ids)


def test_no_prompts_no_results(llm):
    assert llm.generate([]) == []


def test_each_prompt_may_have_parameters_of_its_own(llm):
    params = [dataclasses.replace(_GREEDY, max_tokens=n, logprobs=n) for n in (1, 3)]
    results = llm.generate([[5], [6]], params)
    assert [len(result.token_ids) for result in results] == [1, 3]
    assert [len(result.logprobs) for result in results] == [1, 3]
    message = "1 sampling parameters for 2 prompts; give one for each"
    with pytest.raises(ValueError, match=f"^{message}$"):
        llm.generate([[5], [6]], params[:1])


def test_prompt_logprobs_begin_with_none(llm):
    (result,) = llm.generate(
        _CASE.prompts[4], dataclasses.replace(_GREEDY, prompt_logprobs=2, logprobs=1)
    )
    assert result.prompt_logprobs[0] is None
    assert [e.token_id for e in result.prompt_logprobs[1:]] == _CASE.prompts[4][1:]
    assert [e.token_id for e in result.logprobs] == list(result.token_ids)


def test_choices_differ_and_the_first_is_that_of_the_seed_alone(llm):
    params = SamplingParams(temperature=1.5, max_tokens=12, seed=9, ignore_eos=True)
    (single,) = llm.generate([7, 8, 9], params)
    (several,) = llm.generate([7, 8, 9], dataclasses.replace(params, n=3))
    assert several.token_ids == single.token_ids
    assert len({choice.token_ids for choice in several.choices}) == 3
    assert several.text == several.choices[0].text


def test_without_a_seed_each_run_draws_its_own(llm):
    params = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate([7, 8, 9], params)[0].token_ids for _ in range(2))
    assert first != second
    assert with_seed(dataclasses.replace(params, seed=3)).seed == 3
    assert with_seed(params).seed != with_seed(params).seed


def test_a_stop_string_ends_the_text_before_it(llm):
    (whole,) = llm.generate("Hello there!", dataclasses.replace(_GREEDY, max_tokens=40))
    stop = whole.text[6:10]
    (cut,) = llm.generate("Hello there!", dataclasses.replace(_GREEDY, max_tokens=40, stop=stop))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.choices[0].stop_reason) == (FinishReason.STOP, stop)


@pytest.mark.parametrize("index", range(len(_CASE.chat)))
def test_conversations_are_rendered_and_encoded_as_transformers_does(llm, index):
    entry = _CASE.chat[index]
    options = {"add_generation_prompt": entry["add_generation_prompt"]}
    if "error" in entry:
        with pytest.raises(ValueError, match=re.escape(entry["error"])):
            llm.encode_chat(entry["messages"], **options)
    else:
        assert llm.encode_chat(entry["messages"], **options) == entry["token_ids"]


def test_chat_answers_one_conversation_or_several(llm):
    one = [{"role": "user", "content": "Hello"}]
    (alone,) = llm.chat(one, _GREEDY)
    both = llm.chat([one, [{"role": "user", "content": "Why?"}]], _GREEDY)
    assert len(both) == 2
    assert both[0].token_ids == alone.token_ids
    assert alone.prompt_ids == tuple(llm.encode_chat(one))


def test_progress_is_told_until_all_are_done(llm):
    seen = []
    llm.generate([[5], [6], [7]], _GREEDY, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_one_prompt_that_cannot_be_served_stops_all_before_they_run(llm):
    steps = llm.engine.counters.steps
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate([[5], []], _GREEDY)
    assert llm.generator.num_pending == 0
    assert not llm.engine.has_work
    assert llm.engine.counters.steps == steps
    assert llm.generate([5], _GREEDY)[0].token_ids


def test_a_request_that_fails_while_it_runs_raises_and_leaves_nothing_behind(llm):
    params = [
        SamplingParams(temperature=0.0, allowed_token_ids=(2,), min_tokens=1, max_tokens=4),
        dataclasses.replace(_GREEDY, max_tokens=30),
    ]
    with pytest.raises(RuntimeError, match="no token could be drawn"):
        llm.generate([[5], [6]], params)
    assert llm.generator.num_pending == 0


def test_an_interrupted_run_leaves_nothing_behind(llm):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5], [6]], _GREEDY, progress=interrupt)
    assert llm.generator.num_pending == 0
    assert llm.generate(_CASE.prompts[2], _GREEDY)[0].token_ids == tuple(
        _CASE.tokens[2][:8].tolist()
    )


def test_requests_of_another_user_of_the_generator_do_not_count_as_ours(llm):
    llm.generator.submit("theirs", [9], with_seed(dataclasses.replace(_GREEDY, max_tokens=2)))
    (result,) = llm.generate(_CASE.prompts[2], _GREEDY)
    assert result.token_ids == tuple(_CASE.tokens[2][:8].tolist())


def test_the_context_is_the_models(llm):
    assert llm.max_context_len == 256


def test_a_folders_shape_can_have_random_weights_by_seed(llm):
    knobs = {"dtype": "float32", "random_weights": True, **_KNOBS}
    answers = [llm.generate([5, 6, 7], _GREEDY)[0].token_ids]
    for seed in (1, 2):
        with LLM(_CASE.path, weight_seed=seed, **knobs) as made:
            answers.append(made.generate([5, 6, 7], _GREEDY)[0].token_ids)
    assert len(set(answers)) == 3


def test_a_model_without_a_tokenizer_takes_token_ids_only(monkeypatch):
    knobs = config.EngineConfig.from_knobs(
        model="preset:llama-3-8b", random_weights=True, dtype="float32", **_KNOBS
    )
    tiny = model_source.open_model(config.ModelSection(model=str(_CASE.path)))
    without = dataclasses.replace(tiny, folder=None)
    monkeypatch.setattr(model_source, "open_model", lambda section: without)
    with LLM.from_config(knobs) as made:
        (result,) = made.generate([5, 6], _GREEDY)
        assert (len(result.token_ids), result.text) == (8, "")
        message = "this model has no tokenizer; give the prompt as token ids"
        with pytest.raises(ValueError, match=f"^{message}$"):
            made.generate("text")
        message = "this model has no tokenizer, so it cannot chat"
        with pytest.raises(ValueError, match=f"^{message}$"):
            made.chat([{"role": "user", "content": "Hello"}])
        message = "stop strings need a tokenizer, and this model has none"
        with pytest.raises(ValueError, match=f"^{message}$"):
            made.generate([5], SamplingParams(stop="x"))


def test_a_tokenizer_of_another_model_is_refused_before_weights_are_read(tmp_path):
    folder = shutil.copytree(_CASE.path, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    raw["vocab_size"] = 100
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="vocab"):
        LLM(folder, **_KNOBS)


def test_an_unknown_knob_is_refused():
    with pytest.raises(ValueError, match="max_batch: no such knob"):
        LLM(_CASE.path, max_batch=3)


@pytest.mark.parametrize("rows", [1, 2])
def test_ids_in_an_array_are_as_good_as_in_a_list(llm, rows):
    wanted = llm.generate([[5, 6]] * rows, _GREEDY)
    for prompts in (np.asarray([[5, 6]] * rows), [np.asarray([5, 6])] * rows):
        found = llm.generate(prompts, _GREEDY)
        assert [result.token_ids for result in found] == [r.token_ids for r in wanted]
    assert llm.generate(np.asarray([5, 6]), _GREEDY)[0].token_ids == wanted[0].token_ids


def test_a_grammar_shapes_every_choice(llm):
    grammar = request.Grammar(kind=request.GrammarKind.REGEX, text="(yes|no)")
    params = SamplingParams(grammar=grammar, n=4, max_tokens=9, seed=1)
    (result,) = llm.generate([5, 6, 7], params)
    assert {choice.finish_reason for choice in result.choices} == {FinishReason.STOP}
    assert {choice.text.strip() for choice in result.choices} <= {"yes", "no"}


def test_a_closed_model_has_freed_its_memory_and_may_be_closed_again():
    before = {id(array) for array in jax.live_arrays()}
    with LLM(_CASE.path, dtype="float32", **_KNOBS) as made:
        text = made.generate("a", _GREEDY)[0].text
    left = [array.shape for array in jax.live_arrays() if id(array) not in before]
    assert (left, bool(text)) == ([], True)
    made.close()
