"""From a Hugging Face config to a model: picks the family, refuses what none supports."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from nanoflow_jax.models import architecture, config_reader, weight_map
from nanoflow_jax.models.families import (
    gemma2,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)

FAMILIES: Mapping[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gemma2": gemma2,
}


def supported_architectures() -> dict[str, str]:
    """Architecture name in config.json to our family name."""
    return {name: family for family, m in FAMILIES.items() for name in m.ARCHITECTURES}


def read_config(config: Mapping[str, Any]) -> architecture.ModelConfig:
    """The model that a config.json describes.

    Args:
        config: The parsed file.

    Raises:
        ValueError: The architecture is not supported, or a key has a value (or a name) that
            would change the result and is not supported.
    """
    names = config.get("architectures")
    supported = supported_architectures()
    known = ", ".join(sorted(supported))
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(
            f"config.json: architectures={names!r} is not a list of one name; supported: {known}"
        )
    if names[0] not in supported:
        raise ValueError(f"architecture {names[0]} is not supported; supported: {known}")
    reader = config_reader.ConfigReader(config)
    return FAMILIES[supported[names[0]]].read(reader)


def weights_of(config: architecture.ModelConfig) -> weight_map.WeightMap:
    """Where each weight of a model comes from in a Hugging Face folder."""
    return FAMILIES[config.family].weights(config)
