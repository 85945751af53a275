"""Gemma 2: soft-caps, windows in every other layer, norms before and after, scaled embeddings."""

import math

from nanoflow_jax.models import architecture, config_reader, weight_map

ARCHITECTURES = ("Gemma2ForCausalLM",)


def read(r: config_reader.ConfigReader) -> architecture.ModelConfig:
    """The model that a Gemma 2 config.json describes."""
    num_layers = r.integer("num_hidden_layers")
    window = r.integer("sliding_window", 4096)
    kinds = r.names("layer_types")
    if kinds is None:
        windows = tuple(None if layer % 2 else window for layer in range(num_layers))
    else:
        windows = config_reader.windows_of(kinds, window)
    bias = r.flag("attention_bias")
    r.ignore("use_bidirectional_attention")
    return config_reader.standard_config(
        r,
        family="gemma2",
        qkv_bias=bias,
        o_bias=bias,
        windows=windows,
        activation=r.activation(
            "hidden_act", "hidden_activation", default=architecture.Activation.GELU_TANH
        ),
        query_scale=r.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=r.optional_number("attn_logit_softcapping", 50.0),
        logits_softcap=r.optional_number("final_logit_softcapping", 30.0),
        norm_offset=1.0,
        post_norms=True,
        embedding_scale=math.sqrt(r.integer("hidden_size")),
        default_head_dim=256,
        default_tied=True,
    )


def weights(config: architecture.ModelConfig) -> weight_map.WeightMap:
    """Standard names, with two norms more; what Llama calls post_attention comes after."""
    found = weight_map.standard_map(config)
    shape = (config.hidden_size,)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for name, stored in (
            ("attention_post_norm", "post_attention_layernorm"),
            ("feed_forward_norm", "pre_feedforward_layernorm"),
            ("feed_forward_post_norm", "post_feedforward_layernorm"),
        ):
            found[f"{ours}.{name}"] = weight_map.single(f"{theirs}.{stored}.weight", shape)
    return found
