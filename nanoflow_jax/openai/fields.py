"""Hands out the fields of a body, and refuses what nobody asked for."""

import difflib
from collections.abc import Mapping
from typing import Any

from nanoflow_jax.openai.errors import ApiError

NO_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "request_id",
    "cache_salt",
    "spaces_between_special_tokens",
    "reasoning_effort",
    "verbosity",
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
    "web_search_options": (),
    "continue_final_message": (False,),
    "use_beam_search": (False,),
}
_WHY = {"suffix": "the models here have no tokens to fill in a middle"}


class Fields:
    """The fields of a body; it knows which were never asked for."""

    def __init__(self, endpoint: str, body: Mapping[str, Any]) -> None:
        """Takes a body.

        Args:
            endpoint: Where it was sent, for messages.
            body: As it came out of JSON.
        """
        self.body = body
        self._endpoint = endpoint
        self._known = {*NO_EFFECT, *_NOT_YET}
        self._taken: set[str] = set()

    def take(self, name: str) -> Any:
        """The value of a field, None if it is null or not there."""
        self._known.add(name)
        self._taken.add(name)
        return self.body.get(name)

    def take_bool(self, name: str, *, default: bool = False) -> bool:
        """The value of a field that is true or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ApiError(f"{name}={value!r:.80} is not true or false", param=name)
        return value

    def take_optional_bool(self, name: str) -> bool | None:
        """The value of a field that is true, false or not given."""
        return None if self.take(name) is None else self.take_bool(name)

    def take_int(self, name: str, low: int, high: int) -> int | None:
        """The value of a field that is an integer within bounds, or not given."""
        value = self.take(name)
        if value is None:
            return None
        if not is_int(value) or not low <= value <= high:
            raise ApiError(
                f"{name}={value!r:.80} is not an integer from {low} to {high}", param=name
            )
        return int(value)

    def check_all_taken(self) -> None:
        """Refuses fields that nobody asked for, and those that we cannot serve yet."""
        for name, value in self.body.items():
            if name in self._taken:
                continue
            if name in _NOT_YET and value is not None and not _asks_nothing(name, value):
                raise unsupported(name)
            if name not in self._known:
                close = difflib.get_close_matches(name[:80], sorted(self._known), n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ApiError(
                    f"{name!r:.80} is no field of {self._endpoint}{hint}",
                    param=name[:80],
                    code="unknown_parameter",
                )


def _asks_nothing(name: str, value: Any) -> bool:
    # 0 equals False, but is no way to say it.
    return any(type(value) is type(known) and value == known for known in _NOT_YET[name])


def unsupported(name: str) -> ApiError:
    """What a request for something that we cannot do is told."""
    why = f": {_WHY[name]}" if name in _WHY else " yet"
    return ApiError(
        f"{name} is not supported{why}; leave it out", param=name, code="unsupported_parameter"
    )


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)
