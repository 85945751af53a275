"""What /openapi.json says of the bodies of completions and chats.

They are read by `openai.requests`, whose messages say more than a schema can; tests hold the two
together.
"""

from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import fields, requests, structured, tool_messages, tools
from nanoflow_jax.serve.schema_parts import (
    INT32,
    TEXT_OR_NULL,
    TOKEN_ID,
    Schema,
    array,
    model_name,
    nullable,
)
from nanoflow_jax.tokenizer import chat_template

_TEXT = {"type": "string"}
_LOGPROBS = {"minimum": 0, "maximum": request_lib.MAX_LOGPROBS}
# Fields that are taken only with values that ask for nothing.
_ASK_NOTHING: Schema = {
    "functions": {"enum": [None, []]},
    "function_call": {"enum": [None, "none", "auto"]},
    "modalities": {"enum": [None, ["text"]]},
    "audio": {"type": "null"},
    "prediction": {"type": "null"},
    "web_search_options": {"type": "null"},
    "use_beam_search": {"enum": [None, False]},
    "suffix": {"enum": [None, ""]},
}


def completion_fields(model: str) -> dict[str, Any]:
    """Fields of a completion's body."""
    ids = array(TOKEN_ID, minItems=1)
    several = {"minItems": 1, "maxItems": requests.MAX_PROMPTS}
    return {
        **_common_fields(model),
        "prompt": {"anyOf": [_TEXT, array(_TEXT, **several), ids, array(ids, **several)]},
        "echo": nullable("boolean"),
        "logprobs": nullable("integer", **_LOGPROBS),
        "best_of": nullable("integer", minimum=1, maximum=request_lib.MAX_CHOICES),
        "tools": {"enum": [None, []]},
        "tool_choice": {"enum": [None, "none", "auto"]},
        "continue_final_message": {"enum": [None, False]},
    }


def chat_fields(model: str) -> dict[str, Any]:
    """Fields of a chat's body."""
    return {
        **_common_fields(model),
        "messages": array(_message(), minItems=1, maxItems=tool_messages.MAX_ITEMS),
        "max_completion_tokens": nullable("integer", minimum=1, maximum=INT32),
        "logprobs": nullable("boolean"),
        "top_logprobs": nullable("integer", **_LOGPROBS),
        "tools": nullable("array", items=_tool(), maxItems=tools.MAX_TOOLS),
        "tool_choice": _tool_choice(),
        "parallel_tool_calls": nullable("boolean"),
        "add_generation_prompt": nullable("boolean"),
        "continue_final_message": nullable("boolean"),
        "chat_template_kwargs": nullable("object", maxProperties=chat_template.MAX_KWARGS),
    }


def _common_fields(model: str) -> dict[str, Any]:
    return {
        "model": model_name(model),
        **_sampling_fields(),
        **_form_fields(),
        "stream": nullable("boolean"),
        "stream_options": nullable(
            "object",
            properties={
                "include_usage": nullable("boolean"),
                "continuous_usage_stats": nullable("boolean"),
            },
            description="Goes with stream: true only.",
        ),
        "prompt_logprobs": nullable("integer", **_LOGPROBS),
        "return_token_ids": nullable("boolean"),
        "return_tokens_as_token_ids": nullable("boolean"),
        "add_special_tokens": nullable("boolean"),
        "truncate_prompt_tokens": nullable("integer", minimum=1, maximum=INT32),
        "priority": nullable("integer", minimum=-1000, maximum=1000),
        "timeout_s": nullable("number", exclusiveMinimum=0, maximum=1e6),
        **{name: {"description": "Has no effect."} for name in fields.NO_EFFECT},
        **_ASK_NOTHING,
    }


