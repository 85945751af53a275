import dataclasses
import re

import pytest

from nanoflow_jax.models import architecture, presets
from nanoflow_jax.models.huggingface import read_config

_CONFIG = architecture.ModelConfig(
    family="llama",
    num_layers=3,
    hidden_size=10,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=7,
    vocab_size=11,
    max_context_len=64,
    norm_eps=1e-5,
    rope=architecture.RopeConfig(),
    query_scale=0.5,
    windows=(None,) * 3,
)
_MOE = architecture.MoeConfig(
    num_experts=4,
    num_active=2,
    intermediate_size=5,
    normalise=True,
    sparse_layers=(True, False, True),
)


def test_query_heads_are_shared_out_to_kv_heads():
    assert _CONFIG.group_size == 3


def test_parameters_are_counted_as_by_hand():
    attention = (6 + 2 + 2 + 6) * 4 * 10
    dense = 3 * 10 * 7
    assert _CONFIG.num_parameters == 2 * 11 * 10 + 3 * (attention + dense)
    tied = dataclasses.replace(_CONFIG, tied_embeddings=True)
    assert tied.num_parameters == 11 * 10 + 3 * (attention + dense)
    sparse = dataclasses.replace(_CONFIG, moe=_MOE)
    experts = 4 * (3 * 10 * 5 + 10)
    assert sparse.num_parameters == 2 * 11 * 10 + 3 * attention + 2 * experts + dense


def test_only_the_named_layers_are_sparse():
    assert not _CONFIG.is_sparse(0)
    sparse = dataclasses.replace(_CONFIG, moe=_MOE)
    assert [sparse.is_sparse(layer) for layer in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-2-70b", 68.98),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.55),
        ("llama-3.1-405b", 405.85),
        ("mistral-7b", 7.24),
        ("mixtral-8x7b", 46.70),
        ("qwen2-72b", 72.71),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
        ("qwen3-30b-a3b", 30.53),
        ("gemma-2-9b", 9.24),
    ],
)
def test_presets_have_as_many_parameters_as_their_cards_say(preset, billions):
    config = read_config(presets.load(preset))
    assert config.num_parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_kv_heads": 4},
            "num_attention_heads=6 is not a multiple of num_key_value_heads=4; check config.json",
        ),
        ({"head_dim": 5}, "head_dim=5 is odd; rotary embedding needs pairs"),
        (
            {"windows": (None, 4)},
            "config.json names a window for 2 layers, but the model has 3",
        ),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(_CONFIG, **change)


def test_more_active_experts_than_experts_are_refused():
    message = "num_experts_per_tok=5 is more than the model's 4 experts; check config.json"
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(_MOE, num_active=5)
