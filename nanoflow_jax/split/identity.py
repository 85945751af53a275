"""Which model an end has, so that two ends can tell whether it is the same."""

import hashlib
import pathlib
from typing import Any

import numpy as np

from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import model_source
from nanoflow_jax.split import messages


def of(
    section: config_lib.ModelSection, source: model_source.ModelSource, dtype: np.dtype[Any]
) -> messages.Identity:
    """The identity of an opened model.

    Of weights it has names, sizes and header hashes of the files, as a batch job's record: they
    are not read.

    Args:
        section: How the model was named.
        source: The model.
        dtype: Of its hidden states.
    """
    config, folder = source.config, source.folder
    weights = model_source.fingerprint(section, source)
    if section.random_weights:
        weights += f" of seed {section.weight_seed}"
    tokenizer = None if folder is None else folder.text_file("tokenizer.json")
    return messages.Identity(
        model=section.model or "embedded",
        manifest_sha256=_hash(weights.encode()),
        config_sha256=_hash(repr(config).encode()),
        tokenizer_sha256=_hash(b"" if tokenizer is None else pathlib.Path(tokenizer).read_bytes()),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        hidden_dtype="float32" if dtype == np.float32 else "bfloat16",
    )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
