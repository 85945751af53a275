"""The pieces of a transformer layer, each a named operation over a flat token batch.

Weights are stored output-major, as Hugging Face files have them: XLA:CPU multiplies them at
least as fast as input-major ones from 32 tokens on. Every weight is made by a `Maker`, so that
loading, random weights and abstract shapes share one description of the model.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nanoflow_jax.models import architecture
from nanoflow_jax.models import operations as operation_lib
from nanoflow_jax.models.operations import PLAIN, Operations


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One weight: what it is called, its shape and how it is made and split.

    Attributes:
        name: Dotted path in the model, such as `layers.0.qkv`.
        shape: Its sizes.
        axes: One letter of ARCHITECTURE.md per dimension; `parallel` maps them to a mesh.
        product: `o` or `down`, if it is the weight of one that can be split in two ways.
        std: Standard deviation of random weights around `mean`.
        mean: 0 for projections, the neutral value for norms.
    """

    name: str
    shape: tuple[int, ...]
    axes: str
    product: str | None = None
    std: float = 0.02
    mean: float = 0.0


class Maker(Protocol):
    """Makes the array (or abstract shape) of one weight."""

    def __call__(self, spec: ParamSpec) -> Any: ...


class RmsNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, in float32 (arXiv 1910.07467)."""

    def __init__(self, make: Maker, name: str, width: int, *, config: architecture.ModelConfig):
        neutral = 1.0 - config.norm_offset
        self.weight = nnx.Param(
            make(ParamSpec(name=name, shape=(width,), axes="D", std=0.0, mean=neutral))
        )
        self._eps = config.norm_eps
        self._offset = config.norm_offset

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self._eps)
        normed = wide * scale
        weight = self.weight[...]
        if self._offset:
            weight = weight.astype(jnp.float32) + self._offset
            return (normed * jnp.broadcast_to(weight, x.shape)).astype(x.dtype)
        return normed.astype(x.dtype) * jnp.broadcast_to(weight, x.shape)


def rope_angles(
    positions: Int[Array, "T"], *, head_dim: int, rope: architecture.RopeConfig
) -> tuple[Float[Array, "T h"], Float[Array, "T h"]]:
    """Cosines and sines of every position, h = H / 2, in float32."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    freqs = 1.0 / jnp.power(jnp.float32(rope.theta), exponent)
    if rope.factor is not None:
        freqs = _llama3_frequencies(freqs, rope)
    angles = positions.astype(jnp.float32)[:, None] * freqs[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _llama3_frequencies(
    freqs: Float[Array, "h"], rope: architecture.RopeConfig
) -> Float[Array, "h"]:
    assert rope.factor is not None
    wavelen = 2 * jnp.pi / freqs
    longest = rope.original_max_len / rope.low_freq_factor
    shortest = rope.original_max_len / rope.high_freq_factor
    spread = rope.high_freq_factor - rope.low_freq_factor
    kept = (rope.original_max_len / wavelen - rope.low_freq_factor) / spread
    blended = (1 - kept) * freqs / rope.factor + kept * freqs
    stretched = jnp.where(wavelen > longest, freqs / rope.factor, freqs)
    between = (wavelen <= longest) & (wavelen >= shortest)
    return jnp.where(between, blended, stretched)


def rotate(
    x: Float[Array, "T n H"], cos: Float[Array, "T h"], sin: Float[Array, "T h"]
) -> Float[Array, "T n H"]:
    """Rotates the pairs (i, i + H/2) of each head; computed in float32."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(
        x.dtype
    )


class Attention(nnx.Module):
    """Projections around attention: norm and KQV before it, O after it.

    The three input projections are one array grouped by kv head, [K, G + 2, H, D]: G query
    heads, then key, then value. Splitting over kv heads then needs no reordering.
    """

    def __init__(self, make: Maker, layer: int, config: architecture.ModelConfig):
        c, prefix = config, f"layers.{layer}"
        kv, group, width = c.num_kv_heads, c.group_size, c.hidden_size
        self.norm = RmsNorm(make, f"{prefix}.attention_norm", width, config=c)
        self.qkv = nnx.Param(
            make(
                ParamSpec(
                    name=f"{prefix}.qkv", shape=(kv, group + 2, c.head_dim, width), axes="KJHD"
                )
            )
        )
        self.qkv_bias = (
            nnx.Param(
                make(
                    ParamSpec(
                        name=f"{prefix}.qkv_bias", shape=(kv, group + 2, c.head_dim), axes="KJH"
                    )
                )
            )
            if c.qkv_bias
            else None
        )
        head_norm = functools.partial(RmsNorm, make, width=c.head_dim, config=c)
        self.query_norm = head_norm(name=f"{prefix}.query_norm") if c.qk_norm else None
        self.key_norm = head_norm(name=f"{prefix}.key_norm") if c.qk_norm else None
        self.o = nnx.Param(
            make(
                ParamSpec(
                    name=f"{prefix}.o",
                    shape=(width, kv, group, c.head_dim),
                    axes="DKGH",
                    product="o",
                )
            )
        )
        self.o_bias = (
            nnx.Param(make(ParamSpec(name=f"{prefix}.o_bias", shape=(width,), axes="D")))
            if c.o_bias
            else None
        )
        self.post_norm = (
            RmsNorm(make, f"{prefix}.attention_post_norm", width, config=c)
            if c.post_norms
            else None
        )
        self._config = c

    def norm_kqv(
        self, x: Float[Array, "T D"], operations: Operations = PLAIN
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
        c = self._config
        with jax.named_scope("norm_kqv"):
            weight = self.qkv[...]
            bias = None if self.qkv_bias is None else self.qkv_bias[...].reshape(-1)
            qkv = operations.product(self.norm(x), weight.reshape(-1, c.hidden_size), bias=bias)
            qkv = qkv.reshape(x.shape[0], *weight.shape[:-1])  # [T, K, G + 2, H]
            q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
            q = q.reshape(x.shape[0], -1, c.head_dim)
            if self.query_norm is not None and self.key_norm is not None:
                q, k = self.query_norm(q), self.key_norm(k)
            return q, k, v

    def output(
        self,
        x: Float[Array, "T D"],
        attended: Float[Array, "T N H"],
        operations: Operations = PLAIN,
    ) -> Float[Array, "T D"]:
        """Adds the projected attention to the residual stream."""
        with jax.named_scope("o"):
            heads = attended.reshape(x.shape[0], -1)
            weight = self.o[...].reshape(self._config.hidden_size, -1)
            return _added(x, heads, weight, self.o_bias, self.post_norm, operations)

    @property
    def num_columns(self) -> int:
        """Columns of O that this device has; less than D where they are shared out."""
        return int(self.o[...].shape[0])

    def project(
        self, attended: Float[Array, "T N H"], operations: Operations = PLAIN
    ) -> Float[Array, "T d"]:
        """What this device has of what `add` takes: a part of the sum, or some columns."""
        weight = self.o[...].reshape(self.num_columns, -1)
        return operations.product(attended.reshape(attended.shape[0], -1), weight)

    def add(self, x: Float[Array, "T D"], summed: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Adds what all devices' `project` come to to the residual stream, as `output` does."""
        return _add(x, summed, self.o_bias, self.post_norm)


def _add(
    x: Float[Array, "T D"],
    summed: Float[Array, "T D"],
    bias: nnx.Param[Array] | None,
    post_norm: RmsNorm | None,
) -> Float[Array, "T D"]:
    """The residual stream and a sum that is whole, bias and norm not yet in it."""
    out = summed if bias is None else summed + bias[...][None]
    return x + (out if post_norm is None else post_norm(out))


def _added(
    x: Float[Array, "T D"],
    inner: Float[Array, "T F"],
    weight: Float[Array, "D F"],
    bias: nnx.Param[Array] | None,
    post_norm: RmsNorm | None,
    operations: Operations,
) -> Float[Array, "T D"]:
    """The residual stream and a product, which is normalised first where a model does that."""
    given = None if bias is None else bias[...]
    if post_norm is None:
        return operations.summed_product(inner, weight, bias=given, residual=x)
    return x + post_norm(operations.summed_product(inner, weight, bias=given))


class FeedForward(nnx.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x))."""

    def __init__(self, make: Maker, layer: int, config: architecture.ModelConfig):
        c, prefix = config, f"layers.{layer}"
        width, hidden = c.hidden_size, c.intermediate_size
        self.norm = RmsNorm(make, f"{prefix}.feed_forward_norm", width, config=c)
        self.gate_up = nnx.Param(
            make(ParamSpec(name=f"{prefix}.gate_up", shape=(2, hidden, width), axes="2FD"))
        )
        self.down = nnx.Param(
            make(ParamSpec(name=f"{prefix}.down", shape=(width, hidden), axes="DF", product="down"))
        )
        biases = ("gate_up_bias", (2, hidden), "2F"), ("down_bias", (width,), "D")
        self.gate_up_bias, self.down_bias = (
            nnx.Param(make(ParamSpec(name=f"{prefix}.{name}", shape=shape, axes=axes)))
            if c.mlp_bias
            else None
            for name, shape, axes in biases
        )
        self.post_norm = (
            RmsNorm(make, f"{prefix}.feed_forward_post_norm", width, config=c)
            if c.post_norms
            else None
        )
        self._activation = c.activation

    def normalise(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """What `expand` takes."""
        with jax.named_scope("norm"):
            return self.norm(x)

    def expand(
        self, normed: Float[Array, "T D"], operations: Operations = PLAIN
    ) -> Float[Array, "T F"]:
        """What `contract` takes."""
        with jax.named_scope("up_gate"):
            bias = None if self.gate_up_bias is None else self.gate_up_bias[...]
            return operations.gated_product(
                normed, self.gate_up[...], bias=bias, activation=self._activation
            )

    def contract(
        self,
        x: Float[Array, "T D"],
        hidden: Float[Array, "T F"],
        operations: Operations = PLAIN,
    ) -> Float[Array, "T D"]:
        """Adds the result to the residual stream."""
        with jax.named_scope("down"):
            return _added(x, hidden, self.down[...], self.down_bias, self.post_norm, operations)

    @property
    def num_columns(self) -> int:
        """Columns of down that this device has; less than D where they are shared out."""
        return int(self.down[...].shape[0])

    def project(
        self, hidden: Float[Array, "T F"], operations: Operations = PLAIN
    ) -> Float[Array, "T d"]:
        """What this device has of what `add` takes: a part of the sum, or some columns."""
        return operations.product(hidden, self.down[...])

    def add(self, x: Float[Array, "T D"], summed: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Adds what all devices' `project` come to to the residual stream, as `contract` does."""
        return _add(x, summed, self.down_bias, self.post_norm)

    def __call__(
        self, x: Float[Array, "T D"], operations: Operations = PLAIN
    ) -> Float[Array, "T D"]:
        return self.contract(x, self.expand(self.normalise(x), operations), operations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """Rows of tokens on their way through their experts.

    Attributes:
        rows: A row for each expert of each token, in the order of `Experts.spread`.
        groups: Where they came from.
        shares: What each expert counts.
    """

    rows: Float[Array, "R D"]
    groups: Any
    shares: Float[Array, "T A"]


jax.tree_util.register_dataclass(Routed)


class SparseFeedForward(nnx.Module):
    """Mixture of experts: each token runs through A of E gated feed-forwards.

    Tokens are sorted by expert, so that each product is one grouped GEMM over T * A rows. Where
    each device has some of the experts, it leaves out the choices of the others'.
    """

    def __init__(self, make: Maker, layer: int, config: architecture.ModelConfig):
        c, prefix = config, f"layers.{layer}"
        assert c.moe is not None
        width, hidden, experts = c.hidden_size, c.moe.intermediate_size, c.moe.num_experts
        self.norm = RmsNorm(make, f"{prefix}.feed_forward_norm", width, config=c)
        self.router = nnx.Param(
            make(ParamSpec(name=f"{prefix}.router", shape=(experts, width), axes="ED"))
        )
        self.gate_up = nnx.Param(
            make(
                ParamSpec(
                    name=f"{prefix}.experts_gate_up",
                    shape=(experts, 2, hidden, width),
                    axes="E2FD",
                )
            )
        )
        self.down = nnx.Param(
            make(
                ParamSpec(name=f"{prefix}.experts_down", shape=(experts, width, hidden), axes="EDF")
            )
        )
        self._moe = c.moe
        self._activation = c.activation

    def normalise(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """What `route` takes."""
        with jax.named_scope("norm"):
            return self.norm(x)

    def route(self, normed: Float[Array, "T D"], operations: Operations = PLAIN) -> Routed:
        """What `expand` takes."""
        with jax.named_scope("route"):
            shares, experts = self._route(normed)
            held = self.gate_up[...].shape[0]
            if held < self._moe.num_experts:
                experts = experts - operations.group.index() * held
                is_here = (experts >= 0) & (experts < held)
                experts = jnp.where(is_here, experts, held)
                shares = jnp.where(is_here, shares, 0.0)
            groups = operations.experts.group(experts, num_experts=held)
            rows = operations.experts.spread(normed, groups)
            return Routed(rows=rows, groups=groups, shares=shares)

    def expand(self, routed: Routed, operations: Operations = PLAIN) -> Routed:
        """What `contract` takes."""
        with jax.named_scope("up_gate"):
            weight = self.gate_up[...]
            hidden = operations.gated_expert_product(
                routed.rows,
                weight.reshape(weight.shape[0], -1, weight.shape[3]),
                routed.groups,
                activation=self._activation,
            )
            return dataclasses.replace(routed, rows=hidden)

    def contract(
        self, x: Float[Array, "T D"], hidden: Routed, operations: Operations = PLAIN
    ) -> Float[Array, "T D"]:
        """Adds the result to the residual stream."""
        with jax.named_scope("down"):
            return self.add(x, operations.group.sum(self.project(hidden, operations)))

    def project(self, hidden: Routed, operations: Operations = PLAIN) -> Float[Array, "T D"]:
        """What this device has of the sum that `add` takes."""
        out = operations.expert_product(hidden.rows, self.down[...], hidden.groups)
        return operations.experts.combine(out, hidden.groups, hidden.shares)

    def add(self, x: Float[Array, "T D"], summed: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Adds the sum of all devices' `project` to the residual stream, as `contract` does."""
        return x + summed

    def __call__(
        self, x: Float[Array, "T D"], operations: Operations = PLAIN
    ) -> Float[Array, "T D"]:
        hidden = self.expand(self.route(self.normalise(x), operations), operations)
        return self.contract(x, hidden, operations)

    def _route(self, normed: Float[Array, "T D"]) -> tuple[Float[Array, "T A"], Int[Array, "T A"]]:
        """The share of each token's chosen experts, and which they are."""
        scores = operation_lib.product(normed, self.router[...]).astype(jnp.float32)
        shares, experts = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), self._moe.num_active)
        if self._moe.normalise:
            shares = shares / shares.sum(axis=-1, keepdims=True)
        return shares, experts
