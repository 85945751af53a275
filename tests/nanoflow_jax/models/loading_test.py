import dataclasses
import itertools
import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import random_folder
from flax import nnx
from golden import cases
from plain_model import load_whole

from checkpoints import safetensors_file
from checkpoints.folder import ModelFolder
from nanoflow_jax.models import architecture, huggingface, loading, presets, transformer

_FLOAT32 = np.dtype(np.float32)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def folder():
    return ModelFolder.open(cases.load("llama_bias").path)


@pytest.fixture(scope="module")
def config(folder):
    return huggingface.read_config(folder.config)


@pytest.fixture
def placement(config):
    return loading.place_model(config, jax.devices()[:1])


def _random(config, **how):
    [model] = loading.random_spans(config, [architecture.Span(0, config.num_layers)], **how)
    return model


def _leaves(model):
    return jax.tree.leaves(nnx.state(model))


def test_a_loaded_model_has_the_folders_tensors(folder, config, placement):
    model = load_whole(folder, config, dtype=_FLOAT32, placement=placement)
    np.testing.assert_array_equal(model.embedding[...], folder.read("model.embed_tokens.weight"))
    np.testing.assert_array_equal(model.head_weight[...], folder.read("lm_head.weight"))
    attention = model.layers[1].attention
    q, k, v = (folder.read(f"model.layers.1.self_attn.{n}_proj.weight") for n in "qkv")
    stored = np.asarray(attention.qkv[...])
    np.testing.assert_array_equal(stored[:, :-2].reshape(q.shape), q)
    np.testing.assert_array_equal(stored[:, -2].reshape(k.shape), k)
    np.testing.assert_array_equal(stored[:, -1].reshape(v.shape), v)
    np.testing.assert_array_equal(
        model.layers[0].feed_forward.down_bias[...],
        folder.read("model.layers.0.mlp.down_proj.bias"),
    )


def test_weights_are_cast_to_the_run_dtype(folder, config, placement):
    model = load_whole(folder, config, dtype=_BFLOAT16, placement=placement)
    assert {leaf.dtype for leaf in _leaves(model)} == {_BFLOAT16}
    wanted = folder.read("model.norm.weight").astype(_BFLOAT16)
    np.testing.assert_array_equal(model.norm.weight[...], wanted)


def test_progress_counts_every_byte(folder, config, placement):
    seen = []
    load_whole(folder, config, dtype=_BFLOAT16, placement=placement, progress=seen.append)
    total = loading.model_bytes(config, _BFLOAT16)
    sizes = [math.prod(spec.shape) for spec in transformer.parameter_specs(config)]
    assert total == 2 * sum(sizes) == loading.model_bytes(config, _FLOAT32) // 2
    assert [p.done_bytes for p in seen] == [2 * n for n in itertools.accumulate(sizes)]
    assert {p.total_bytes for p in seen} == {total}
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(seen))


def test_a_folder_of_another_shape_is_refused_before_anything_is_read(folder, config, placement):
    wrong = dataclasses.replace(config, vocab_size=config.vocab_size + 1)
    seen = []
    message = "has shape (311, 32), but config.json asks for (312, 32)"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_whole(folder, wrong, dtype=_FLOAT32, placement=placement, progress=seen.append)
    assert not seen


def test_random_weights_follow_from_seed_and_name_alone(config, placement):
    def draw(changed, seed=3):
        return _random(changed, seed=seed, dtype=_FLOAT32, placement=placement)

    fewer = dataclasses.replace(config, num_layers=1, windows=(None,))
    first, again, other = draw(config), draw(fewer), draw(fewer, seed=4)
    lower = jax.tree.leaves(nnx.state(first.layers[0]))
    for a, b in zip(lower, jax.tree.leaves(nnx.state(again.layers[0])), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.embedding[...], again.embedding[...])
    assert not np.array_equal(first.embedding[...], other.embedding[...])
    up = first.layers[0].feed_forward.gate_up[...]
    assert not np.array_equal(up, first.layers[1].feed_forward.gate_up[...])


def test_random_weights_have_the_spread_of_their_specs(config, placement):
    model = _random(config, seed=0, dtype=_FLOAT32, placement=placement)
    embedding = np.asarray(model.embedding[...])
    assert embedding.mean() == pytest.approx(0.0, abs=1e-3)
    assert embedding.std() == pytest.approx(0.02, rel=0.05)
    np.testing.assert_array_equal(model.norm.weight[...], np.ones(config.hidden_size))


def test_random_norms_of_a_family_that_stores_an_offset_are_neutral(placement):
    raw = ModelFolder.open(cases.load("gemma2").path).config
    config = huggingface.read_config(raw)
    model = _random(config, seed=0, dtype=_FLOAT32, placement=placement)
    np.testing.assert_array_equal(model.norm.weight[...], np.zeros(config.hidden_size))


def test_weights_lie_on_the_devices_they_were_asked_for(config):
    devices = jax.devices()[:2]
    placement = loading.place_model(config, devices)
    model = _random(config, seed=0, dtype=_FLOAT32, placement=placement)
    shards = model.layers[0].attention.qkv[...].addressable_shards
    assert [shard.device for shard in shards] == devices
    assert {shard.data.shape[0] for shard in shards} == {config.num_kv_heads // 2}


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({"eos_token_id": 2}, None, {2}),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 2]}, {2, 3}),
        ({"eos_token_id": None}, {"eos_token_id": 4}, {4}),
        ({}, {}, set()),
    ],
)
def test_end_of_text_ids_come_from_both_files(config, generation, wanted):
    assert loading.eos_ids(config, generation) == wanted


