"""A model with one token that is no number."""

import pathlib
import shutil

import numpy as np

from checkpoints import safetensors_file
from checkpoints.folder import ModelFolder


def copy_with_nan(source: pathlib.Path, folder: pathlib.Path, *, token: int) -> pathlib.Path:
    """Copies a model whose head is not its embedding; one row of the latter becomes NaN."""
    shutil.copytree(source, folder)
    opened = ModelFolder.open(source)
    tensors = {name: np.array(opened.read(name)) for name in opened.tensors}
    assert "lm_head.weight" in tensors
    tensors["model.embed_tokens.weight"][token] = np.nan
    safetensors_file.write_safetensors(folder / "model.safetensors", tensors)
    return folder
