"""Mistral: Llama's body with a sliding window in every layer when the config names one."""

from nanoflow_jax.models import architecture, config_reader, weight_map

ARCHITECTURES = ("MistralForCausalLM",)


def read(r: config_reader.ConfigReader) -> architecture.ModelConfig:
    """The model that a Mistral config.json describes."""
    window = r.optional_integer("sliding_window", 4096)
    return config_reader.standard_config(r, family="mistral", window=window)


def weights(config: architecture.ModelConfig) -> weight_map.WeightMap:
    """Mistral's names are the standard ones."""
    return weight_map.standard_map(config)
