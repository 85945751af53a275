"""Answers written from hand-made completions."""

import pathlib
from typing import Any

import pytest
from golden import cases

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import errors, requests, responses, tools
from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.request import FinishReason, TokenLogprobs
from nanoflow_jax.tokenizer import tokenizer, tool_formats

_FOLDER = pathlib.Path(cases.__file__).parent
_HEAD = responses.Head(response_id="x-1", created=123, model="m")


def _words() -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer.load(_FOLDER / "qwen3")


def _ids(text: str) -> tuple[int, ...]:
    return tuple(_words().encode(text, add_special_tokens=False))


def _entry(token: int, logprob: float, *top: tuple[int, float], rank: int = 1) -> TokenLogprobs:
    return TokenLogprobs(token_id=token, logprob=logprob, rank=rank, top=top)


def _choice(text: str, index: int = 0, **fields: Any) -> request_lib.Choice:
    merged = {"token_ids": _ids(text), "finish_reason": FinishReason.LENGTH, **fields}
    return request_lib.Choice(index=index, text=text, **merged)


def _done(
    *choices: request_lib.Choice, prompt: str = "ab", **fields: Any
) -> request_lib.Completion:
    return request_lib.Completion(
        request_id="r", prompt_ids=_ids(prompt), choices=choices, **fields
    )


def _completion(body: dict[str, Any], *done: request_lib.Completion, words: Any = ...) -> Any:
    request = requests.parse(Endpoint.COMPLETIONS, {"prompt": "ab", **body}, {})
    return responses.Writer(_words() if words is ... else words).body(request, done, _HEAD)


def _chat(body: dict[str, Any], done: request_lib.Completion) -> Any:
    messages = [{"role": "user", "content": "x"}]
    request = requests.parse(Endpoint.CHAT, {"messages": messages, **body}, {})
    return responses.Writer(_words()).body(request, [done], _HEAD)


