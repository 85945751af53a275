"""The model that knobs name: a folder, a preset or the embedded one; its dtype and its weights."""

import dataclasses
import hashlib
import logging
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints import folder as checkpoint_folder
from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import programs
from nanoflow_jax.models import architecture, huggingface, loading, presets, transformer
from nanoflow_jax.parallel import placement as placement_lib

_LOG = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """An opened model, weights not read yet.

    Attributes:
        config: Its shape.
        folder: Where it came from; None for a preset.
        eos_ids: End-of-text tokens of both config files.
        stored_dtype: Number format of the checkpoint.
    """

    config: architecture.ModelConfig
    folder: checkpoint_folder.ModelFolder | None
    eos_ids: frozenset[int]
    stored_dtype: str


def embedded_folder() -> pathlib.Path:
    """The small model that comes with the package."""
    return pathlib.Path(str(resources.files("checkpoints"))) / "embedded"


def _download_advice(name: str) -> str:
    if _HUB_NAME.fullmatch(name) is None:
        return "; give the path of a model folder, or a name as on Hugging Face: OWNER/MODEL"
    folder = name.split("/")[-1]
    return (
        ". To download a model from Hugging Face:\n"
        f"  pip install huggingface_hub && hf download {name} --local-dir {folder}\n"
        f"then use --model={folder}"
    )


def open_model(section: config_lib.ModelSection) -> ModelSource:
    """Finds and checks the model that the knobs name, without reading weights.

    Raises:
        ValueError: It is no folder, not supported, damaged, or a preset without random weights.
    """
    name = section.model
    if name.startswith(presets.PREFIX):
        if not section.random_weights:
            raise ValueError(
                f"--model={name} is a shape without weights; add --random_weights, or name a folder"
            )
        raw = presets.load(name.removeprefix(presets.PREFIX))
        return ModelSource(
            config=huggingface.read_config(raw),
            folder=None,
            eos_ids=frozenset(),
            stored_dtype=_stored_dtype(raw),
        )
    path = pathlib.Path(name) if name else embedded_folder()
    if not path.is_dir():
        raise ValueError(f"--model={name} is no folder{_download_advice(name)}")
    folder = checkpoint_folder.ModelFolder.open(path)
    config = huggingface.read_config(folder.config)
    return ModelSource(
        config=config,
        folder=folder,
        eos_ids=_eos_ids(folder, config.vocab_size),
        stored_dtype=_stored_dtype(folder.config),
    )


def _eos_ids(folder: checkpoint_folder.ModelFolder, vocab_size: int) -> frozenset[int]:
    named = loading.eos_ids(folder.config, folder.generation_config)
    found = frozenset(token for token in named if token < vocab_size)
    if len(found) < len(named):
        _LOG.warning(
            "end-of-text ids %s of %s are outside the vocabulary of %d and are left out",
            sorted(set(named) - found),
            folder.path,
            vocab_size,
        )
    if len(found) > programs.MAX_EOS_IDS:
        raise ValueError(
            f"{folder.path} names {len(found)} end-of-text ids, more than {programs.MAX_EOS_IDS}; "
            "name fewer in generation_config.json and config.json"
        )
    return found


def _stored_dtype(raw: Mapping[str, Any]) -> str:
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32")


def run_dtype(choice: config_lib.Dtype, stored: str, platform: str) -> np.dtype[Any]:
    """The number format to run in.

    CPUs without bfloat16 products emulate them at a tenth of the speed, so auto means float32
    there; float16 checkpoints run as bfloat16, which has the range that float16 lacks.
    """
    if choice == config_lib.Dtype.AUTO:
        wide = platform == "cpu" or stored == "float32"
        choice = config_lib.Dtype.FLOAT32 if wide else config_lib.Dtype.BFLOAT16
    return np.dtype(jnp.float32 if choice == config_lib.Dtype.FLOAT32 else jnp.bfloat16)


def fingerprint(section: config_lib.ModelSection, source: ModelSource) -> str:
    """What tells a model from others, weights included."""
    if section.random_weights or source.folder is None:
        return hashlib.sha256(repr(source.config).encode()).hexdigest()
    return source.folder.fingerprint()


def context_len(section: config_lib.ModelSection, config: architecture.ModelConfig) -> int:
    """Most tokens of one request, prompt included.

    Raises:
        ValueError: More is asked for than the model has.
    """
    asked = section.max_context_len
    if asked > config.max_context_len:
        raise ValueError(
            f"--max_context_len={asked} is more than the model's {config.max_context_len}"
        )
    return asked or config.max_context_len


def load_weights(
    section: config_lib.ModelSection,
    source: ModelSource,
    dtype: np.dtype[Any],
    placement: placement_lib.Placement,
    progress: Callable[[loading.Progress], None],
) -> transformer.Transformer:
    """The model with its weights on its devices, random ones where they are asked for."""
    whole = [architecture.Span(0, source.config.num_layers)]
    [model] = load_spans(section, source, dtype, placement, progress, whole)
    return model


def load_spans(
    section: config_lib.ModelSection,
    source: ModelSource,
    dtype: np.dtype[Any],
    placement: placement_lib.Placement,
    progress: Callable[[loading.Progress], None],
    spans: Sequence[architecture.Span],
) -> list[transformer.Transformer]:
    """Some layers of it, as models of their own; see `loading.load_spans`."""
    if section.random_weights or source.folder is None:
        return loading.random_spans(
            source.config,
            spans,
            seed=section.weight_seed,
            dtype=dtype,
            placement=placement,
            progress=progress,
        )
    return loading.load_spans(
        source.folder, source.config, spans, dtype=dtype, placement=placement, progress=progress
    )
