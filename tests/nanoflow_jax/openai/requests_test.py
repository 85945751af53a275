"""Bodies of both endpoints: what is understood, and what is refused with which words."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.openai import errors, requests
from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.tokenizer import tool_formats

_CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def _completion(defaults: dict[str, Any] | None = None, **body: Any) -> requests.ApiRequest:
    return requests.parse(Endpoint.COMPLETIONS, {"prompt": "hi", **body}, defaults or {})


def _chat(defaults: dict[str, Any] | None = None, **body: Any) -> requests.ApiRequest:
    return requests.parse(Endpoint.CHAT, {**_CHAT, **body}, defaults or {})


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("text", ("text",)),
        ("", ("",)),
        ([1, 2, 3], ((1, 2, 3),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_has_four_forms(prompt: Any, wanted: Any) -> None:
    assert _completion(prompt=prompt).prompts == wanted


@pytest.mark.parametrize(
    ("field", "value", "attribute", "wanted"),
    [
        ("max_tokens", 5, "max_tokens", 5),
        ("min_tokens", 2, "min_tokens", 2),
        ("temperature", 0, "temperature", 0),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", 7, "top_k", 7),
        ("top_k", -1, "top_k", 0),
        ("min_p", 0.1, "min_p", 0.1),
        ("presence_penalty", 1.5, "presence_penalty", 1.5),
        ("frequency_penalty", -2, "frequency_penalty", -2),
        ("repetition_penalty", 1.1, "repetition_penalty", 1.1),
        ("logit_bias", {"7": -100, "08": 1.5}, "logit_bias", {7: -100, 8: 1.5}),
        ("allowed_token_ids", [1, 2], "allowed_token_ids", (1, 2)),
        ("bad_words", ["no", " way"], "bad_words", ("no", " way")),
        ("stop", "end", "stop", ("end",)),
        ("stop", ["a", "b"], "stop", ("a", "b")),
        ("stop_token_ids", [3], "stop_token_ids", (3,)),
        ("include_stop", True, "include_stop", True),
        ("include_stop_str_in_output", True, "include_stop", True),
        ("ignore_eos", True, "ignore_eos", True),
        ("n", 3, "n", 3),
        ("seed", -5, "seed", -5),
        ("skip_special_tokens", False, "skip_special_tokens", False),
        ("prompt_logprobs", 2, "prompt_logprobs", 2),
    ],
)
def test_sampling_fields_mean_the_same_at_both_endpoints(
    field: str, value: Any, attribute: str, wanted: Any
) -> None:
    for found in (_completion(**{field: value}), _chat(**{field: value})):
        assert getattr(found.params, attribute) == wanted


def test_null_is_the_same_as_not_given() -> None:
    fields = ("temperature", "stop", "logit_bias", "echo", "logprobs", "tools", "stream", "model")
    body = dict.fromkeys(fields)
    assert _completion(**body) == _completion()


def test_fields_without_effect_are_left_alone() -> None:
    found = _chat(
        user="u", metadata={"a": "b"}, store=False, tools=[], response_format={"type": "text"}
    )
    assert found == _chat()


def test_length_is_openais_unless_the_run_sets_another() -> None:
    assert _completion().params.max_tokens == 16
    assert _chat().params.max_tokens is None
    assert _completion({"max_tokens": 9}).params.max_tokens == 9
    assert _chat({"max_tokens": 9}).params.max_tokens == 9
    assert _chat({"max_tokens": 9}, max_completion_tokens=4).params.max_tokens == 4
    assert _chat({"max_tokens": 9}, max_tokens=5).params.max_tokens == 5
    assert _chat(max_tokens=5, max_completion_tokens=5).params.max_tokens == 5


def test_the_body_wins_over_the_defaults_of_the_run() -> None:
    found = _completion({"temperature": 0.5, "top_p": 0.9}, temperature=0.0)
    assert (found.params.temperature, found.params.top_p) == (0.0, 0.9)


def test_logprobs_of_a_completion_are_a_number() -> None:
    assert _completion(logprobs=0).params.logprobs == 0
    assert _completion(logprobs=20).params.logprobs == 20
    assert _completion().params.logprobs is None


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
    ],
)
def test_logprobs_of_a_chat_are_a_switch_and_a_number(body: Any, wanted: int | None) -> None:
    assert _chat(**body).params.logprobs == wanted


def test_echo_with_logprobs_asks_the_engine_for_the_prompts_too() -> None:
    found = _completion(echo=True, logprobs=3, prompt_logprobs=1)
    assert found.show.echo
    assert found.params.prompt_logprobs == 3
    assert found.show.prompt_logprobs == 1
    assert _completion(echo=True).params.prompt_logprobs is None
    assert _completion(echo=True, logprobs=3).show.prompt_logprobs is None


def test_options_of_answer_and_template_are_read() -> None:
    found = _chat(
        model="m",
        stream=True,
        stream_options={"include_usage": True},
        return_token_ids=True,
        return_tokens_as_token_ids=True,
        chat_template_kwargs={"enable_thinking": False},
        add_generation_prompt=False,
    )
    assert (found.model, found.stream, found.include_usage) == ("m", True, True)
    assert found.show == requests.Show(token_ids=True, tokens_as_ids=True)
    assert found.template_options == {
        "add_generation_prompt": False,
        "kwargs": {"enable_thinking": False},
    }


def test_a_chat_begins_an_answer_or_goes_on_with_one() -> None:
    begun = {"add_generation_prompt": True}
    assert _chat().template_options == _chat(continue_final_message=False).template_options == begun
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    assert _chat(continue_final_message=True).template_options == continued
    assert _chat(**continued).template_options == continued


def test_suffix_may_be_empty() -> None:
    assert _completion(suffix="") == _completion(suffix=None) == _completion()


_BAD_ANYWHERE: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, r"temperature=-1 is not a number in \[0, 1e\+06\]"),
    ({"temperature": True}, "temperature=True is not a number"),
    ({"temperature": "hot"}, "temperature='hot' is not a number"),
    ({"top_p": 0}, "top_p=0 is not a number"),
    ({"max_tokens": 0}, "max_tokens=0 is not an integer from 1 to 2147483647"),
    ({"max_tokens": 1.5}, "max_tokens=1.5 is not an integer"),
    ({"n": 129}, "n=129 is not an integer from 1 to 128"),
    ({"seed": 2**64}, "seed=18446744073709551616 is not an integer"),
    ({"presence_penalty": 3}, "presence_penalty=3 is not a number"),
    ({"stop": [""]}, "is not a list of non-empty strings"),
    ({"stop": ["x"] * 17}, "stop has 17 strings; at most 16"),
    ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is no token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias is not a map from token ids to numbers"),
    ({"logit_bias": [1]}, r"logit_bias=\[1\] is not an object of token ids with numbers"),
    ({"logit_bias": {str(i): 0 for i in range(301)}}, "logit_bias has 301 entries; at most 300"),
    ({"allowed_token_ids": []}, "allowed_token_ids is not a non-empty list"),
    ({"bad_words": [" "]}, "bad_words=.* is not a list of texts that are more than white space"),
    ({"prompt_logprobs": 21}, "prompt_logprobs=21 is not an integer from 0 to 20"),
    ({"return_token_ids": 1}, "return_token_ids=1 is not true or false"),
    ({"model": 3}, "model=3 is not text"),
    ({"stream": "yes"}, "stream='yes' is not true or false"),
    ({"stream_options": {}}, "stream_options is an object that goes with stream: true"),
    ({"response_format": {"type": "xml"}}, "response_format=.* is not an object whose type is"),
    ({"tools": [{"type": "function"}]}, "tools is not supported yet"),
    # Of long lists the length is looked at before what is in them.
    ({"logit_bias": {f"x{i}": 1 for i in range(301)}}, "logit_bias has 301 entries; at most 300"),
    ({"bad_words": [0] * 129}, "bad_words has 129 texts; at most 128"),
    ({"temprature": 1}, "'temprature' is no field of .*; did you mean temperature?"),
    ({"qqqq": 1}, "'qqqq' is no field of"),
]


@pytest.mark.parametrize(("body", "message"), _BAD_ANYWHERE)
@pytest.mark.parametrize("parse", [_completion, _chat])
def test_a_wrong_field_is_refused_by_name(parse: Any, body: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ApiError, match=message) as refused:
        parse(**body)
    assert refused.value.status_code == 400
    assert refused.value.param == next(iter(body))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": []}, r"prompt=\[\] is not text, a list of texts, a list of token ids"),
        ({"prompt": ["a", 1]}, "is not text, a list of texts"),
        ({"prompt": [[1], []]}, "is not text, a list of texts"),
        ({"prompt": [True]}, "is not text, a list of texts"),
        ({"prompt": {"a": 1}}, "is not text, a list of texts"),
        ({"prompt": ["a"] * 1025, "n": 2}, "1025 prompts with n=2 are more than 2048 choices"),
        ({"prompt": [{}] * 2049}, "2049 prompts with n=1 are more than 2048 choices"),
        ({"logprobs": 21}, "logprobs=21 is not an integer from 0 to 20"),
        ({"logprobs": True}, "logprobs=True is not an integer"),
        ({"echo": "yes"}, "echo='yes' is not true or false"),
        ({"echo": True, "logprobs": "many"}, "logprobs='many' is not an integer"),
        ({"best_of": 2}, "best_of is not supported yet"),
        ({"suffix": "x"}, "suffix is not supported: the models here have no tokens to fill in a"),
        ({"max_completion_tokens": 4}, "'max_completion_tokens' is no field of /v1/completions"),
        ({"messages": []}, "'messages' is no field of /v1/completions"),
    ],
)
def test_a_wrong_completion_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ApiError, match=message):
        _completion(**body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": None}, "messages is missing"),
        ({"messages": "hi"}, "messages='hi' is not a list of objects"),
        ({"messages": []}, r"messages=\[\] is not a list of objects"),
        ({"logprobs": 3}, "logprobs=3 is not true or false"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true beside it"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs=21 is not an integer from 0 to 20"),
        ({"max_completion_tokens": 0}, "max_completion_tokens=0 is not an integer at least 1"),
        ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens=4 and max_completion_tokens=3"),
        ({"chat_template_kwargs": 1}, "chat_template_kwargs=1 is not an object"),
        ({"add_generation_prompt": 1}, "add_generation_prompt=1 is not true or false"),
        ({"continue_final_message": 1}, "continue_final_message=1 is not true or false"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message goes on with the final message and add_generation_prompt",
        ),
        ({"echo": True}, "'echo' is no field of /v1/chat/completions"),
        ({"prompt": "x"}, "'prompt' is no field of /v1/chat/completions"),
    ],
)
def test_a_wrong_chat_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ApiError, match=message):
        _chat(**body)


def test_a_chat_offers_its_tools_to_template_sampler_and_answer() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    called = {"id": "i", "function": {"name": "f", "arguments": "{}"}}
    body = {
        "messages": [{"role": "assistant", "tool_calls": [called]}],
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    style = tool_formats.ToolStyle(format=tool_formats.ToolFormat.HERMES)
    found = requests.parse(Endpoint.CHAT, body, {}, tool_style=style)
    assert found.template_options["tools"] == [tool]
    assert found.params.grammar is not None
    assert found.tools is not None and not found.tools.several
    assert found.messages == [
        {
            "role": "assistant",
            "tool_calls": [{"id": "i", "function": {"name": "f", "arguments": {}}}],
        }
    ]
    hidden = requests.parse(Endpoint.CHAT, {**body, "tool_choice": "none"}, {}, tool_style=style)
    assert hidden.tools is None and "tools" not in hidden.template_options
    with pytest.raises(errors.ApiError, match="parallel_tool_calls=1 is not true or false"):
        _chat(parallel_tool_calls=1)


def test_an_error_has_openais_form() -> None:
    error = errors.ApiError("no", param="n", code="c")
    assert error.body() == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "c"}
    }
    assert errors.ApiError("no", status_code=500).body()["error"]["type"] == "server_error"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
_NAMES = st.sampled_from(
    [
        *("prompt", "messages", "n", "stop", "logprobs", "top_logprobs", "logit_bias", "echo"),
        *("seed", "max_tokens", "tools", "best_of", "stream", "stream_options", "top_k", "x"),
        *("temperature", "allowed_token_ids", "chat_template_kwargs", "max_completion_tokens"),
    ]
)


@given(st.sampled_from(Endpoint), st.dictionaries(_NAMES, _JSON, max_size=4))
def test_c6_any_json_is_understood_or_refused_with_a_message(endpoint: Endpoint, body: Any) -> None:
    base: dict[str, Any] = {"prompt": "x"} if endpoint is Endpoint.COMPLETIONS else _CHAT
    refused = None
    try:
        found = requests.parse(endpoint, {**base, **json.loads(json.dumps(body))}, {})
    except errors.ApiError as error:
        refused = error
    assert str(refused) if refused is not None else found.params.n >= 1