def test_a_completion_has_openais_fields() -> None:
    choice = _choice("cd", finish_reason=FinishReason.STOP, stop_reason="\n")
    assert _completion({}, _done(choice)) == {
        "id": "cmpl-x-1",
        "object": "text_completion",
        "created": 123,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "text": "cd",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": "\n",
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_chat_has_openais_fields() -> None:
    assert _chat({}, _done(_choice("cd"))) == {
        "id": "chatcmpl-x-1",
        "object": "chat.completion",
        "created": 123,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "cd", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_chat_that_calls_tools_says_so() -> None:
    style = tool_formats.ToolStyle(format=tool_formats.ToolFormat.HERMES)
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    request = requests.parse(Endpoint.CHAT, body, {}, tool_style=style)
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    done = _done(
        _choice(text, finish_reason=FinishReason.STOP),
        _choice("no", 1, finish_reason=FinishReason.STOP),
    )
    calls, plain = responses.Writer(_words()).body(request, [done], _HEAD)["choices"]
    assert calls["finish_reason"] == "tool_calls"
    assert calls["message"]["content"] is None
    assert calls["message"]["tool_calls"] == [
        {
            "id": tools.call_id("x-1", 0, 0),
            "type": "function",
            "function": {"name": "f", "arguments": '{"a": 1}'},
        }
    ]
    assert (plain["finish_reason"], plain["message"]["content"]) == ("stop", "no")
    assert "tool_calls" not in plain["message"]


def test_choices_of_several_prompts_are_numbered_through() -> None:
    first, second = _done(_choice("a"), _choice("b", 1)), _done(_choice("c"), _choice("d", 1))
    found = _completion({"prompt": ["x", "y"], "n": 2}, first, second)
    assert [(c["index"], c["text"]) for c in found["choices"]] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
        (3, "d"),
    ]
    assert found["usage"]["prompt_tokens"] == 4
    assert found["usage"]["completion_tokens"] == 4


def test_logprobs_of_a_completion_list_the_token_itself_beside_the_likeliest() -> None:
    c, d, e = _ids("c")[0], _ids("d")[0], _ids("e")[0]
    choice = _choice(
        "cd",
        logprobs=(
            _entry(c, -0.1, (c, -0.1), (d, -2.5)),
            _entry(d, -3.0, (e, -0.5), (c, -2.0), rank=9),
        ),
    )
    assert _completion({"logprobs": 2}, _done(choice))["choices"][0]["logprobs"] == {
        "tokens": ["c", "d"],
        "token_logprobs": [-0.1, -3.0],
        "top_logprobs": [{"c": -0.1, "d": -2.5}, {"e": -0.5, "c": -2.0, "d": -3.0}],
        "text_offset": [0, 1],
    }


def test_echo_puts_the_prompt_before_text_and_logprobs() -> None:
    a, b, c = _ids("abc")
    done = _done(
        _choice("c", logprobs=(_entry(c, -0.5, (c, -0.5)),)),
        prompt_logprobs=(None, _entry(b, -1.5, (a, -0.25), rank=3)),
    )
    found = _completion({"echo": True, "logprobs": 1}, done)["choices"][0]
    assert found["text"] == "abc"
    assert found["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.5, -0.5],
        "top_logprobs": [None, {"a": -0.25, "b": -1.5}, {"c": -0.5}],
        "text_offset": [0, 1, 2],
    }
    assert "prompt_logprobs" not in found


def test_echo_of_token_ids_is_their_text() -> None:
    found = _completion({"echo": True, "prompt": list(_ids("ab"))}, _done(_choice("c")))
    assert found["choices"][0]["text"] == "abc"
    without = _completion({"echo": True, "prompt": [1]}, _done(_choice("")), words=None)
    assert without["choices"][0]["text"] == ""


def test_logprobs_of_a_chat_have_bytes() -> None:
    c, d = _ids("cd")
    done = _done(_choice("c", logprobs=(_entry(c, -0.1, (c, -0.1), (d, float("-inf"))),)))
    found = _chat({"logprobs": True, "top_logprobs": 2}, done)["choices"][0]["logprobs"]
    assert found == {
        "content": [
            {
                "token": "c",
                "logprob": -0.1,
                "bytes": [99],
                "top_logprobs": [
                    {"token": "c", "logprob": -0.1, "bytes": [99]},
                    {"token": "d", "logprob": -9999.0, "bytes": [100]},
                ],
            }
        ],
        "refusal": None,
    }
    bare = _chat({"logprobs": True}, done)["choices"][0]["logprobs"]["content"][0]
    assert bare["top_logprobs"] == []


def test_prompt_logprobs_have_vllms_form() -> None:
    a, b, c = _ids("abc")
    entry = _entry(b, -3.0, (a, -0.25), (c, -1.0), rank=7)
    done = _done(_choice("x"), prompt_logprobs=(None, entry))
    wanted = [
        None,
        {
            str(b): {"logprob": -3.0, "rank": 7, "decoded_token": "b"},
            str(a): {"logprob": -0.25, "rank": 1, "decoded_token": "a"},
        },
    ]
    assert _completion({"prompt_logprobs": 1}, done)["choices"][0]["prompt_logprobs"] == wanted
    assert _chat({"prompt_logprobs": 1}, done)["prompt_logprobs"] == wanted


def test_token_ids_are_shown_where_asked_for() -> None:
    found = _completion({"return_token_ids": True}, _done(_choice("cd")))["choices"][0]
    assert found["token_ids"] == list(_ids("cd"))
    assert found["prompt_token_ids"] == list(_ids("ab"))
    chat = _chat({"return_token_ids": True}, _done(_choice("cd")))
    assert chat["choices"][0]["token_ids"] == list(_ids("cd"))
    assert chat["prompt_token_ids"] == list(_ids("ab"))


def test_tokens_in_logprobs_can_be_ids() -> None:
    c = _ids("c")[0]
    done = _done(_choice("c", logprobs=(_entry(c, -0.1),)))
    body = {"logprobs": 0, "return_tokens_as_token_ids": True}
    found = _completion(body, done)["choices"][0]["logprobs"]
    assert found["tokens"] == [f"token_id:{c}"]
    assert found["top_logprobs"] == [{f"token_id:{c}": -0.1}]


def test_text_offsets_end_where_a_stop_string_cut_the_text() -> None:
    ids = _ids("abcd")
    choice = _choice("ab", token_ids=ids, logprobs=tuple(_entry(i, -1.0) for i in ids))
    found = _completion({"logprobs": 0}, _done(choice))["choices"][0]["logprobs"]
    assert found["text_offset"] == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("no token could be drawn: the logits were not finite", 500),
        (request_lib.NO_TOKEN_LEFT, 400),
        (f"{request_lib.GRAMMAR_TOO_HARD} (MaxTokensParser)", 400),
    ],
)
def test_a_prompt_that_failed_while_running_is_an_error_of_ours_or_of_the_request(
    message: str, status: int
) -> None:
    failed = request_lib.Completion(request_id="r", prompt_ids=(1,), choices=(), error=message)
    with pytest.raises(errors.ApiError) as refused:
        _completion({}, _done(_choice("a")), failed)
    assert (str(refused.value), refused.value.status_code) == (message, status)
