import dataclasses

import pytest

from nanoflow_jax.cost import datasheets, iteration, serving
from nanoflow_jax.models import huggingface, presets

_H200 = serving.Cluster(accelerator=datasheets.accelerator("h200"), num_devices=1)
_STEP = iteration.Step(tokens=2048, decode_rows=512, decode_context=1024, prompt_context=256)


def _config(name):
    return huggingface.read_config(presets.load(name))


def _costs(config, *, cluster=_H200, step=_STEP):
    return {one.name: one for one in iteration.operation_costs(config, cluster, step)}


@pytest.mark.parametrize("name", presets.names())
def test_products_of_every_preset_add_up_to_the_weights_that_a_token_meets(name):
    config = _config(name)
    costs = _costs(config)
    found = sum(costs[one].flops for one in ("kqv", "o", "up_gate", "down"))
    embedding = config.vocab_size * config.hidden_size
    outside = embedding * (1 if config.tied_embeddings else 2)
    if config.moe is not None:
        outside += sum(config.moe.sparse_layers) * config.moe.num_experts * config.hidden_size
    assert found == pytest.approx(2 * 2048 * (config.num_active_parameters - outside))
    assert costs["head"].flops == 2 * 512 * embedding


def test_weights_and_cache_are_read_once():
    config = _config("llama-3-8b")
    costs = _costs(config, step=dataclasses.replace(_STEP, tokens=512))
    moved = sum(one.memory_bytes for one in costs.values())
    cached = 512 * 1024 * serving.sizes(config).kv_bytes_per_token
    weights = 2 * (config.num_parameters - config.vocab_size * config.hidden_size)
    activations = moved - cached - weights
    assert 0 < activations < 0.2 * moved


def test_a_window_bounds_what_its_layers_see():
    config = _config("gemma-2-9b")
    whole = dataclasses.replace(config, windows=(None,) * config.num_layers)
    far = dataclasses.replace(_STEP, decode_context=3 * 4096)
    windowed, seen = (_costs(one, step=far)["decode_attention"].flops for one in (config, whole))
    assert sum(window == 4096 for window in config.windows) == config.num_layers // 2
    assert windowed == pytest.approx(seen * (1 + 1 / 3) / 2)


def test_few_tokens_touch_few_experts_and_many_touch_all():
    moe = _config("mixtral-8x7b").moe
    assert iteration.touched_experts(moe, 1) == pytest.approx(2)
    assert iteration.touched_experts(moe, 2) == pytest.approx(8 * (1 - 0.75**2))
    assert iteration.touched_experts(moe, 2048) == pytest.approx(8)


def test_one_device_sends_nothing_and_stages_send_less():
    config = _config("llama-3-8b")
    assert "collectives" not in _costs(config)
    sent = {}
    for stages in (1, 2, 4):
        cluster = dataclasses.replace(_H200, num_devices=8, num_stages=stages)
        sent[stages] = _costs(config, cluster=cluster)["collectives"].link_bytes
    per_peer = 4 * 2048 * 4096 * 2 * 32
    assert sent == {1: 7 * per_peer, 2: 3 * per_peer, 4: 1 * per_peer}


def test_an_operation_takes_the_longest_of_its_three_times():
    cost = iteration.OperationCost(name="one", flops=989.5e12, memory_bytes=9600e9, link_bytes=45e9)
    assert cost.compute_s(_H200) == pytest.approx(1.0)
    assert cost.memory_s(_H200) == pytest.approx(2.0)
    assert cost.network_s(_H200) == pytest.approx(0.1)
    assert cost.least_s(_H200) == pytest.approx(2.0)
