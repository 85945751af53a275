"""Reads the small JSON files beside a model's tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"


def read_text(path: Path) -> str | None:
    """The text of a file; None if there is no such file.

    Raises:
        ValueError: The file is not UTF-8.
    """
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); download it again") from error


def read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file; an empty one if there is no such file.

    Raises:
        ValueError: The file does not hold a JSON object.
    """
    text = read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object; download it again")
    return value


def special_tokens(folder: Path) -> dict[str, str]:
    """The named special tokens of a tokenizer, such as bos_token, as text.

    Both files name them, as plain text or as an object with a `content`;
    tokenizer_config.json wins.
    """
    named: dict[str, str] = {}
    for name in (SPECIAL_TOKENS_FILE, CONFIG_FILE):
        for key, value in read_object(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if not key.endswith("_token"):
                continue
            if isinstance(text, str):
                named[key] = text
            elif value is None:
                named.pop(key, None)
    return named