@pytest.mark.parametrize("ids", ["</s>", -1, True, [1, 2.0], [[1]]])
def test_an_end_of_text_id_of_another_kind_is_refused_with_its_file(ids):
    for config, generation, name in (
        ({"eos_token_id": ids}, None, "config.json"),
        ({}, {"eos_token_id": ids}, "generation_config.json"),
    ):
        message = f"{name}: eos_token_id={ids!r} is not a token id or a list of them"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            loading.eos_ids(config, generation)


def test_a_truncated_folder_is_refused(tmp_path, folder, config, placement):
    tensors = {name: np.array(folder.read(name)) for name in folder.tensors}
    del tensors["model.norm.weight"]
    (tmp_path / "config.json").write_bytes((folder.path / "config.json").read_bytes())
    safetensors_file.write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"the folder lacks model\.norm\.weight"):
        load_whole(ModelFolder.open(tmp_path), config, dtype=_FLOAT32, placement=placement)


@pytest.mark.parametrize(
    ("preset", "count", "split_experts", "wanted"),
    [
        ("llama-3-8b", 1, False, (32, 8, 14336, None)),
        ("llama-3-70b", 8, False, (8, 1, 3584, None)),
        ("qwen3-30b-a3b", 8, False, (4, 1, 768, 96)),  # 4 kv heads, each on two devices
        ("mixtral-8x7b", 4, True, (8, 2, 3584, 14336)),
    ],
)
def test_a_device_has_its_share_of_heads_and_widths(preset, count, split_experts, wanted):
    read = huggingface.read_config(presets.load(preset))
    placement = loading.place_model(read, jax.devices()[:count], split_experts=split_experts)
    share = loading.share_of_one_device(read, placement)
    expert = share.moe and share.moe.intermediate_size
    found = (share.num_heads, share.num_kv_heads, share.intermediate_size, expert)
    assert found == wanted
    assert (share.hidden_size, share.windows) == (read.hidden_size, read.windows)


@pytest.mark.parametrize("tied", [False, True])
def test_some_layers_are_loaded_without_the_others(tmp_path, placement, tied):
    """From a folder that has no more than they need: what an end of the model needs is there."""
    path = random_folder.write(
        tmp_path / "whole", seed=1, num_hidden_layers=4, tie_word_embeddings=tied
    )
    whole = ModelFolder.open(path)
    config = huggingface.read_config(whole.config)
    for span, ends in (((0, 1), ["embedding"]), ((1, 3), []), ((3, 4), ["norm", "head"])):
        wanted = ends + [f"layers.{i}." for i in range(*span)]
        if tied and "head" in wanted:
            wanted[wanted.index("head")] = "embedding"
        sources = huggingface.weights_of(config).items()
        names = {
            name
            for key, source in sources
            if any(key.startswith(prefix) for prefix in wanted)
            for name in source.shapes
        }
        part = tmp_path / f"part_{span[0]}"
        part.mkdir()
        (part / "config.json").write_bytes((path / "config.json").read_bytes())
        safetensors_file.write_safetensors(
            part / "model.safetensors", {name: np.array(whole.read(name)) for name in names}
        )
        seen = []
        [model] = loading.load_spans(
            ModelFolder.open(part),
            config,
            [architecture.Span(*span)],
            dtype=_FLOAT32,
            placement=placement,
            progress=seen.append,
        )
        held = sum(leaf.nbytes for leaf in _leaves(model))
        assert held == seen[-1].total_bytes == seen[-1].done_bytes
        assert held == loading.model_bytes(config, _FLOAT32, [architecture.Span(*span)])
        assert [layer.spec for layer in model.layers] == [_spec_of(config, i) for i in range(*span)]
        np.testing.assert_array_equal(
            model.layers[0].feed_forward.down[...],
            whole.read(f"model.layers.{span[0]}.mlp.down_proj.weight"),
        )
        with pytest.raises(ValueError, match=r"the folder lacks (lm_head|model)\."):
            load_whole(ModelFolder.open(part), config, dtype=_FLOAT32, placement=placement)


def _spec_of(config, layer):
    return transformer.AttentionSpec(
        scale=config.query_scale,
        window=config.windows[layer],
        softcap=config.attention_softcap,
    )


def test_spans_of_one_model_share_an_embedding(placement):
    config = huggingface.read_config(ModelFolder.open(cases.load("gemma2").path).config)
    assert config.tied_embeddings
    first, last = loading.random_spans(
        config,
        architecture.cut(config.num_layers, [1]),
        seed=0,
        dtype=_FLOAT32,
        placement=placement,
    )
    assert first.embedding[...] is last.embedding[...]
    assert first.norm is None and last.norm is not None


@pytest.mark.parametrize("borders", [[0, 2], [2, 2], [3, 2], [4], [-1]])
def test_a_grid_that_does_not_cut_between_layers_is_refused(borders):
    text = ", ".join(map(str, borders))
    message = (
        f"a grid of cuts at {text} does not ascend between 0 and 4, the number of layers; give "
        "each border once, in order"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        architecture.cut(4, borders)


def test_a_model_is_cut_into_the_spans_between_borders():
    assert architecture.cut(4, [1, 3]) == ((0, 1), (1, 3), (3, 4))
    assert architecture.cut(4, []) == ((0, 4),)