def _sampling_fields() -> dict[str, Any]:
    most = request_lib
    stop = {"type": "string", "minLength": 1, "maxLength": most.MAX_STOP_LEN}
    bad_word = {"type": "string", "pattern": r"\S", "maxLength": most.MAX_BAD_WORD_LEN}
    penalty = {"minimum": -2, "maximum": 2}
    bias = {"type": "number", "minimum": -100, "maximum": 100}
    return {
        "max_tokens": nullable("integer", minimum=1, maximum=INT32),
        "min_tokens": nullable("integer", minimum=0, maximum=INT32),
        "temperature": nullable("number", minimum=0, maximum=1e6),
        "top_p": nullable("number", exclusiveMinimum=0, maximum=1),
        "top_k": nullable("integer", minimum=-1, maximum=INT32),
        "min_p": nullable("number", minimum=0, maximum=1),
        "presence_penalty": nullable("number", **penalty),
        "frequency_penalty": nullable("number", **penalty),
        "repetition_penalty": nullable("number", minimum=0.01, maximum=100),
        "logit_bias": nullable(
            "object",
            maxProperties=most.MAX_LOGIT_BIAS,
            propertyNames={"pattern": "^[0-9]{1,10}$"},
            additionalProperties=bias,
        ),
        "allowed_token_ids": nullable(
            "array", items=TOKEN_ID, minItems=1, maxItems=most.MAX_ALLOWED_TOKEN_IDS
        ),
        "bad_words": nullable("array", items=bad_word, maxItems=most.MAX_BAD_WORDS),
        "stop": {"anyOf": [{"type": "null"}, stop, array(stop, maxItems=most.MAX_STOP_STRINGS)]},
        "stop_token_ids": nullable("array", items=TOKEN_ID, maxItems=most.MAX_STOP_TOKEN_IDS),
        "include_stop_str_in_output": nullable("boolean"),
        "include_stop": nullable("boolean"),
        "ignore_eos": nullable("boolean"),
        "n": nullable("integer", minimum=1, maximum=most.MAX_CHOICES),
        "seed": nullable("integer", minimum=-(2**63), maximum=2**64 - 1),
        "skip_special_tokens": nullable("boolean"),
    }


def _form_fields() -> dict[str, Any]:
    """Fields that ask for a form of the answer; one of them at most may be given."""
    text = {"type": "string", "minLength": 1, "maxLength": request_lib.MAX_GRAMMAR_LEN}
    choices = array({"type": "string", "minLength": 1}, minItems=1, maxItems=structured.MAX_CHOICES)
    forms: dict[str, Any] = {
        "json": {"anyOf": [{"type": "object"}, {"type": "string"}]},
        "regex": text,
        "choice": choices,
        "grammar": text,
        "json_object": {"const": True},
    }
    nothing: Schema = {
        **{name: {"type": "null"} for name in forms},
        "json_object": {"enum": [None, False]},
    }
    only = [
        {
            "type": "object",
            "required": [name],
            "properties": {**nothing, name: form},
            "additionalProperties": {"type": "null"},
        }
        for name, form in forms.items()
    ]
    null: Schema = {"type": "null"}
    return {
        "response_format": {"anyOf": [null, *_response_formats()]},
        "structured_outputs": {"anyOf": [null, *only]},
        **{
            f"guided_{name}": {"anyOf": [null, forms[name]]}
            for name in ("json", "regex", "choice", "grammar")
        },
    }


def _response_formats() -> list[Schema]:
    schema = {
        "type": "object",
        "required": ["schema"],
        "properties": {"schema": {"type": "object"}, "strict": nullable("boolean")},
    }
    return [
        {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": ["text", "json_object"]}},
        },
        {
            "type": "object",
            "required": ["type", "json_schema"],
            "properties": {"type": {"const": "json_schema"}, "json_schema": schema},
        },
    ]


def _message() -> Schema:
    """A message; fields that are not named here go to the chat template, which knows the roles."""
    part = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": _TEXT},
    }
    call = {
        "type": "object",
        "required": ["function"],
        "properties": {
            "id": TEXT_OR_NULL,
            "function": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": _TEXT,
                    "arguments": {"type": ["string", "object", "null"]},
                },
            },
        },
    }
    content = [{"type": "null"}, _TEXT, array({"anyOf": [_TEXT, part]})]
    return {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": _TEXT,
            "content": {"anyOf": content},
            "tool_calls": nullable("array", items=call, maxItems=tool_messages.MAX_CALLS),
            "tool_call_id": TEXT_OR_NULL,
        },
    }


def _tool() -> Schema:
    parameters = {"type": ["object", "null"], "properties": {"type": {"const": "object"}}}
    function = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
            "description": TEXT_OR_NULL,
            "strict": nullable("boolean"),
            "parameters": parameters,
        },
    }
    return {
        "type": "object",
        "required": ["type", "function"],
        "properties": {"type": {"const": "function"}, "function": function},
    }


def _tool_choice() -> Schema:
    named = {
        "type": "object",
        "required": ["type", "function"],
        "properties": {
            "type": {"const": "function"},
            "function": {"type": "object", "required": ["name"], "properties": {"name": _TEXT}},
        },
    }
    return {"anyOf": [{"enum": [None, "none", "auto", "required"]}, named]}
