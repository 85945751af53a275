"""Reads the bodies of /v1/completions and /v1/chat/completions.

A field that would change the answer and is not known is refused by name; one that changes nothing
(`user`, `metadata`, ...) is left alone; null is the same as not given.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import sampling_fields, tool_messages
from nanoflow_jax.openai import tools as tools_lib
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.openai.fields import Fields, is_int, unsupported
from nanoflow_jax.tokenizer.tool_formats import ToolStyle

MAX_PROMPTS = 2048  # prompts times n of one body

Prompt = str | tuple[int, ...]


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
        usage_in_each: Whether each of its pieces tells the usage so far.
        priority: Lower runs first.
        timeout_s: Seconds from arrival to the last token, if the body sets any.
        add_special_tokens: Whether a prompt that is text gets what the model wants around it;
            None: as usual.
        truncate_prompt_len: Of a longer prompt only so many last tokens are used.
        tools: What the model may call, if anything.
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
    usage_in_each: bool = False
    priority: int = 0
    timeout_s: float | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_len: int | None = None
    tools: tools_lib.Tools | None = None


def parse(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    tool_style: ToolStyle | None = None,
) -> ApiRequest:
    """Reads a body.

    Args:
        endpoint: Where it was sent.
        body: As it came out of JSON.
        defaults: Fields of SamplingParams for what the body leaves out. Without one for
            `max_tokens`, OpenAI's hold: 16 for a completion, the whole context for a chat.
        tool_style: How the model calls tools; without it a chat with tools is refused.

    Raises:
        ApiError: A field is unknown, not supported or wrong; the message names it.
    """
    fields = Fields(endpoint, body)
    if endpoint is Endpoint.COMPLETIONS:
        found = _parse_completion(fields, defaults)
    else:
        found = _parse_chat(fields, defaults, tool_style)
    fields.check_all_taken()
    return found


def _parse_completion(fields: Fields, defaults: Mapping[str, Any]) -> ApiRequest:
    echo = fields.take_bool("echo")
    sampling = sampling_fields.read(fields, defaults)
    logprobs = fields.take("logprobs")
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    shown = sampling.get("prompt_logprobs")
    best_of = fields.take_int("best_of", 1, request_lib.MAX_CHOICES)
    params = sampling_fields.make(sampling)
    if echo and logprobs is not None:
        params = dataclasses.replace(params, prompt_logprobs=max(logprobs, shown or 0))
    if best_of not in (None, params.n):
        raise unsupported("best_of")
    return ApiRequest(
        endpoint=Endpoint.COMPLETIONS,
        prompts=_prompts(fields.take("prompt"), n=params.n),
        params=params,
        show=_show(fields, echo=echo, prompt_logprobs=shown),
        **_common(fields),
    )


def _parse_chat(
    fields: Fields, defaults: Mapping[str, Any], tool_style: ToolStyle | None
) -> ApiRequest:
    sampling = {"max_tokens": None, **sampling_fields.read(fields, defaults)}
    most = _max_completion_tokens(fields)
    if most is not None:
        sampling["max_tokens"] = most
    sampling["logprobs"] = _chat_logprobs(fields, sampling.get("logprobs"))
    options = _template_options(fields)
    messages = _messages(fields.take("messages"))
    params = sampling_fields.make(sampling)
    parallel = fields.take_bool("parallel_tool_calls", default=True)
    offered = tools_lib.read(fields.take("tools"), fields.take("tool_choice"), parallel, tool_style)
    if offered is not None:
        options["tools"] = offered.shown
        params = offered.constrain(params)
    return ApiRequest(
        endpoint=Endpoint.CHAT,
        messages=tool_messages.prepare(messages, tool_style),
        template_options=options,
        params=params,
        tools=offered,
        show=_show(fields, echo=False, prompt_logprobs=sampling.get("prompt_logprobs")),
        **_common(fields),
    )


def _max_completion_tokens(fields: Fields) -> int | None:
    most = fields.take("max_completion_tokens")
    if most is None:
        return None
    if not is_int(most) or most < 1:
        raise ApiError(
            f"max_completion_tokens={most!r:.80} is not an integer at least 1",
            param="max_completion_tokens",
        )
    if fields.body.get("max_tokens") not in (None, most):
        raise ApiError(
            f"max_tokens={fields.body['max_tokens']!r:.80} and "
            f"max_completion_tokens={most!r:.80} differ; give one of them",
            param="max_completion_tokens",
        )
    return int(most)


def _template_options(fields: Fields) -> dict[str, Any]:
    continues = fields.take_bool("continue_final_message")
    begins = fields.take_bool("add_generation_prompt", default=not continues)
    if continues and begins:
        raise ApiError(
            "continue_final_message goes on with the final message and add_generation_prompt "
            "begins another; set one of them to false",
            param="continue_final_message",
        )
    options: dict[str, Any] = {"add_generation_prompt": begins}
    if continues:
        options["continue_final_message"] = True
    kwargs = fields.take("chat_template_kwargs")
    if kwargs is not None:
        if not isinstance(kwargs, Mapping):
            raise ApiError(
                f"chat_template_kwargs={kwargs!r:.80} is not an object",
                param="chat_template_kwargs",
            )
        options["kwargs"] = kwargs
    return options


def _messages(value: Any) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    raise ApiError(
        "messages is missing: a list of objects with a role and a content"
        if value is None
        else f"messages={value!r:.80} is not a list of objects with a role and a content",
        param="messages",
    )


def _chat_logprobs(fields: Fields, default: int | None) -> int | None:
    wanted = fields.take_bool("logprobs", default=default is not None)
    top = fields.take("top_logprobs")
    if top is None:
        return (default or 0) if wanted else None
    if not is_int(top) or not 0 <= top <= request_lib.MAX_LOGPROBS:
        raise ApiError(
            f"top_logprobs={top!r:.80} is not an integer from 0 to {request_lib.MAX_LOGPROBS}",
            param="top_logprobs",
        )
    if top and not wanted:  # 0 is vLLM's way to ask for none
        raise ApiError("top_logprobs needs logprobs: true beside it", param="top_logprobs")
    return int(top) if wanted else None


def _show(fields: Fields, *, echo: bool, prompt_logprobs: int | None) -> Show:
    return Show(
        echo=echo,
        prompt_logprobs=prompt_logprobs,
        token_ids=fields.take_bool("return_token_ids"),
        tokens_as_ids=fields.take_bool("return_tokens_as_token_ids"),
    )


def _common(fields: Fields) -> dict[str, Any]:
    model = fields.take("model")
    if model is not None and not isinstance(model, str):
        raise ApiError(f"model={model!r:.80} is not text", param="model")
    stream = fields.take_bool("stream")
    options = fields.take("stream_options")
    if options is not None and not (stream and isinstance(options, Mapping)):
        raise ApiError(
            "stream_options is an object that goes with stream: true", param="stream_options"
        )
    told = {name: (options or {}).get(name) for name in ("include_usage", "continuous_usage_stats")}
    for name, value in told.items():
        if not isinstance(value, bool | None):
            raise ApiError(
                f"stream_options.{name}={value!r:.80} is not true or false", param="stream_options"
            )
    return {
        "model": model,
        "stream": stream,
        "include_usage": told["include_usage"] is True,
        "usage_in_each": told["continuous_usage_stats"] is True,
        "priority": fields.take_int("priority", -1000, 1000) or 0,
        "timeout_s": _timeout(fields.take("timeout_s")),
        "add_special_tokens": fields.take_optional_bool("add_special_tokens"),
        "truncate_prompt_len": fields.take_int("truncate_prompt_tokens", 1, 2**31 - 1),
    }


def _timeout(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1e6:
        raise ApiError(
            f"timeout_s={value!r:.80} is not a number of seconds above 0", param="timeout_s"
        )
    return float(value)


def _prompts(value: Any, *, n: int) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if _are_ids(value):
            return (tuple(value),)
        if len(value) * n > MAX_PROMPTS:  # before each of them costs time
            raise ApiError(
                f"{len(value)} prompts with n={n} are more than {MAX_PROMPTS} choices; split them "
                "into several requests",
                param="prompt",
            )
        if all(isinstance(prompt, str) for prompt in value):
            return tuple(value)
        if all(isinstance(prompt, list) and _are_ids(prompt) for prompt in value):
            return tuple(tuple(prompt) for prompt in value)
    raise ApiError(
        "prompt is missing"
        if value is None
        else f"prompt={value!r:.80} is not text, a list of texts, a list of token ids or a list of "
        "such lists",
        param="prompt",
    )


def _are_ids(value: list[Any]) -> bool:
    """Whether a list is one of whole numbers; quick, as there may be millions."""
    return set(map(type, value)) == {int}
