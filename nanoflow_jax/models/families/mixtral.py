"""Mixtral: every feed-forward is sparse, the chosen experts' shares are normalised."""

from nanoflow_jax.models import architecture, config_reader, weight_map

ARCHITECTURES = ("MixtralForCausalLM",)


def read(r: config_reader.ConfigReader) -> architecture.ModelConfig:
    """The model that a Mixtral config.json describes."""
    num_layers = r.integer("num_hidden_layers")
    moe = architecture.MoeConfig(
        num_experts=r.integer("num_local_experts", 8),
        num_active=r.integer("num_experts_per_tok", 2),
        intermediate_size=r.integer("intermediate_size"),
        normalise=True,
        sparse_layers=(True,) * num_layers,
    )
    window = r.optional_integer("sliding_window")
    return config_reader.standard_config(
        r,
        family="mixtral",
        window=window,
        moe=moe,
        default_theta=1e6,
        default_norm_eps=1e-5,
    )


def weights(config: architecture.ModelConfig) -> weight_map.WeightMap:
    """Standard names outside the experts."""
    found = weight_map.standard_map(config)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        found |= weight_map.experts(
            config,
            layer,
            router=f"{prefix}.gate.weight",
            expert=f"{prefix}.experts.{{}}",
            gate="w1",
            up="w3",
            down="w2",
        )
    return found
