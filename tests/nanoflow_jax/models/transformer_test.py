import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases
from plain_model import PlainModel, WholeAttention

from nanoflow_jax.models import huggingface, transformer
from nanoflow_jax.models.operations import PLAIN
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.parallel import collectives

_FAMILIES = ["llama3", "qwen3_moe", "gemma2"]


def _load(case):
    golden = cases.load(case)
    return golden, PlainModel(golden.path, length=64).model


def _positions(start, stop):
    return jnp.arange(start, stop, dtype=jnp.int32)


@pytest.mark.parametrize("case", _FAMILIES)
def test_hidden_states_leave_and_enter_at_every_layer_border(case):
    golden, model = _load(case)
    prompt = jnp.asarray(golden.prompts[4], jnp.int32)
    positions, num_layers = _positions(0, len(prompt)), model.config.num_layers

    def layers(x, *, start, count):
        return model.run_layers(x, positions, [None] * count, WholeAttention(), start=start)

    run = jax.jit(layers, static_argnames=("start", "count"))
    x = jax.jit(model.embed)(prompt)
    whole, caches = run(x, start=0, count=num_layers)
    logits = jax.jit(model.head)(whole)
    np.testing.assert_allclose(logits, golden.logits[4], rtol=0, atol=1e-4)
    assert len(caches) == num_layers
    for border in range(num_layers + 1):
        lower, first = run(x, start=0, count=border)
        upper, second = run(lower, start=border, count=num_layers - border)
        np.testing.assert_allclose(upper, whole, rtol=1e-5, atol=1e-5)
        for found, wanted in zip(first + second, caches, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", _FAMILIES)
def test_a_prompt_in_two_chunks_is_the_whole_prompt(case):
    golden, model = _load(case)
    prompt = jnp.asarray(golden.prompts[4], jnp.int32)

    @jax.jit
    def in_chunks(prompt):
        caches = [None] * model.config.num_layers
        logits = []
        for start, stop in ((0, 5), (5, len(prompt))):
            x = model.embed(prompt[start:stop])
            x, caches = model.run_layers(x, _positions(start, stop), caches, WholeAttention())
            logits.append(model.head(x))
        return jnp.concatenate(logits)

    np.testing.assert_allclose(in_chunks(prompt), golden.logits[4], rtol=0, atol=1e-4)


def test_specs_are_named_once_and_in_the_order_of_making():
    raw = json.loads((cases.load("qwen3_moe").path / "config.json").read_text())
    config = huggingface.read_config(raw)
    names = [spec.name for spec in transformer.parameter_specs(config)]
    assert len(names) == len(set(names))
    assert names[0] == "embedding"
    assert names[-2:] == ["norm", "head"]
    tied = dataclasses.replace(config, tied_embeddings=True)
    assert [spec.name for spec in transformer.parameter_specs(tied)] == names[:-1]
    assert all(len(s.axes) == len(s.shape) for s in transformer.parameter_specs(config))


def test_embeddings_are_scaled_and_logits_capped_where_the_family_says_so():
    _, model = _load("gemma2")
    c = model.config
    ids = jnp.asarray([3, 0], jnp.int32)
    table = np.asarray(model.embedding[...])
    np.testing.assert_allclose(model.embed(ids), table[[3, 0]] * c.hidden_size**0.5, rtol=1e-6)
    x = 100 * jax.random.normal(jax.random.key(0), (4, c.hidden_size))
    logits = np.asarray(model.head(x))
    normed = np.asarray(model.norm(x))
    cap = c.logits_softcap
    np.testing.assert_allclose(logits, cap * np.tanh(normed @ table.T / cap), atol=1e-4)
    assert np.abs(logits).max() <= cap


def _run_plan(plan, num_tokens=8):
    _, model = _load("llama3")
    x = jnp.zeros((num_tokens, model.config.hidden_size))
    positions, attend = _positions(0, num_tokens), WholeAttention()
    return model.run_layers(x, positions, [None], attend, plan=plan)


def test_a_plan_for_another_number_of_tokens_is_refused():
    plan = builders.one(LayerShape(), num_tokens=9)
    with pytest.raises(
        ValueError, match="plan 'one' is for 9 tokens and the dense batch has 8; give each bucket"
    ):
        _run_plan(plan)


def test_a_plan_for_other_devices_is_refused():
    plan = builders.one(LayerShape(num_devices=4), num_tokens=8)
    with pytest.raises(
        ValueError, match="spreads a layer over 4 devices and the model is on 1; take a plan for 1"
    ):
        _run_plan(plan)


def test_a_plan_whose_weights_would_lie_otherwise_is_refused():
    _, model = _load("llama3")
    plan = builders.tensor_parallel(
        LayerShape(num_devices=2), num_tokens=8, device=builders.Device(granule=2)
    )
    operations = dataclasses.replace(PLAIN, group=collectives.Group(num_devices=2))
    x = jnp.zeros((8, model.config.hidden_size))
    with pytest.raises(
        ValueError,
        match="wants the weight of o split by columns, and it is split along the summed axis; take "
        "its way 'reduce', and a plan for all devices",
    ):
        model.run_layers(
            x, _positions(0, 8), [None], WholeAttention(), plan=plan, operations=operations
        )


def test_operations_carry_layer_and_nano_batch_in_their_names():
    _, model = _load("llama3")
    x = jnp.zeros((8, model.config.hidden_size))

    def run(x):
        plan = builders.one(LayerShape(), num_tokens=8)
        return model.run_layers(x, _positions(0, 8), [None], WholeAttention(), plan=plan)

    text = jax.jit(run).lower(x).as_text(debug_info=True)
    for name in ("norm_kqv", "rope", "prefill_attention", "o", "norm", "up_gate", "down"):
        assert f"layer_0/{name}.0/" in text
