"""Reads the tools of a chat, and writes the calls of its answer.

`tool_choice` "none" shows the model no tools at all: it then cannot call one. "required" and a
named function hold the answer to calls by a grammar. "auto" leaves the answer free and looks for
calls in it.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import tool_grammar
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.openai.tool_parser import Arguments, CallStart, Content, Piece, ToolParser
from nanoflow_jax.tokenizer.tool_formats import ToolStyle

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 * 1024
MAX_DEPTH = 64  # of objects and lists in one another, in tools and in arguments
TOOL_CALLS = "tool_calls"  # the finish_reason of an answer that calls

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_ARGUMENTS: Mapping[str, Any] = {"properties": {}, "additionalProperties": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
    """The tools that one chat offers to the model.

    Attributes:
        style: How the model writes calls.
        shown: The tools as the chat template gets them.
        schemas: JSON schemas of their arguments by their names.
        forced: Names of which one must be called; empty leaves it to the model.
        several: Whether an answer may hold more than one call; further ones are dropped.
    """

    style: ToolStyle
    shown: Sequence[Mapping[str, Any]]
    schemas: Mapping[str, Mapping[str, Any]]
    forced: frozenset[str]
    several: bool

    def constrain(self, params: request_lib.SamplingParams) -> request_lib.SamplingParams:
        """Sampling that lets calls be made and seen.

        Raises:
            ApiError: The answer has another form already, or the schemas make too long a grammar.
        """
        if params.grammar is not None:
            raise ApiError(
                "tools cannot be offered together with a form for the answer; leave out one of "
                'them, or set tool_choice to "none"',
                param="tools",
                code="unsupported_parameter",
            )
        if self.style.needs_special_tokens:
            params = dataclasses.replace(params, skip_special_tokens=False)
        if not self.forced:
            return params
        wanted = {name: s for name, s in self.schemas.items() if name in self.forced}
        grammar = tool_grammar.build(self.style, wanted, several=self.several)
        if len(grammar.text) > request_lib.MAX_GRAMMAR_LEN:
            raise ApiError(
                f"the schemas of {len(wanted)} tools make a grammar of {len(grammar.text)} "
                f"characters; at most {request_lib.MAX_GRAMMAR_LEN} are taken when a call is "
                "forced: shorten them, offer fewer, or name one function in tool_choice",
                param="tools",
            )
        return dataclasses.replace(params, grammar=grammar)

    def parser(self, response_id: str, choice: int) -> ToolParser:
        """A parser for the text of one choice.

        Args:
            response_id: Of the answer: ids of calls depend on it, on the choice and on nothing
                else, so that an answer that is made again has the same.
            choice: Its index.
        """
        return ToolParser(
            self.style.format,
            self.schemas,
            call_id=lambda index: call_id(response_id, choice, index),
            max_calls=None if self.several else 1,
        )


def call_id(response_id: str, choice: int, index: int) -> str:
    """The id of a call in an answer."""
    digest = hashlib.sha256(f"call {response_id}/{choice}/{index}".encode()).hexdigest()
    return f"call_{digest[:24]}"


def read(
    tools: Any, tool_choice: Any, parallel: bool | None, style: ToolStyle | None
) -> Tools | None:
    """Reads the fields `tools`, `tool_choice` and `parallel_tool_calls` of a body.

    Args:
        tools: As it came; None or an empty list is none.
        tool_choice: As it came; None is "auto" where there are tools.
        parallel: Whether several calls may be made at once; None is yes.
        style: How the model writes calls; None where that is not known.

    Returns:
        What is offered to the model, None if nothing is.

    Raises:
        ApiError: A field is wrong, or the model cannot do what it asks; the message names it.
    """
    if tools is None or tools == []:
        if tool_choice not in (None, "none", "auto"):
            raise ApiError(
                f"tool_choice={shortened(tool_choice)} needs tools beside it", param="tool_choice"
            )
        return None
    if style is None:
        raise ApiError(
            "tools is not supported yet; leave it out", param="tools", code="unsupported_parameter"
        )
    _check_size(tools)
    schemas: dict[str, Mapping[str, Any]] = {}
    shown = []
    for i, tool in enumerate(tools):
        function = _function(tool, f"tools[{i}]")
        name = function["name"]
        if name in schemas:
            raise ApiError(f"tools[{i}]: a function {name!r} was offered before", param="tools")
        schemas[name] = function.get("parameters", _NO_ARGUMENTS)
        shown.append({**tool, "function": function})
    forced = _forced(tool_choice, schemas)
    if forced is None:
        return None
    if not forced and not style.is_native:
        raise ApiError(
            "the model's chat template has no form for calls of tools: set tool_choice to "
            '"required" or to a named function, or start with --tool_format if the model knows one',
            param="tool_choice",
            code="unsupported_parameter",
        )
    is_named = isinstance(tool_choice, Mapping)
    return Tools(
        style=style,
        shown=shown,
        schemas=schemas,
        forced=forced,
        several=parallel is not False and not is_named,
    )


def _check_size(tools: Any) -> None:
    if not isinstance(tools, list):
        raise ApiError(f"tools={shortened(tools)} is not a list of functions", param="tools")
    if len(tools) > MAX_TOOLS:
        raise ApiError(
            f"tools has {len(tools)} entries; at most {MAX_TOOLS} are taken", param="tools"
        )
    try:
        size = len(json.dumps(tools, allow_nan=False, ensure_ascii=False).encode())
    except RecursionError as error:
        raise _too_deep("tools", param="tools") from error
    except ValueError as error:
        raise ApiError(f"tools holds what JSON cannot say: {error}", param="tools") from error
    if size > MAX_TOOLS_BYTES:
        raise ApiError(
            f"tools has {size} bytes; at most {MAX_TOOLS_BYTES} are taken", param="tools"
        )
    check_depth(tools, "tools", param="tools")


def _function(tool: Any, where: str) -> dict[str, Any]:
    """The function of a tool, without its nulls: templates ask only whether a key exists."""
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise ApiError(
            f'{where}={shortened(tool)} is not {{"type": "function", "function": {{...}}}}',
            param="tools",
        )
    given = tool.get("function")
    if not isinstance(given, Mapping):
        raise ApiError(
            f"{where}: function={shortened(given)} is not an object with a name", param="tools"
        )
    function = {key: value for key, value in given.items() if value is not None}
    name = function.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ApiError(
            f"{where}: name={shortened(name)} is not 1 to 64 letters, digits, _ and -",
            param="tools",
        )
    if not isinstance(function.get("description", ""), str):
        raise ApiError(
            f"{where}: description={shortened(function['description'])} is not text", param="tools"
        )
    if not isinstance(function.get("strict", False), bool):
        raise ApiError(
            f"{where}: strict={shortened(function['strict'])} is not true or false", param="tools"
        )
    parameters = function.get("parameters", {})
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ApiError(
            f"{where}: parameters={shortened(parameters)} is not a JSON schema of an object",
            param="tools",
        )
    return function


def _forced(choice: Any, schemas: Mapping[str, Any]) -> frozenset[str] | None:
    """Names of which one must be called; None where none may be."""
    match choice:
        case "none":
            return None
        case None | "auto":
            return frozenset()
        case "required":
            return frozenset(schemas)
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in schemas:
                raise ApiError(
                    f"tool_choice names {name!r:.80}, which is not among tools",
                    param="tool_choice",
                )
            return frozenset({name})
    raise ApiError(
        f'tool_choice={shortened(choice)} is not "none", "auto", "required" or '
        '{"type": "function", "function": {"name": ...}}',
        param="tool_choice",
    )


def shortened(value: Any) -> str:
    """A value for a message: neither long nor deep."""
    return f"{reprlib.repr(value):.80}"


def check_depth(value: Any, name: str, *, param: str) -> None:
    """Refuses JSON that is nested too deep.

    Raises:
        ApiError: More than MAX_DEPTH objects and lists lie in one another.
    """
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep(name, param=param)
        parts = (v.values() if isinstance(v, dict) else v for v in level)
        level = list(itertools.chain.from_iterable(parts))


def _too_deep(name: str, *, param: str) -> ApiError:
    return ApiError(f"{name} is nested deeper than {MAX_DEPTH} levels", param=param)


def delta(piece: Piece) -> dict[str, Any]:
    """The `delta` of a streamed chunk that says this piece."""
    match piece:
        case Content():
            return {"content": piece.text}
        case CallStart():
            call = {"index": piece.index, **_call(piece)}
        case Arguments():
            call = {"index": piece.index, "function": {"arguments": piece.text}}
    return {"tool_calls": [call]}


def message_fields(tools: Tools, text: str, response_id: str, choice: int) -> dict[str, Any]:
    """`content`, and where there are calls `tool_calls`, of the message that a text is."""
    parser = tools.parser(response_id, choice)
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    for piece in (*parser.push(text), *parser.finish()):
        match piece:
            case Content():
                content.append(piece.text)
            case CallStart():
                calls.append(_call(piece))
            case Arguments():
                calls[piece.index]["function"]["arguments"] += piece.text
    if not calls:
        return {"content": "".join(content)}
    return {"content": "".join(content) or None, "tool_calls": calls}


def finish_reason(reason: request_lib.FinishReason, *, has_calls: bool) -> str:
    """OpenAI's word for how an answer ended."""
    return TOOL_CALLS if has_calls and reason is request_lib.FinishReason.STOP else str(reason)


def _call(start: CallStart) -> dict[str, Any]:
    return {
        "id": start.call_id,
        "type": "function",
        "function": {"name": start.name, "arguments": ""},
    }
