import json
import re

import pytest
from golden import cases

from nanoflow_jax.models import architecture, huggingface

_SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}


def _config(name, **more):
    return {"architectures": [name], **_SIZES, **more}


def _read(name, **more):
    return huggingface.read_config(_config(name, **more))


def _raises(message):
    return pytest.raises(ValueError, match=re.escape(message))


def test_every_family_names_its_architecture():
    assert huggingface.supported_architectures() == {
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
        "MixtralForCausalLM": "mixtral",
        "Qwen3MoeForCausalLM": "qwen3_moe",
        "Gemma2ForCausalLM": "gemma2",
    }


@pytest.mark.parametrize("name", sorted(huggingface.supported_architectures()))
def test_sizes_are_read_and_silent_keys_take_the_defaults_of_transformers(name):
    config = _read(name)
    assert (config.num_layers, config.hidden_size, config.num_heads) == (4, 32, 4)
    assert (config.num_kv_heads, config.intermediate_size) == (2, 48)
    assert (config.vocab_size, config.max_context_len) == (99, 128)
    is_mixtral = name == "MixtralForCausalLM"
    assert config.norm_eps == (1e-5 if is_mixtral else 1e-6)
    assert config.rope == architecture.RopeConfig(theta=1e6 if is_mixtral else 1e4)
    head_dims = {"Qwen3ForCausalLM": 128, "Gemma2ForCausalLM": 256}
    assert config.head_dim == head_dims.get(name, 8)
    assert config.tied_embeddings == (name == "Gemma2ForCausalLM")
    assert config.qkv_bias == (name == "Qwen2ForCausalLM")
    assert config.qk_norm == name.startswith("Qwen3")
    assert (config.moe is not None) == ("Moe" in name or is_mixtral)
    assert config.family == huggingface.supported_architectures()[name]


@pytest.mark.parametrize("case", cases.CASES)
def test_every_golden_config_is_read(case):
    raw = json.loads((cases.load(case).path / "config.json").read_text())
    config = huggingface.read_config(raw)
    assert config.num_layers == raw["num_hidden_layers"]
    assert config.family == huggingface.supported_architectures()[raw["architectures"][0]]


@pytest.mark.parametrize(
    "names", [None, [], ["LlamaForCausalLM", "LlamaForCausalLM"], [3], "LlamaForCausalLM"]
)
def test_architectures_must_be_a_list_of_one_name(names):
    with _raises(f"config.json: architectures={names!r} is not a list of one name; supported: "):
        huggingface.read_config({"architectures": names})


def test_another_architecture_is_refused_by_name_with_the_supported_ones():
    with _raises(
        "architecture MambaForCausalLM is not supported; supported: Gemma2ForCausalLM, "
        "LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, Qwen2ForCausalLM, "
        "Qwen3ForCausalLM, Qwen3MoeForCausalLM"
    ):
        _read("MambaForCausalLM")


@pytest.mark.parametrize("name", sorted(huggingface.supported_architectures()))
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"bits": 4}),
        ("alibi", True),
        ("attention_multiplier", 0.5),
        ("num_nextn_predict_layers", 1),
        ("clip_qkv", 8.0),
    ],
)
def test_a_key_that_changes_the_result_is_refused_by_name(name, key, value):
    with _raises(f"config.json: {key}="):
        _read(name, **{key: value})


def test_a_missing_size_is_named():
    config = _config("LlamaForCausalLM")
    del config["vocab_size"]
    with _raises("config.json: vocab_size=None is not an integer of at least 1"):
        huggingface.read_config(config)


def test_llama_has_biases_when_the_config_says_so():
    plain = _read("LlamaForCausalLM")
    assert not (plain.qkv_bias or plain.o_bias or plain.mlp_bias)
    biased = _read("LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    assert biased.qkv_bias and biased.o_bias and biased.mlp_bias


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma2ForCausalLM"])
def test_attention_bias_is_on_all_four_projections(name):
    biased = _read(name, attention_bias=True)
    assert biased.qkv_bias and biased.o_bias


def test_mistral_windows_every_layer_unless_the_config_says_null():
    assert _read("MistralForCausalLM", sliding_window=16).windows == (16,) * 4
    assert _read("MistralForCausalLM").windows == (4096,) * 4
    assert _read("MistralForCausalLM", sliding_window=None).windows == (None,) * 4


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_windows_only_its_upper_layers_and_only_when_in_use(name):
    keys = {"sliding_window": 8, "max_window_layers": 3}
    assert _read(name, **keys).windows == (None,) * 4
    assert _read(name, use_sliding_window=True, **keys).windows == (None, None, None, 8)


def test_mixtral_experts_are_all_sparse_and_normalised():
    config = _read("MixtralForCausalLM", num_local_experts=5, num_experts_per_tok=3)
    assert config.moe == architecture.MoeConfig(
        num_experts=5,
        num_active=3,
        intermediate_size=48,
        normalise=True,
        sparse_layers=(True,) * 4,
    )
    assert config.windows == (None,) * 4
    assert _read("MixtralForCausalLM", sliding_window=6).windows == (6,) * 4


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_qwen3_moe_has_dense_layers_among_sparse_ones(key):
    config = _read(
        "Qwen3MoeForCausalLM",
        mlp_only_layers=[3],
        decoder_sparse_step=2,
        moe_intermediate_size=10,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        **{key: 6},
    )
    assert config.moe == architecture.MoeConfig(
        num_experts=6,
        num_active=2,
        intermediate_size=10,
        normalise=True,
        sparse_layers=(False, True, False, False),
    )


def test_qwen3_moe_windows_every_layer_when_in_use():
    keys = {"sliding_window": 8, "max_window_layers": 3}
    assert _read("Qwen3MoeForCausalLM", **keys).windows == (None,) * 4
    assert _read("Qwen3MoeForCausalLM", use_sliding_window=True, **keys).windows == (8,) * 4


def test_gemma2_takes_what_its_config_says():
    config = _read(
        "Gemma2ForCausalLM",
        head_dim=12,
        query_pre_attn_scalar=16,
        sliding_window=7,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=None,
        hidden_activation="silu",
    )
    assert config.query_scale == 0.25
    assert config.windows == (7, None, 7, None)
    assert (config.attention_softcap, config.logits_softcap) == (2.0, None)
    assert config.activation == architecture.Activation.SILU
    assert config.embedding_scale == 32**0.5
    assert (config.norm_offset, config.post_norms) == (1.0, True)


def test_gemma2_takes_transformers_defaults_where_its_config_is_silent():
    config = _read("Gemma2ForCausalLM")
    assert (config.attention_softcap, config.logits_softcap) == (50.0, 30.0)
    assert config.activation == architecture.Activation.GELU_TANH
    assert config.query_scale == 256**-0.5
    assert config.windows == (4096, None, 4096, None)


def test_layer_types_decide_over_the_pattern():
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    config = _read("Gemma2ForCausalLM", layer_types=kinds, sliding_window=5)
    assert config.windows == (None, None, 5, None)
    with _raises("config.json names a window for 2 layers, but the model has 4"):
        _read("Gemma2ForCausalLM", layer_types=kinds[:2])
