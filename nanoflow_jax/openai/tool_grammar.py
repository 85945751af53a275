"""Grammars under which a model can write nothing but calls of the tools it was given."""

import json
from collections.abc import Mapping
from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.tokenizer.tool_formats import (
    HERMES_END,
    MISTRAL_ARGUMENTS,
    ToolFormat,
    ToolStyle,
)

MAX_CALLS = 32  # of one answer under a grammar

# The separators that templates write. Free whitespace would let a model go on with it for ever.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def build(
    style: ToolStyle, schemas: Mapping[str, Mapping[str, Any]], *, several: bool
) -> request_lib.Grammar:
    """A grammar for one call, or for one and more.

    Args:
        style: How the model writes calls.
        schemas: JSON schemas of the arguments by the names of the tools.
        several: Whether more than one call is allowed; llama3 has no form for that.

    Returns:
        A grammar in llguidance's kind of Lark. Markers that are single tokens of the model appear
        in it by their ids, so that no other spelling of them is chosen.
    """
    repeat = f"{{0,{MAX_CALLS - 1}}}"
    opening = _marker(style, style.format.opening)
    match style.format:
        case ToolFormat.HERMES:
            start = f'call ("\\n" call){repeat}' if several else "call"
            call = f'{opening} "\\n" object "\\n" {_marker(style, HERMES_END)}'
        case ToolFormat.LLAMA3:
            start, call = "call", "object"
        case ToolFormat.MISTRAL:
            calls = f'call (", " call){repeat}' if several else "call"
            start, call = f'{opening} " "? "[" {calls} "]"', "object"
        case ToolFormat.MISTRAL_ARGS:
            start = f"call call{repeat}" if several else "call"
            call = f"{opening} object"
    rules = [f"start: {start}", f"call: {call}"]
    rules.append("object: " + " | ".join(f"object_{i}" for i in range(len(schemas))))
    for i, (name, schema) in enumerate(schemas.items()):
        rules.append(f"object_{i}: {_object(style, name, i)}")
        rules.append(f"arguments_{i}: %json {_schema(schema)}")
    return request_lib.Grammar(kind=request_lib.GrammarKind.LARK, text="\n".join(rules) + "\n")


def _object(style: ToolStyle, name: str, number: int) -> str:
    if style.format is ToolFormat.MISTRAL_ARGS:
        return f"{_literal(name)} {_marker(style, MISTRAL_ARGUMENTS)} arguments_{number}"
    head = f'{{"name": "{name}", "{style.format.arguments_key}": '
    return f'{_literal(head)} arguments_{number} "}}"'


def _schema(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "type": "object", "x-guidance": _SPACING}, allow_nan=False)


def _marker(style: ToolStyle, marker: str) -> str:
    token = style.token_ids.get(marker)
    return _literal(marker) if token is None else f"<[{token}]>"


def _literal(text: str) -> str:
    return json.dumps(text)
