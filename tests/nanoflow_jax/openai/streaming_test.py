"""Streamed answers, put together, are the answers that are not streamed."""

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis
import pytest
import sample_tokenizers
import scripted_engine
import streams
from hypothesis import strategies as st

from nanoflow_jax import generator, request
from nanoflow_jax.engine_process import tickets
from nanoflow_jax.openai import requests, responses, streaming
from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.request import FinishReason
from nanoflow_jax.tokenizer import tool_formats
from nanoflow_jax.tokenizer.tokenizer import Tokenizer

_HEAD = responses.Head(response_id="x-1", created=123, model="m")
_STYLE = tool_formats.ToolStyle(format=tool_formats.ToolFormat.HERMES)
_TOOL = {"type": "function", "function": {"name": "f"}}
_CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
_CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class _Asked:
    """One body, with a script of what the model says."""

    def __init__(
        self,
        endpoint: Endpoint,
        body: Mapping[str, Any],
        words: Tokenizer,
        said: Sequence[Sequence[int]],
        *,
        prompts: Sequence[Sequence[int]],
        reason: FinishReason = FinishReason.LENGTH,
    ) -> None:
        self.request = requests.parse(endpoint, body, {"seed": 1}, tool_style=_STYLE)
        self.writer = responses.Writer(words)
        self.prompts = prompts
        params = self.request.params
        scored = params.logprobs is not None
        scripts = {}
        for i, tokens in enumerate(said):
            name = f"{i // params.n}/{i % params.n}"
            scripts[name] = scripted_engine.say(name, tokens, reason=reason, scored=scored)
            prompt = prompts[i // params.n]
            if params.prompt_logprobs is not None and i % params.n == 0 and len(prompt) > 1:
                scores = tuple(map(scripted_engine.score, prompt[1:]))
                scored_prompt = request.RequestUpdate(request_id=name, prompt_logprobs=scores)
                scripts[name].insert(0, scored_prompt)
        made = generator.Generator(scripted_engine.ScriptedEngine(scripts), words)
        for i, prompt in enumerate(prompts):
            made.submit(str(i), prompt, params)
        self.steps: list[request.StepResult] = []
        while made.num_pending:
            self.steps.append(made.step())

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        done = sorted(
            (c for s in self.steps for c in s.completions), key=lambda c: int(c.request_id)
        )
        return self.writer.body(self.request, done, _HEAD)

    def chunks(self, pauses: Sequence[bool] = ()) -> list[dict[str, Any]]:
        """The streamed answer.

        Args:
            pauses: After which steps nothing is read; tokens that wait are merged.
        """
        return asyncio.run(self._chunks(pauses))

    async def _chunks(self, pauses: Sequence[bool]) -> list[dict[str, Any]]:
        writer = streaming.StreamWriter(self.writer, self.request, _HEAD, self.prompts)
        queues = [tickets.Ticket(str(i), prompt) for i, prompt in enumerate(self.prompts)]
        waiting: dict[tuple[int, int | str], None] = {}
        found = writer.begin()
        for i, step in enumerate(self.steps):
            for scored in step.scored:
                queues[int(scored.request_id)].put(scored)
                waiting[int(scored.request_id), "scored"] = None
            for delta in step.deltas:
                queues[int(delta.request_id)].put(delta)
                waiting[int(delta.request_id), delta.index] = None
            if i < len(pauses) and pauses[i] and step is not self.steps[-1]:
                continue
            for number, _ in waiting:
                match await queues[number].next():
                    case request.ScoredPrompt() as event:
                        found += writer.scored(number, event)
                    case request.Delta() as event:
                        found += writer.delta(number, event)
            waiting.clear()
        return [*found, *writer.usage()]


_sample = functools.cache(sample_tokenizers.sample)


def _optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


_COMMON = {
    "n": st.integers(1, 2),
    "stop": st.lists(st.text(st.sampled_from("helo w\u00e9"), min_size=1, max_size=3), max_size=2),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "min_tokens": st.integers(0, 3),
    "prompt_logprobs": _optional(st.integers(0, 2)),
    "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
}
_USAGE = st.sampled_from([None, {"include_usage": True}, {"continuous_usage_stats": True}])
_REASONS = st.sampled_from([FinishReason.LENGTH, FinishReason.STOP])
_PAUSES = st.lists(st.booleans(), max_size=20)


def _check(asked: _Asked, pauses: Sequence[bool], usage: Any) -> dict[str, Any]:
    whole = asked.whole()
    found = streams.joined(asked.chunks(pauses))
    assert found["choices"] == whole["choices"]
    for name in ("prompt_logprobs", "prompt_token_ids"):
        assert found.get(name) == whole.get(name)
    if usage is not None:
        assert found["usage"] == whole["usage"]
    return whole


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.data())
def test_pieces_of_a_completion_are_the_completion(data: st.DataObject) -> None:
    words = _sample(data.draw(st.sampled_from(sorted(sample_tokenizers.KINDS))))
    fields = {**_COMMON, "logprobs": _optional(st.integers(0, 2)), "echo": st.booleans()}
    body = data.draw(st.fixed_dictionaries({}, optional=fields))
    usage = data.draw(_USAGE)
    ids = st.lists(st.integers(0, words.vocab_size - 1), min_size=1, max_size=8)
    texts = st.text(st.sampled_from("helo w\u00e9\u65e5"), min_size=1, max_size=10)
    prompts = data.draw(
        st.lists(texts | ids, min_size=1, max_size=1) | st.lists(texts, min_size=2, max_size=3)
    )
    encoded = [words.encode(p) if isinstance(p, str) else p for p in prompts]
    encoded = [p or [0] for p in encoded]
    said = [
        data.draw(ids | texts.map(lambda t: words.encode(t, add_special_tokens=False) or [0]))
        for _ in range(len(prompts) * body.get("n", 1))
    ]
    body = {**body, "prompt": prompts, "max_tokens": 16, "stream": True, "stream_options": usage}
    asked = _Asked(
        Endpoint.COMPLETIONS, body, words, said, prompts=encoded, reason=data.draw(_REASONS)
    )
    whole = _check(asked, data.draw(_PAUSES), usage)
    for choice in whole["choices"]:
        offsets = choice["logprobs"]["text_offset"] if choice["logprobs"] else []
        assert offsets == sorted(offsets)
        assert all(0 <= offset <= len(choice["text"]) for offset in offsets)


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.data())
def test_pieces_of_a_chat_are_the_chat(data: st.DataObject) -> None:
    words = _sample("byte_level")
    fields = {
        **_COMMON,
        "logprobs": st.booleans(),
        "tools": st.just([_TOOL]),
        "tool_choice": st.sampled_from(["auto", "none"]),
    }
    body = data.draw(st.fixed_dictionaries({}, optional=fields))
    usage = data.draw(_USAGE)
    if "tools" not in body:
        body.pop("tool_choice", None)
    parts = st.sampled_from([_CALL, _CALL[:40], "hello", " ", "\u00e9", "<tool"])
    texts = st.lists(parts, min_size=1, max_size=4).map("".join)
    said = [
        words.encode(data.draw(texts), add_special_tokens=False) for _ in range(body.get("n", 1))
    ]
    body = {**_CHAT, **body, "stream": True, "stream_options": usage}
    asked = _Asked(
        Endpoint.CHAT, body, words, said, prompts=[[5, 6, 7]], reason=data.draw(_REASONS)
    )
    _check(asked, data.draw(_PAUSES), usage)


