"""Shapes of models by what a user calls them: a folder, or a preset's name."""

import pathlib

from checkpoints import folder as checkpoint_folder
from nanoflow_jax.models import architecture, huggingface, presets


def read(name: str | None) -> tuple[str, architecture.ModelConfig]:
    """A model's short name and shape.

    Args:
        name: What --model says.

    Raises:
        ValueError: It is neither, or the folder has no model that is supported.
    """
    known = ", ".join(presets.names())
    if not name:
        raise ValueError(f"--model names the model to work it out for: a folder, or one of {known}")
    short = presets.try_find(name)
    if short is not None:
        return short, huggingface.read_config(presets.load(short))
    if not pathlib.Path(name).is_dir():
        raise ValueError(f"--model={name} is neither a folder nor one of {known}")
    opened = checkpoint_folder.ModelFolder.open(pathlib.Path(name))
    return name, huggingface.read_config(opened.config)
