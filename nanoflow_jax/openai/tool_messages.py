"""Messages with calls and results of tools, in the form that chat templates expect."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow_jax.openai import tools
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.tokenizer.tool_formats import ToolStyle

MAX_CALLS = 128  # of one message
MAX_ITEMS = 8192  # messages, their parts and their calls, all together

_MISTRAL_ID = re.compile(r"[A-Za-z0-9]{9}")


def prepare(messages: Sequence[Any], style: ToolStyle | None) -> list[Any]:
    """Messages as a chat template reads them.

    Arguments of calls come as text and go on as objects, as transformers and vLLM have it.
    Mistral's templates take no ids but such of nine letters and digits: others are replaced.

    Args:
        messages: As they came; what has nothing to do with tools is left to the template.
        style: How the model writes calls, where that is known.

    Raises:
        ApiError: There is too much of them, or a call or an id is malformed; the message says
            which.
    """
    _check_number(messages)
    is_mistral = style is not None and style.format.is_mistral
    return [_message(m, f"messages[{i}]", is_mistral) for i, m in enumerate(messages)]


def _check_number(messages: Sequence[Any]) -> None:
    lists = (
        m.get(key) for m in messages if isinstance(m, Mapping) for key in ("content", "tool_calls")
    )
    count = len(messages) + sum(len(found) for found in lists if isinstance(found, list))
    if count > MAX_ITEMS:
        raise _wrong(
            f"messages, with their parts and calls, are {count}; at most {MAX_ITEMS} are taken: "
            "join some, or leave out the oldest"
        )


def _message(message: Any, where: str, is_mistral: bool) -> Any:
    if not isinstance(message, Mapping):
        return message
    found = dict(message)
    result_of = found.get("tool_call_id")
    if result_of is not None:
        found["tool_call_id"] = _id(result_of, f"{where}.tool_call_id", is_mistral)
    calls = found.pop("tool_calls", None)
    if calls is None or calls == []:  # templates ask only whether there is such a key
        return found
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise _wrong(f"{where}.tool_calls is not a list of at most {MAX_CALLS} calls")
    found["tool_calls"] = [
        _call(call, f"{where}.tool_calls[{i}]", is_mistral) for i, call in enumerate(calls)
    ]
    return found


def _call(call: Any, where: str, is_mistral: bool) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _wrong(f"{where} is not an object with a function that has a name")
    found = dict(call)
    if found.get("id") is not None:
        found["id"] = _id(found["id"], f"{where}.id", is_mistral)
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    found["function"] = {**function, "arguments": arguments}
    return found


def _arguments(given: Any, where: str) -> Mapping[str, Any]:
    if given is None or given == "":  # a call without arguments
        return {}
    found = given
    if isinstance(given, str):
        try:
            found = json.loads(given, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise _wrong(f"{where} is not JSON ({error}); it must be a JSON object") from error
    if not isinstance(found, Mapping):
        raise _wrong(f"{where}={tools.shortened(found)} is not a JSON object")
    tools.check_depth(found, where, param="messages")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _id(given: Any, where: str, is_mistral: bool) -> str:
    if not isinstance(given, str):
        raise _wrong(f"{where}={tools.shortened(given)} is not text")
    if not is_mistral or _MISTRAL_ID.fullmatch(given):
        return given
    return hashlib.sha256(given.encode(errors="replace")).hexdigest()[:9]


def _wrong(message: str) -> ApiError:
    return ApiError(message, param="messages")
