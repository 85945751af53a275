"""Reads the bodies of /v1/completions and /v1/chat/completions.

A field that would change the answer and is not known is refused by name; one that changes nothing
(`user`, `metadata`, ...) is left alone; null is the same as not given.
"""

import dataclasses
import difflib
import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import structured
from nanoflow_jax.openai.errors import ApiError

MAX_PROMPTS = 2048  # prompts times n of one body

Prompt = str | tuple[int, ...]

# Fields with the same name and meaning here and in SamplingParams.
_SAMPLING = (
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "allowed_token_ids",
    "stop",
    "stop_token_ids",
    "include_stop",
    "ignore_eos",
    "n",
    "seed",
    "skip_special_tokens",
)
_NO_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
# What OpenAI or vLLM know and we do not, with the values that ask for nothing.
_NOT_YET: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


class Endpoint(enum.StrEnum):
    """What is asked for, by its path."""

    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """What an answer shows beside its text.

    Attributes:
        echo: The prompt before the text.
        prompt_logprobs: This many likely tokens at each prompt token; None is off.
        token_ids: Token ids of prompt and text.
        tokens_as_ids: Tokens in logprobs are written as `token_id:7`.
    """

    echo: bool = False
    prompt_logprobs: int | None = None
    token_ids: bool = False
    tokens_as_ids: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """A body that was understood.

    Attributes:
        endpoint: Which form the answer has.
        model: The model that the body names, if it does.
        prompts: Of a completion: one or several, each text or token ids.
        messages: Of a chat; the chat template checks them.
        template_options: Arguments of the chat template.
        params: How to sample; the seed is None if the body has none.
        show: What the answer shows.
        stream: Whether the answer is wanted in pieces.
        include_usage: Whether a streamed answer ends with its usage.
    """

    endpoint: Endpoint
    model: str | None
    prompts: tuple[Prompt, ...] = ()
    messages: Sequence[Any] | None = None
    template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    params: request_lib.SamplingParams
    show: Show
    stream: bool = False
    include_usage: bool = False


def parse(endpoint: Endpoint, body: Mapping[str, Any], defaults: Mapping[str, Any]) -> ApiRequest:
    """Reads a body.

    Args:
        endpoint: Where it was sent.
        body: As it came out of JSON.
        defaults: Fields of SamplingParams for what the body leaves out. Without one for
            `max_tokens`, OpenAI's hold: 16 for a completion, the whole context for a chat.

    Raises:
        ApiError: A field is unknown, not supported or wrong; the message names it.
    """
    fields = _Fields(endpoint, body)
    if endpoint is Endpoint.COMPLETIONS:
        found = _parse_completion(fields, defaults)
    else:
        found = _parse_chat(fields, defaults)
    fields.check_all_taken()
    if len(found.prompts) * found.params.n > MAX_PROMPTS:
        raise ApiError(
            f"{len(found.prompts)} prompts with n={found.params.n} are more than {MAX_PROMPTS} "
            "choices; split them into several requests",
            param="prompt",
        )
    return found


def _parse_completion(fields: "_Fields", defaults: Mapping[str, Any]) -> ApiRequest:
    echo = fields.take_bool("echo")
    sampling = _sampling(fields, defaults)
    logprobs = fields.take("logprobs")
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    shown = sampling.get("prompt_logprobs")
    best_of = fields.take("best_of")
    params = _params(sampling)
    if echo and logprobs is not None:
        params = dataclasses.replace(params, prompt_logprobs=max(logprobs, shown or 0))
    if best_of not in (None, params.n):
        raise _not_yet("best_of")
    return ApiRequest(
        endpoint=Endpoint.COMPLETIONS,
        prompts=_prompts(fields.take("prompt")),
        params=params,
        show=_show(fields, echo=echo, prompt_logprobs=shown),
        **_common(fields),
    )


def _parse_chat(fields: "_Fields", defaults: Mapping[str, Any]) -> ApiRequest:
    sampling = {"max_tokens": None, **_sampling(fields, defaults)}
    most = fields.take("max_completion_tokens")
    if most is not None:
        if not _is_int(most) or most < 1:
            raise ApiError(
                f"max_completion_tokens={most!r} is not an integer at least 1",
                param="max_completion_tokens",
            )
        if fields.body.get("max_tokens") not in (None, most):
            raise ApiError(
                f"max_tokens={fields.body['max_tokens']!r} and max_completion_tokens={most} "
                "differ; give one of them",
                param="max_completion_tokens",
            )
        sampling["max_tokens"] = most
    sampling["logprobs"] = _chat_logprobs(fields, sampling.get("logprobs"))
    options: dict[str, Any] = {
        "add_generation_prompt": fields.take_bool("add_generation_prompt", default=True)
    }
    kwargs = fields.take("chat_template_kwargs")
    if kwargs is not None:
        if not isinstance(kwargs, Mapping):
            raise ApiError(
                f"chat_template_kwargs={kwargs!r:.80} is not an object",
                param="chat_template_kwargs",
            )
        options["kwargs"] = kwargs
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(
            "messages is missing: a list of objects with a role and a content"
            if messages is None
            else f"messages={messages!r:.80} is not a list of objects with a role and a content",
            param="messages",
        )
    return ApiRequest(
        endpoint=Endpoint.CHAT,
        messages=messages,
        template_options=options,
        params=_params(sampling),
        show=_show(fields, echo=False, prompt_logprobs=sampling.get("prompt_logprobs")),
        **_common(fields),
    )


