"""What identifies a model for a batch job, found without reading weights."""

import hashlib
from pathlib import Path

import jax

from checkpoints import text_files
from nanoflow_jax import config as config_lib
from nanoflow_jax.batch import record
from nanoflow_jax.engine import model_source


def of_model(
    section: config_lib.ModelSection, model: model_source.ModelSource
) -> record.ModelIdentity:
    """All of a model that the answers of a job depend on.

    Args:
        section: The model's knobs.
        model: The opened model.
    """
    is_auto = section.dtype == config_lib.Dtype.AUTO
    return record.ModelIdentity(
        name=model_name(section),
        model=_model(section, model),
        tokenizer=_texts(model),
        dtype=f"auto on {jax.default_backend()}" if is_auto else str(section.dtype),
        max_context_len=section.max_context_len,
    )


def model_name(section: config_lib.ModelSection) -> str:
    """What answers call the model."""
    if not section.model:
        return "embedded"
    if section.random_weights:
        return section.model
    return Path(section.model).resolve().name


def _model(section: config_lib.ModelSection, model: model_source.ModelSource) -> str:
    if section.random_weights or model.folder is None:
        digest = hashlib.sha256(repr(model.config).encode()).hexdigest()
        return f"random weights with seed {section.weight_seed} for config {digest[:16]}"
    num_bytes = sum(spec.nbytes for spec in model.folder.tensors.values())
    return f"{num_bytes} bytes of weights with fingerprint {model.folder.fingerprint()[:32]}"


def _texts(model: model_source.ModelSource) -> str:
    if model.folder is None:
        return "none"
    digest = hashlib.sha256()
    for name in text_files.present(model.folder.path):
        path = model.folder.path / name
        if name != "config.json":  # the folder's fingerprint has that one
            digest.update(f"{name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
