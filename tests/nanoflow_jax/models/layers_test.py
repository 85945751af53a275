import dataclasses
import math

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from nanoflow_jax.models import architecture, layers, operations

_CONFIG = architecture.ModelConfig(
    family="llama",
    num_layers=1,
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
    windows=(None,),
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)


class _Maker:
    """Seeded weights, kept by name."""

    def __init__(self, seed=0):
        self._random = np.random.default_rng(seed)
        self.made = {}

    def __call__(self, spec):
        value = self._random.standard_normal(spec.shape).astype(np.float32)
        self.made[spec.name.removeprefix("layers.0.")] = value
        return jnp.asarray(value)


def _tokens(count, width, seed=1):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def _close(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=2e-5, atol=2e-5)


def _norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + _CONFIG.norm_eps) * weight


def _silu(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_divides_by_the_root_mean_square(offset):
    make = _Maker()
    norm = layers.RmsNorm(make, "n", 10, config=dataclasses.replace(_CONFIG, norm_offset=offset))
    x = _tokens(3, 10)
    _close(norm(jnp.asarray(x)), _norm(x, make.made["n"] + offset))


def test_norm_worked_by_hand():
    norm = layers.RmsNorm(
        lambda spec: jnp.asarray([1.0, 2.0]),
        "n",
        2,
        config=dataclasses.replace(_CONFIG, norm_eps=0.5),
    )
    # Mean square (9 + 16) / 2 = 12.5, with eps 13.
    _close(norm(jnp.asarray([[3.0, 4.0]])), [[3 / math.sqrt(13), 8 / math.sqrt(13)]])


def test_norm_of_bfloat16_is_computed_in_float32():
    norm = layers.RmsNorm(lambda spec: jnp.ones((2,), jnp.bfloat16), "n", 2, config=_CONFIG)
    # 300 squared is past bfloat16's last exact integer; the quotients are not.
    out = norm(jnp.asarray([[300.0, 300.0]], jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, np.ones((1, 2), ml_dtypes.bfloat16))


def test_product_sums_bfloat16_in_float32():
    # In bfloat16 256 + 1 is 256: 256 ones after it would all be lost.
    row = jnp.asarray([[256.0] + [1.0] * 256], jnp.bfloat16)
    out = operations.product(row, jnp.ones((1, 257), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0]) == 512.0


def test_rope_angles_are_position_times_frequency():
    cos, sin = layers.rope_angles(
        jnp.asarray([0, 1, 7], jnp.int32), head_dim=4, rope=architecture.RopeConfig(theta=100.0)
    )
    angles = np.outer([0, 1, 7], [1.0, 0.1])
    _close(cos, np.cos(angles))
    _close(sin, np.sin(angles))


def test_llama3_scaling_stretches_long_waves_keeps_short_ones_and_blends_between():
    rope = architecture.RopeConfig(
        theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=64
    )
    head_dim = 32
    cos, sin = layers.rope_angles(jnp.asarray([1], jnp.int32), head_dim=head_dim, rope=rope)
    found = np.arctan2(np.asarray(sin[0], np.float64), np.asarray(cos[0], np.float64))
    kinds = set()
    for i in range(head_dim // 2):
        freq = 10000.0 ** (-2 * i / head_dim)
        wavelen = 2 * math.pi / freq
        if wavelen < 64 / 4:
            kind, wanted = "kept", freq
        elif wavelen > 64 / 1:
            kind, wanted = "stretched", freq / 8
        else:
            kind, part = "blended", (64 / wavelen - 1) / 3
            wanted = (1 - part) * freq / 8 + part * freq
        kinds.add(kind)
        assert found[i] == pytest.approx(wanted, rel=1e-4), kind
    assert kinds == {"kept", "stretched", "blended"}


@hypothesis.given(offset=st.integers(0, 500), gap=st.integers(0, 60))
def test_rotated_products_depend_on_the_distance_alone(offset, gap):
    q, k = jnp.asarray(_tokens(1, 8)[:, None]), jnp.asarray(_tokens(1, 8, seed=2)[:, None])

    def rotated(x, position):
        angles = layers.rope_angles(
            jnp.asarray([position], jnp.int32), head_dim=8, rope=architecture.RopeConfig()
        )
        return np.asarray(layers.rotate(x, *angles))

    def score(p, s):
        return float((rotated(q, p) * rotated(k, s)).sum())

    assert score(offset + gap, offset) == pytest.approx(score(gap, 0), abs=2e-3)


def test_rotation_worked_by_hand():
    quarter = jnp.asarray([[math.cos(math.pi / 2), 1.0]])
    sines = jnp.asarray([[math.sin(math.pi / 2), 0.0]])
    # Pairs (0, 2) and (1, 3): the first turns by 90 degrees, the second stays.
    out = layers.rotate(jnp.asarray([[[1.0, 2.0, 3.0, 4.0]]]), quarter, sines)
    np.testing.assert_allclose(out, [[[-3.0, 2.0, 1.0, 4.0]]], atol=1e-6)


def test_queries_keys_and_values_are_biased_projections_of_the_norm():
    make = _Maker()
    attention = layers.Attention(make, 0, _CONFIG)
    x = _tokens(5, 10)
    q, k, v = attention.norm_kqv(jnp.asarray(x))
    both = np.einsum("TD,KJHD->TKJH", _norm(x, make.made["attention_norm"]), make.made["qkv"])
    both = both + make.made["qkv_bias"]
    _close(q, both[:, :, :3].reshape(5, 6, 4))
    _close(k, both[:, :, 3])
    _close(v, both[:, :, 4])


def test_query_and_key_heads_are_normed_and_values_are_not():
    make = _Maker()
    attention = layers.Attention(
        make, 0, dataclasses.replace(_CONFIG, qk_norm=True, qkv_bias=False)
    )
    x = _tokens(5, 10)
    q, k, v = attention.norm_kqv(jnp.asarray(x))
    both = np.einsum("TD,KJHD->TKJH", _norm(x, make.made["attention_norm"]), make.made["qkv"])
    _close(q, _norm(both[:, :, :3].reshape(5, 6, 4), make.made["query_norm"]))
    _close(k, _norm(both[:, :, 3], make.made["key_norm"]))
    _close(v, both[:, :, 4])


@pytest.mark.parametrize("post_norms", [False, True])
def test_output_projection_is_added_to_the_residual_stream(post_norms):
    make = _Maker()
    attention = layers.Attention(make, 0, dataclasses.replace(_CONFIG, post_norms=post_norms))
    x, attended = _tokens(5, 10), _tokens(5, 24, seed=3)
    out = attended @ make.made["o"].reshape(10, 24).T + make.made["o_bias"]
    if post_norms:
        out = _norm(out, make.made["attention_post_norm"])
    _close(attention.output(jnp.asarray(x), jnp.asarray(attended.reshape(5, 6, 4))), x + out)


@pytest.mark.parametrize("post_norms", [False, True])
@pytest.mark.parametrize(
    ("kind", "activate"),
    [(architecture.Activation.SILU, _silu), (architecture.Activation.GELU_TANH, _gelu)],
)
def test_feed_forward_gates_what_goes_up(post_norms, kind, activate):
    make = _Maker()
    config = dataclasses.replace(_CONFIG, post_norms=post_norms, activation=kind)
    feed_forward = layers.FeedForward(make, 0, config)
    x, w = _tokens(5, 10), make.made
    normed = _norm(x, w["feed_forward_norm"])
    gate, up = (normed @ w["gate_up"][i].T + w["gate_up_bias"][i] for i in (0, 1))
    out = (activate(gate) * up) @ w["down"].T + w["down_bias"]
    if post_norms:
        out = _norm(out, w["feed_forward_post_norm"])
    _close(feed_forward(jnp.asarray(x)), x + out)


def _sparse_layer(**moe):
    config = dataclasses.replace(
        _CONFIG, moe=architecture.MoeConfig(intermediate_size=5, sparse_layers=(True,), **moe)
    )
    make = _Maker()
    return layers.SparseFeedForward(make, 0, config), make.made


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_active", "normalise"),
    [(9, 5, 3, True), (9, 5, 3, False), (7, 4, 1, True), (3, 2, 2, False), (1, 8, 2, True)],
)
def test_each_token_goes_through_its_own_experts(num_tokens, num_experts, num_active, normalise):
    layer, w = _sparse_layer(num_experts=num_experts, num_active=num_active, normalise=normalise)
    x = _tokens(num_tokens, 10)
    wanted = x.copy()
    for t, normed in enumerate(_norm(x, w["feed_forward_norm"])):
        scores = np.exp(w["router"] @ normed)
        shares = scores / scores.sum()
        chosen = np.argsort(-shares)[:num_active]
        total = shares[chosen].sum() if normalise else 1.0
        for e in chosen:
            gate, up = (half @ normed for half in w["experts_gate_up"][e])
            wanted[t] += shares[e] / total * (w["experts_down"][e] @ (_silu(gate) * up))
    np.testing.assert_allclose(jax.jit(layer)(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_token_that_is_not_a_number_leaves_the_other_tokens_alone():
    layer, _ = _sparse_layer(num_experts=4, num_active=2, normalise=True)
    x = _tokens(5, 10)
    run = jax.jit(layer)
    clean = np.asarray(run(x))
    found = np.asarray(run(np.where(np.arange(5)[:, None] == 2, np.float32(np.nan), x)))
    assert np.isnan(found[2]).all()
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(found[others], clean[others], rtol=1e-6)
