"""Shapes of models by what a user calls them: a folder, or a preset's name."""

import pathlib
from collections.abc import Mapping
from typing import Any

from checkpoints import folder as checkpoint_folder
from nanoflow_jax import json_fields
from nanoflow_jax.models import architecture, huggingface, presets


def read(name: str | None) -> tuple[str, architecture.ModelConfig]:
    """A model's short name and shape; no weights need be there.

    Args:
        name: What --model says: a preset, a folder, or a `config.json`.

    Raises:
        ValueError: It is neither, or the folder has no model that is supported.
    """
    known = ", ".join(presets.names())
    if not name:
        raise ValueError(f"--model names the model to work it out for: a folder, or one of {known}")
    short = presets.try_find(name)
    if short is not None:
        return short, huggingface.read_config(presets.load(short))
    config = pathlib.Path(name)
    if config.is_dir() and (config / "config.json").is_file():
        config /= "config.json"
    if config.is_file():
        return name, huggingface.read_config(_parsed(config))
    if not config.is_dir():
        raise ValueError(
            f"--model={name} is neither a folder, nor a config.json, nor one of {known}"
        )
    opened = checkpoint_folder.ModelFolder.open(pathlib.Path(name))
    return name, huggingface.read_config(opened.config)


def _parsed(path: pathlib.Path) -> Mapping[str, Any]:
    """What a `config.json` says.

    Raises:
        ValueError: It cannot be read, or is none.
    """
    try:
        found = json_fields.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: {reason}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is {type(found).__name__} in JSON; wanted an object")
    return found