def _chat_logprobs(fields: "_Fields", default: int | None) -> int | None:
    wanted = fields.take_bool("logprobs", default=default is not None)
    top = fields.take("top_logprobs")
    if top is None:
        return (default or 0) if wanted else None
    if not _is_int(top) or not 0 <= top <= request_lib.MAX_LOGPROBS:
        raise ApiError(
            f"top_logprobs={top!r} is not an integer from 0 to {request_lib.MAX_LOGPROBS}",
            param="top_logprobs",
        )
    if not wanted:
        raise ApiError("top_logprobs needs logprobs: true beside it", param="top_logprobs")
    return int(top)


def _sampling(fields: "_Fields", defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of SamplingParams that mean the same at both endpoints."""
    found = dict(defaults)
    for name in (*_SAMPLING, "max_tokens", "prompt_logprobs"):
        value = fields.take(name)
        if value is not None:
            found[name] = value
    top_k = fields.take("top_k")
    if top_k is not None:
        found["top_k"] = 0 if top_k == -1 else top_k  # vLLM's way to say all
    include_stop = fields.take("include_stop_str_in_output")
    if include_stop is not None:
        found["include_stop"] = include_stop
    bias = fields.take("logit_bias")
    if bias is not None:
        found["logit_bias"] = _bias(bias)
    grammar = structured.take(fields.take)
    if grammar is not None:
        found["grammar"] = grammar
    return found


def _bias(value: Any) -> dict[int, Any]:
    """Biases by token id; JSON knows only text as a key."""
    if not isinstance(value, Mapping):
        raise ApiError(
            f"logit_bias={value!r:.80} is not an object of token ids with numbers",
            param="logit_bias",
        )
    for key in value:
        if re.fullmatch(r"[0-9]{1,10}", key) is None:
            raise ApiError(f"logit_bias: {key!r:.40} is no token id", param="logit_bias")
    return {int(key): bias for key, bias in value.items()}


def _params(sampling: Mapping[str, Any]) -> request_lib.SamplingParams:
    try:
        return request_lib.SamplingParams(**sampling)
    except ValueError as error:
        name = re.match(r"\w+", str(error))
        raise ApiError(str(error), param=name[0] if name else None) from error


def _show(fields: "_Fields", *, echo: bool, prompt_logprobs: int | None) -> Show:
    return Show(
        echo=echo,
        prompt_logprobs=prompt_logprobs,
        token_ids=fields.take_bool("return_token_ids"),
        tokens_as_ids=fields.take_bool("return_tokens_as_token_ids"),
    )


def _common(fields: "_Fields") -> dict[str, Any]:
    model = fields.take("model")
    if model is not None and not isinstance(model, str):
        raise ApiError(f"model={model!r:.80} is not text", param="model")
    stream = fields.take_bool("stream")
    options = fields.take("stream_options")
    if options is not None and not (stream and isinstance(options, Mapping)):
        raise ApiError(
            "stream_options is an object that goes with stream: true", param="stream_options"
        )
    usage = (options or {}).get("include_usage")
    return {"model": model, "stream": stream, "include_usage": usage is True}


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(_is_int(token) for token in value):
            return (tuple(value),)
        if all(isinstance(prompt, str) for prompt in value):
            return tuple(value)
        if all(isinstance(p, list) and p and all(_is_int(t) for t in p) for p in value):
            return tuple(tuple(prompt) for prompt in value)
    raise ApiError(
        "prompt is missing"
        if value is None
        else f"prompt={value!r:.80} is not text, a list of texts, a list of token ids or a list of "
        "such lists",
        param="prompt",
    )


def _not_yet(name: str) -> ApiError:
    return ApiError(
        f"{name} is not supported yet; leave it out", param=name, code="unsupported_parameter"
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Fields:
    """Hands out the fields of a body and knows which were never asked for."""

    def __init__(self, endpoint: Endpoint, body: Mapping[str, Any]) -> None:
        self.body = body
        self._endpoint = endpoint
        self._known = {*_NO_EFFECT, *_NOT_YET}

    def take(self, name: str) -> Any:
        """The value of a field, None if it is null or not there."""
        self._known.add(name)
        return self.body.get(name)

    def take_bool(self, name: str, *, default: bool = False) -> bool:
        """The value of a field that is true or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ApiError(f"{name}={value!r:.80} is not true or false", param=name)
        return value

    def check_all_taken(self) -> None:
        """Refuses fields that nobody asked for, and those that we cannot serve yet."""
        for name, value in self.body.items():
            if name in _NOT_YET and value is not None and value not in _NOT_YET[name]:
                raise _not_yet(name)
            if name not in self._known:
                close = difflib.get_close_matches(name, sorted(self._known), n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ApiError(
                    f"{name!r:.80} is no field of {self._endpoint}{hint}",
                    param=name[:80],
                    code="unknown_parameter",
                )
