import json
import re

import numpy as np
import pytest
from golden import cases

from checkpoints.folder import ModelFolder
from nanoflow_jax.models import huggingface, transformer, weight_map

_SHAPES = {"a.weight": (2, 3), "b.weight": (4,)}
_WEIGHTS = {name: weight_map.single(name, shape) for name, shape in _SHAPES.items()}


def _raises(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def _tiny(**more):
    return huggingface.read_config(
        {
            "num_hidden_layers": 1,
            "hidden_size": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 2,
            "intermediate_size": 5,
            "vocab_size": 7,
            "max_position_embeddings": 16,
            **more,
        }
    )


def _numbered(shapes):
    """Tensors in which every element has another value."""
    start, tensors = 0, []
    for shape in shapes:
        size = int(np.prod(shape))
        tensors.append(np.arange(start, start + size).reshape(shape))
        start += size
    return tensors


@pytest.mark.parametrize("case", cases.CASES)
def test_every_golden_folder_is_complete_and_fills_exactly_the_models_weights(case):
    path = cases.load(case).path
    config = huggingface.read_config(json.loads((path / "config.json").read_text()))
    weights = huggingface.weights_of(config)
    found = {name: tuple(info.shape) for name, info in ModelFolder.open(path).tensors.items()}
    weight_map.check_complete(found, weights, tied_embeddings=config.tied_embeddings)
    specs = {spec.name: spec.shape for spec in transformer.parameter_specs(config)}
    assert set(specs) == set(weights)
    for name, source in weights.items():
        made = source.assemble([np.zeros(shape, np.int8) for shape in source.shapes.values()])
        assert made.shape == specs[name], name


def test_queries_keys_and_values_are_grouped_by_kv_head():
    config = _tiny(architectures=["LlamaForCausalLM"], attention_bias=True)
    weights = huggingface.weights_of(config)
    for name in ("layers.0.qkv", "layers.0.qkv_bias"):
        source = weights[name]
        assert [key.split(".")[-2] for key in source.shapes] == ["q_proj", "k_proj", "v_proj"]
        q, k, v = tensors = _numbered(source.shapes.values())
        made = source.assemble(tensors)
        # Query head n reads kv head n // 2; heads are 2 wide.
        np.testing.assert_array_equal(made[0, 0], q[0:2])
        np.testing.assert_array_equal(made[0, 1], q[2:4])
        np.testing.assert_array_equal(made[1, 0], q[4:6])
        np.testing.assert_array_equal(made[0, 2], k[0:2])
        np.testing.assert_array_equal(made[1, 2], k[2:4])
        np.testing.assert_array_equal(made[1, 3], v[2:4])


def test_gate_comes_before_up():
    source = huggingface.weights_of(_tiny(architectures=["LlamaForCausalLM"]))["layers.0.gate_up"]
    assert [name.split(".")[-2] for name in source.shapes] == ["gate_proj", "up_proj"]
    gate, up = _numbered(source.shapes.values())
    np.testing.assert_array_equal(source.assemble([gate, up]), [gate, up])


def test_experts_are_stacked_with_their_gate_before_their_up():
    config = _tiny(architectures=["MixtralForCausalLM"], num_local_experts=3, num_experts_per_tok=2)
    weights = huggingface.weights_of(config)
    both = weights["layers.0.experts_gate_up"]
    prefix = "model.layers.0.block_sparse_moe.experts"
    assert list(both.shapes)[:3] == [
        f"{prefix}.0.w1.weight",
        f"{prefix}.0.w3.weight",
        f"{prefix}.1.w1.weight",
    ]
    tensors = _numbered(both.shapes.values())
    made = both.assemble(tensors)
    assert made.shape == (3, 2, 5, 6)
    np.testing.assert_array_equal(made[1, 0], tensors[2])
    np.testing.assert_array_equal(made[1, 1], tensors[3])
    downs = weights["layers.0.experts_down"]
    assert list(downs.shapes)[2] == f"{prefix}.2.w2.weight"
    assert downs.assemble(_numbered(downs.shapes.values())).shape == (3, 6, 5)


def test_gemma2_norms_stand_where_they_are_used():
    weights = huggingface.weights_of(_tiny(architectures=["Gemma2ForCausalLM"]))
    names = {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
    }
    for ours, theirs in names.items():
        assert list(weights[f"layers.0.{ours}"].shapes) == [f"model.layers.0.{theirs}.weight"]


def test_a_complete_folder_passes_with_derived_buffers_beside_it():
    found = _SHAPES | {"layers.0.rotary_emb.inv_freq": (4,), "x.masked_bias": ()}
    weight_map.check_complete(found, _WEIGHTS, tied_embeddings=False)


def test_a_stored_head_is_spare_only_where_embeddings_are_tied():
    found = _SHAPES | {"lm_head.weight": (9, 3)}
    weight_map.check_complete(found, _WEIGHTS, tied_embeddings=True)
    with _raises(
        "config.json has no place for lm_head.weight: ignoring weights would change the result; "
        "the weights belong to another model or family"
    ):
        weight_map.check_complete(found, _WEIGHTS, tied_embeddings=False)


def test_a_missing_tensor_is_named():
    with _raises(
        "the folder lacks b.weight: the download is incomplete or config.json belongs to "
        "another model"
    ):
        weight_map.check_complete({"a.weight": (2, 3)}, _WEIGHTS, tied_embeddings=False)


def test_a_tensor_of_another_shape_is_named_with_both_shapes():
    with _raises(
        "tensor b.weight has shape (5,), but config.json asks for (4,): the weights belong to "
        "another model"
    ):
        weight_map.check_complete(_SHAPES | {"b.weight": (5,)}, _WEIGHTS, tied_embeddings=False)


def test_many_tensors_are_named_by_the_first_three():
    weights = {f"t{i}": weight_map.single(f"t{i}", (1,)) for i in range(5)}
    with _raises(
        "the folder lacks t0, t1, t2 and 2 more tensors: the download is incomplete or "
        "config.json belongs to another model"
    ):
        weight_map.check_complete({}, weights, tied_embeddings=False)


def test_a_tensor_without_a_place_is_named():
    with _raises(
        "config.json has no place for c.bias: ignoring weights would change the result; the "
        "weights belong to another model or family"
    ):
        weight_map.check_complete(_SHAPES | {"c.bias": (1,)}, _WEIGHTS, tied_embeddings=False)
