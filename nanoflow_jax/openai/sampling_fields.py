"""Reads the fields that say how tokens are chosen."""

import re
from collections.abc import Mapping
from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import structured
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.openai.fields import Fields

# Fields with the same name and meaning here and in SamplingParams.
_SAME = (
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "allowed_token_ids",
    "bad_words",
    "stop",
    "stop_token_ids",
    "include_stop",
    "ignore_eos",
    "n",
    "seed",
    "skip_special_tokens",
)


def read(fields: Fields, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of SamplingParams that mean the same at both endpoints.

    Args:
        fields: Of the body.
        defaults: For what the body leaves out.

    Raises:
        ApiError: A field is wrong.
    """
    found = dict(defaults)
    for name in (*_SAME, "max_tokens", "prompt_logprobs"):
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
    if len(value) > request_lib.MAX_LOGIT_BIAS:
        raise ApiError(
            f"logit_bias has {len(value)} entries; at most {request_lib.MAX_LOGIT_BIAS} are taken",
            param="logit_bias",
        )
    for key in value:
        if re.fullmatch(r"[0-9]{1,10}", key) is None:
            raise ApiError(f"logit_bias: {key!r:.40} is no token id", param="logit_bias")
    return {int(key): bias for key, bias in value.items()}


def make(sampling: Mapping[str, Any]) -> request_lib.SamplingParams:
    """SamplingParams of such arguments.

    Raises:
        ApiError: One of them is out of bounds; the message names it.
    """
    try:
        return request_lib.SamplingParams(**sampling)
    except ValueError as error:
        name = re.match(r"\w+", str(error))
        raise ApiError(str(error), param=name[0] if name else None) from error
