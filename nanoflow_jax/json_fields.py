"""Reads objects of JSON files strictly: what is missing, of another type or unknown is said."""

import json
from collections.abc import Mapping
from typing import Any

_KINDS: Mapping[type, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def parse(text: str) -> Any:
    """What a text in JSON says.

    Raises:
        ValueError: It is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("lists or objects in it are nested too deeply") from None


class Fields:
    """One JSON object, whose fields are taken out one by one."""

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"{where} is {content!r}; wanted an object")
        self._left: dict[str, Any] = dict(content)
        self._where = where

    def take(self, name: str, kind: type, default: object = None) -> Any:
        """The value of a field, of exactly this type; without a default it must be there.

        Where a float is wanted an integer will do.
        """
        where = f"{self._where}.{name}"
        if name not in self._left:
            if default is None:
                raise ValueError(f"{where} is missing; wanted {_KINDS[kind]}")
            return default
        return _checked(self._left.pop(name), kind, where)

    def take_list(self, name: str, kind: type, default: object = None) -> tuple[Any, ...]:
        """The same for a list of values of one type."""
        values = self.take(name, list, default)
        return tuple(
            _checked(value, kind, f"{self._where}.{name}[{i}]") for i, value in enumerate(values)
        )

    def has(self, name: str) -> bool:
        return name in self._left

    @property
    def where(self) -> str:
        return self._where

    def finish(self) -> None:
        """Refuses what nobody took."""
        if self._left:
            raise ValueError(
                f"{self._where} has unknown fields {', '.join(map(repr, self._left))}; remove them"
            )


def _checked(value: object, kind: type, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # a bool is an int to isinstance
        raise ValueError(f"{where} is {value!r}; wanted {_KINDS[kind]}")
    return value
