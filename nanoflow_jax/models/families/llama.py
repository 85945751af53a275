"""Llama 2, 3 and 3.1 onward: the body as it is, with optional biases and rope scaling."""

from nanoflow_jax.models import architecture, config_reader, weight_map

ARCHITECTURES = ("LlamaForCausalLM",)


def read(r: config_reader.ConfigReader) -> architecture.ModelConfig:
    """The model that a Llama config.json describes."""
    bias = r.flag("attention_bias")
    return config_reader.standard_config(
        r, family="llama", qkv_bias=bias, o_bias=bias, mlp_bias=r.flag("mlp_bias")
    )


def weights(config: architecture.ModelConfig) -> weight_map.WeightMap:
    """Llama's names are the standard ones."""
    return weight_map.standard_map(config)
