"""Which model an end has, by what is in it, so that two ends can tell whether it is the same.

An end says the hashes of the parts that it holds: of two folders that differ in one weight, or of a
model and a fine-tune of it, the parts with other weights differ.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from checkpoints import content, conversion
from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import build, model_source
from nanoflow_jax.models import architecture, huggingface
from nanoflow_jax.split import messages
from nanoflow_jax.split import parts as parts_lib


def of(
    section: config_lib.ModelSection,
    source: model_source.ModelSource,
    dtype: np.dtype[Any],
    *,
    layers: Sequence[tuple[int, int]] | None = None,
    progress: conversion.Progress | None = None,
) -> messages.Identity:
    """The identity of an opened model, or of some of its layers.

    Weights are read and hashed, unless that was done before: hashes are kept in the user's cache.

    Args:
        section: How the model was named.
        source: The model.
        dtype: Of its hidden states.
        layers: Ranges [start, stop) that are held; None for all.
        progress: Called with the bytes hashed so far and in all.

    Raises:
        ValueError: A tensor of these layers is missing, or a file changed while it was read.
    """
    config, folder = source.config, source.folder
    names = part_names(config, layers)
    if section.random_weights or folder is None:
        made = f"{config!r} of seed {section.weight_seed}"
        found = {name: _hash(f"{name} of {made}".encode()) for name in names}
    else:
        tensors = part_tensors(config, names)
        parts = {name: content.Part(folder, tensors[name]) for name in names}
        cache = build.cache_folder("hashes")
        found = content.hashes(folder, parts, cache=cache, progress=progress)
    tokenizer = None if folder is None else folder.text_file("tokenizer.json")
    return messages.Identity(
        model=section.model or "embedded",
        parts=tuple((name, found[name]) for name in names),
        config_sha256=_hash(repr(config).encode()),
        tokenizer_sha256=_hash(b"" if tokenizer is None else pathlib.Path(tokenizer).read_bytes()),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        hidden_dtype="float32" if dtype == np.float32 else "bfloat16",
    )


def part_names(
    config: architecture.ModelConfig, layers: Sequence[tuple[int, int]] | None = None
) -> tuple[str, ...]:
    """The parts that some layers of a model need; None for all layers."""
    return parts_lib.of_layers(
        [(0, config.num_layers)] if layers is None else layers,
        num_layers=config.num_layers,
        tied_embeddings=config.tied_embeddings,
    )


def part_tensors(config: architecture.ModelConfig, names: Iterable[str]) -> dict[str, list[str]]:
    """The tensors of a Hugging Face folder that some parts are made of."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for weight, source in huggingface.weights_of(config).items():
        if _part_of(weight) in found:
            found[_part_of(weight)] += source.shapes
    return found


def _part_of(weight: str) -> str:
    first, _, rest = weight.partition(".")
    if first == "layers":
        return parts_lib.layer_name(int(rest.partition(".")[0]))
    return parts_lib.EMBEDDING if first == "embedding" else parts_lib.HEAD


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
