"""Reads what a body asks the form of the answer to be: OpenAI's fields, vLLM's and its older ones.

Whatever the form, it becomes one `request.Grammar`, which the engine always follows strictly.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai.errors import ApiError

_OBJECT = '{"type": "object"}'
MAX_CHOICES = 1000
_OLD = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_KEYS = ("json", "regex", "choice", "grammar", "json_object")


def take(take_field: Callable[[str], Any]) -> request_lib.Grammar | None:
    """The grammar that a body asks for, if it does.

    Args:
        take_field: Gives the value of a field of the body by its name, None if it is not there.

    Raises:
        ApiError: A field is wrong, or there are two.
    """
    found: dict[str, request_lib.Grammar] = {}
    form = take_field("response_format")
    if form is not None:
        grammar = _response_format(form)
        if grammar is not None:
            found["response_format"] = grammar
    outputs = take_field("structured_outputs")
    if outputs is not None:
        found["structured_outputs"] = _structured_outputs(outputs)
    for name, key in _OLD.items():
        value = take_field(name)
        if value is not None:
            found[name] = _grammar(key, value, name)
    if len(found) > 1:
        raise ApiError(
            f"{' and '.join(found)} each ask for a form of the answer; give one of them",
            param=list(found)[1],
        )
    return next(iter(found.values()), None)


def _response_format(form: Any) -> request_lib.Grammar | None:
    name = "response_format"
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _schema(_OBJECT)
    if kind != "json_schema":
        raise ApiError(
            f"{name}={form!r:.80} is not an object whose type is text, json_object or json_schema",
            param=name,
        )
    part = form.get("json_schema")
    schema = part.get("schema") if isinstance(part, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ApiError(
            f"{name}.json_schema={part!r:.80} is not an object with a schema, itself an object",
            param=name,
        )
    if not isinstance(part.get("strict"), bool | None):
        raise ApiError(
            f"{name}.json_schema.strict={part['strict']!r:.80} is not true or false", param=name
        )
    return _grammar("json", schema, name)


def _structured_outputs(outputs: Any) -> request_lib.Grammar:
    name = "structured_outputs"
    if not isinstance(outputs, Mapping):
        raise ApiError(
            f"{name}={outputs!r:.80} is not an object with one of {', '.join(_KEYS)}", param=name
        )
    given = {key: value for key, value in outputs.items() if value is not None}
    if given.get("json_object") is False:
        del given["json_object"]
    unknown = [key for key in given if key not in _KEYS]
    if unknown:
        raise ApiError(
            f"{name}.{unknown[0]:.80} is not supported; known are {', '.join(_KEYS)}",
            param=name,
            code="unsupported_parameter",
        )
    if len(given) != 1:
        raise ApiError(
            f"{name} has {' and '.join(given) or 'nothing'}; give one of {', '.join(_KEYS)}",
            param=name,
        )
    ((key, value),) = given.items()
    return _grammar(key, value, f"{name}.{key}")


def _grammar(key: str, value: Any, name: str) -> request_lib.Grammar:
    param = name.partition(".")[0]
    if key == "json":
        if isinstance(value, str):
            return _schema(value)
        if not isinstance(value, Mapping):
            raise ApiError(f"{name}={value!r:.80} is not a JSON schema or its text", param=param)
        try:
            return _schema(json.dumps(value, ensure_ascii=False, allow_nan=False))
        except (ValueError, RecursionError) as error:
            raise ApiError(f"{name} is not plain JSON: {error}", param=param) from error
    if key == "choice":
        return _choice(value, name)
    if key == "json_object":
        if value is not True:
            raise ApiError(f"{name}={value!r:.80} is not true or false", param=param)
        return _schema(_OBJECT)
    if not isinstance(value, str) or not value:
        raise ApiError(f"{name}={value!r:.80} is not text", param=param)
    kind = request_lib.GrammarKind.REGEX if key == "regex" else request_lib.GrammarKind.LARK
    return request_lib.Grammar(kind=kind, text=value)


def _choice(value: Any, name: str) -> request_lib.Grammar:
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= MAX_CHOICES
        or not all(isinstance(choice, str) and choice for choice in value)
    ):
        raise ApiError(
            f"{name}={value!r:.80} is not a list of 1 to {MAX_CHOICES} texts, none of them empty",
            param=name.partition(".")[0],
        )
    # A literal of llguidance's Lark is a JSON string.
    words = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
    return request_lib.Grammar(kind=request_lib.GrammarKind.LARK, text=f"start: {words}")


def _schema(text: str) -> request_lib.Grammar:
    return request_lib.Grammar(kind=request_lib.GrammarKind.JSON_SCHEMA, text=text)
