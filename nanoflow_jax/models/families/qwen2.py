"""Qwen2 and Qwen2.5: biases on queries, keys and values; windows in the upper layers if asked."""

from nanoflow_jax.models import architecture, config_reader, weight_map

ARCHITECTURES = ("Qwen2ForCausalLM",)


def read(r: config_reader.ConfigReader) -> architecture.ModelConfig:
    """The model that a Qwen2 config.json describes."""
    return config_reader.standard_config(
        r, family="qwen2", qkv_bias=True, windows=config_reader.qwen_windows(r)
    )


def weights(config: architecture.ModelConfig) -> weight_map.WeightMap:
    """Qwen2's names are the standard ones."""
    return weight_map.standard_map(config)
