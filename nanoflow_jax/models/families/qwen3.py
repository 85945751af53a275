"""Qwen3: norms on each query and key head, explicit head width."""

from nanoflow_jax.models import architecture, config_reader, weight_map

ARCHITECTURES = ("Qwen3ForCausalLM",)


def read(r: config_reader.ConfigReader) -> architecture.ModelConfig:
    """The model that a Qwen3 config.json describes."""
    bias = r.flag("attention_bias")
    return config_reader.standard_config(
        r,
        family="qwen3",
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        windows=config_reader.qwen_windows(r),
        default_head_dim=128,
    )


def weights(config: architecture.ModelConfig) -> weight_map.WeightMap:
    """Qwen3's names are the standard ones."""
    return weight_map.standard_map(config)
