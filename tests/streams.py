"""Puts streamed answers together, as a careful client does."""

from collections.abc import Sequence
from typing import Any


def joined(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer that the pieces of one stream are, without its identity.

    Fails where something is told twice that is to be told once.
    """
    found: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for name in ("prompt_logprobs", "prompt_token_ids"):
            if name in chunk:
                assert name not in found, f"{name} stands in two pieces"
                found[name] = chunk[name]
        if chunk.get("usage") is not None:
            found["usage"] = chunk["usage"]
        for part in chunk["choices"]:
            _add(choices.setdefault(part["index"], {"index": part["index"]}), part)
    found["choices"] = [_finished(choices[index]) for index in sorted(choices)]
    return found


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    assert choice.get("finish_reason") is None, "a piece came after the last one"
    if "delta" in part:
        _add_message(choice.setdefault("message", {"content": "", "calls": {}}), part["delta"])
    else:
        choice["text"] = choice.get("text", "") + part["text"]
    for name in ("prompt_logprobs", "prompt_token_ids"):
        if name in part:
            assert name not in choice, f"{name} stands in two pieces"
            choice[name] = part[name]
    if "token_ids" in part:
        choice["token_ids"] = choice.get("token_ids", []) + part["token_ids"]
    logprobs = choice.setdefault("logprobs", None)
    if part["logprobs"] is not None:
        merged = choice["logprobs"] = logprobs or {}
        for name, values in part["logprobs"].items():
            merged[name] = merged.get(name, []) + values if values is not None else None
    choice["finish_reason"] = part["finish_reason"]
    choice["stop_reason"] = part.get("stop_reason")


def _add_message(message: dict[str, Any], delta: dict[str, Any]) -> None:
    message["role"] = delta.get("role", message.get("role"))
    message["content"] += delta.get("content", "")
    for piece in delta.get("tool_calls", ()):
        calls = message["calls"]
        if "id" in piece:
            assert piece["index"] == len(calls), "calls are numbered through"
            calls[piece["index"]] = {
                "id": piece["id"],
                "type": piece["type"],
                "function": dict(piece["function"]),
            }
        else:
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]


def _finished(choice: dict[str, Any]) -> dict[str, Any]:
    if "message" in choice:
        message = choice["message"]
        calls = list(message.pop("calls").values())
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
        message["refusal"] = None
    return choice
