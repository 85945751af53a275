"""Shapes of well-known models by name: for benchmarks and searches that need no download."""

import json
from importlib import resources
from typing import Any

PREFIX = "preset:"
_FOLDER = "preset_configs"


def names() -> list[str]:
    """Every preset's name."""
    files = resources.files("nanoflow_jax.models").joinpath(_FOLDER).iterdir()
    return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))


def try_find(name: str) -> str | None:
    """The preset that is meant by its name, with `preset:` before it or without; None if none."""
    short = name.removeprefix(PREFIX)
    return short if short in names() else None


def load(name: str) -> dict[str, Any]:
    """A preset's config in Hugging Face's form.

    Raises:
        ValueError: There is no preset of that name.
    """
    if name not in names():
        raise ValueError(f"preset:{name} is unknown; presets are {', '.join(names())}")
    path = resources.files("nanoflow_jax.models").joinpath(_FOLDER, f"{name}.json")
    config: dict[str, Any] = json.loads(path.read_text())
    return config
