"""Reads workload files: named mixes of requests as token ids and output lengths."""

import dataclasses
import json
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkRequest:
    """One request of a workload: what goes in and how many tokens must come out."""

    prompt_ids: tuple[int, ...]
    output_len: int


def load(path: pathlib.Path) -> dict[str, tuple[WorkRequest, ...]]:
    """The mixes of a workload file.

    Args:
        path: JSON: a mix's name to one request or a list of them, each
            `{"prompt": [token ids], "out": tokens to generate}`.

    Raises:
        ValueError: The file is missing, no JSON, or of another form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--workload={path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"--workload={path} is not an object from names to requests")
    return {name: _mix(name, value) for name, value in content.items()}


def _mix(name: str, value: Any) -> tuple[WorkRequest, ...]:
    entries = value if isinstance(value, list) else [value]
    return tuple(_request(f"{name}[{i}]", entry) for i, entry in enumerate(entries))


def _request(place: str, entry: Any) -> WorkRequest:
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    out = entry.get("out") if isinstance(entry, dict) else None
    is_list = isinstance(prompt, list) and all(type(t) is int for t in prompt)
    if not is_list or not prompt or type(out) is not int or out < 1:
        raise ValueError(f'workload entry {place} is not {{"prompt": [token ids], "out": tokens}}')
    return WorkRequest(prompt_ids=tuple(prompt), output_len=out)