def test_only_the_first_piece_of_a_chat_with_tools_tells_of_its_prompt() -> None:
    words = _sample("byte_level")
    shown = {"return_token_ids": True, "prompt_logprobs": 0}
    body = {**_CHAT, **shown, "tools": [_TOOL], "n": 2, "stream": True}
    said = [words.encode(_CALL, add_special_tokens=False)] * 2
    # All of it waits: one delta is several pieces.
    chunks = _Asked(Endpoint.CHAT, body, words, said, prompts=[[5, 6]]).chunks([True] * 100)
    first, *others = [chunk for chunk in chunks if chunk["choices"][0]["delta"].get("role") is None]
    assert first["prompt_token_ids"] == [5, 6]
    assert len(first["prompt_logprobs"]) == 2
    assert len(others) >= 3
    assert not any({"prompt_token_ids", "prompt_logprobs"} & chunk.keys() for chunk in others)


def test_the_space_of_the_first_generated_word_counts_in_text_offsets() -> None:
    words = _sample("llama")  # its decoder drops the first space of a text
    prompt, (hello, *_) = words.encode("hello"), words.encode("hello", add_special_tokens=False)
    body = {"prompt": "hello", "logprobs": 0, "echo": True}
    asked = _Asked(Endpoint.COMPLETIONS, body, words, [[hello, hello]], prompts=[prompt])
    (choice,) = asked.whole()["choices"]
    assert choice["text"] == "hello hello hello"
    assert choice["logprobs"]["text_offset"] == [0, 0, 5, 11]  # <s>, and three times " hello"


@pytest.mark.parametrize("skip", [True, False])
def test_text_offsets_of_an_echo_count_the_text_that_was_sent_and_no_more(skip: bool) -> None:
    words = _sample("byte_level")
    prompt = "</s>hello"
    ids = words.encode(prompt)
    assert len(ids) == 3  # <s>, </s> and hello
    body = {"prompt": prompt, "logprobs": 0, "echo": True, "skip_special_tokens": skip}
    asked = _Asked(Endpoint.COMPLETIONS, body, words, [[ids[-1]]], prompts=[ids])
    (choice,) = asked.whole()["choices"]
    assert choice["text"] == "</s>hellohello"
    assert choice["logprobs"]["text_offset"] == [0, 0, 4, 9]


def test_no_streamed_text_offset_lies_beyond_a_text_that_a_stop_string_cut() -> None:
    words = _sample("gemma")
    said = words.encode("hellohello d", add_special_tokens=False)
    assert len(said) == 4
    body = {"prompt": "d", "logprobs": 0, "stop": "ohello ", "stream": True}
    asked = _Asked(Endpoint.COMPLETIONS, body, words, [said], prompts=[words.encode("d")])
    chunks = [chunk["choices"][0] for chunk in asked.chunks()]
    assert "".join(chunk["text"] for chunk in chunks) == "hell"
    told = [offset for c in chunks if c["logprobs"] for offset in c["logprobs"]["text_offset"]]
    assert told == [0, 4, 4]
