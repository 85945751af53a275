"""Qwen3-MoE: Qwen3's attention, sparse feed-forwards with dense ones among them."""

from nanoflow_jax.models import architecture, config_reader, weight_map

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def read(r: config_reader.ConfigReader) -> architecture.ModelConfig:
    """The model that a Qwen3-MoE config.json describes."""
    num_layers = r.integer("num_hidden_layers")
    dense = r.integers("mlp_only_layers")
    step = r.integer("decoder_sparse_step", 1)
    # transformers 4 wrote num_experts, 5 writes num_local_experts.
    moe = architecture.MoeConfig(
        num_experts=r.integer("num_experts", r.integer("num_local_experts", 128)),
        num_active=r.integer("num_experts_per_tok", 8),
        intermediate_size=r.integer("moe_intermediate_size", 768),
        normalise=r.flag("norm_topk_prob"),
        sparse_layers=tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)
        ),
    )
    bias = r.flag("attention_bias")
    window = r.optional_integer("sliding_window") if r.flag("use_sliding_window") else None
    r.ignore("sliding_window", "max_window_layers")
    return config_reader.standard_config(
        r,
        family="qwen3_moe",
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        window=window,
        moe=moe,
    )


def weights(config: architecture.ModelConfig) -> weight_map.WeightMap:
    """Standard names outside the experts."""
    found = weight_map.standard_map(config)
    for layer in range(config.num_layers):
        if not config.is_sparse(layer):
            continue
        prefix = f"model.layers.{layer}.mlp"
        found |= weight_map.experts(
            config,
            layer,
            router=f"{prefix}.gate.weight",
            expert=f"{prefix}.experts.{{}}",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
        )
    return found
