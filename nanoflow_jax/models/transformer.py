"""One decoder-only transformer over one flat token batch: embed, layers[a:b], head.

Hidden states may enter and leave at layer borders. Layers are unrolled, and each keeps its own
cache: a scan over layers would copy the cache (see docs/decisions.md). How keys and values are
cached and attended to is the caller's: serving passes pages, training passes whole rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nanoflow_jax.models import architecture, layers
from nanoflow_jax.models.operations import PLAIN, Operations
from nanoflow_jax.parallel import collectives


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one layer's attention computes: scale, window in tokens, soft-cap."""

    scale: float
    window: int | None
    softcap: float | None


class AttentionPath(Protocol):
    """Caches this layer's new keys and values and attends to all that are cached."""

    def __call__(
        self,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        cache: Any,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "T N H"], Any]: ...


class Layer(nnx.Module):
    """Attention and feed-forward, each added to the residual stream."""

    def __init__(self, make: layers.Maker, layer: int, config: architecture.ModelConfig):
        self.attention = layers.Attention(make, layer, config)
        sparse = config.is_sparse(layer)
        kind = layers.SparseFeedForward if sparse else layers.FeedForward
        self.feed_forward = kind(make, layer, config)
        self.spec = AttentionSpec(
            scale=config.query_scale,
            window=config.windows[layer],
            softcap=config.attention_softcap,
        )

    def __call__(
        self,
        x: Float[Array, "T D"],
        angles: tuple[Float[Array, "T h"], Float[Array, "T h"]],
        cache: Any,
        attend: AttentionPath,
        operations: Operations = PLAIN,
    ) -> tuple[Float[Array, "T D"], Any]:
        q, k, v = self.attention.norm_kqv(x, operations)
        with jax.named_scope("rope"):
            q, k = layers.rotate(q, *angles), layers.rotate(k, *angles)
        attended, cache = attend(q, k, v, cache, self.spec)
        x = self.attention.output(x, attended, operations)
        return self.feed_forward(x, operations), cache


class Transformer(nnx.Module):
    """Embedding, layers, last norm and head of one model."""

    def __init__(self, make: layers.Maker, config: architecture.ModelConfig):
        c = config
        shape = (c.vocab_size, c.hidden_size)
        self.embedding = nnx.Param(make(layers.ParamSpec(name="embedding", shape=shape, axes="VD")))
        self.layers = nnx.List([Layer(make, i, c) for i in range(c.num_layers)])
        self.norm = layers.RmsNorm(make, "norm", c.hidden_size, config=c)
        self.head_weight = (
            None
            if c.tied_embeddings
            else nnx.Param(make(layers.ParamSpec(name="head", shape=shape, axes="VD")))
        )
        self.config = c

    def embed(
        self, token_ids: Int[Array, "T"], group: collectives.Group = collectives.ALONE
    ) -> Float[Array, "T D"]:
        """Rows of the embedding, of which each device of a group has an equal share."""
        with jax.named_scope("embed"):
            rows = self.embedding[...]
            if group.num_devices > 1:
                token_ids = token_ids - group.index() * rows.shape[0]
                is_here = (token_ids >= 0) & (token_ids < rows.shape[0])
                x = jnp.take(rows, token_ids, axis=0, mode="clip")
                x = group.sum(jnp.where(is_here[:, None], x, jnp.zeros((), x.dtype)))
            else:
                x = jnp.take(rows, token_ids, axis=0, mode="clip")
            if self.config.embedding_scale != 1.0:
                x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
            return x

    def run_layers(
        self,
        x: Float[Array, "T D"],
        positions: Int[Array, "T"],
        caches: Sequence[Any],
        attend: AttentionPath,
        *,
        start: int = 0,
        operations: Operations = PLAIN,
    ) -> tuple[Float[Array, "T D"], list[Any]]:
        """Runs layers [start, start + len(caches)).

        Args:
            x: Hidden states entering layer `start`.
            positions: Position of each token in its request.
            caches: One cache per layer to run.
            attend: Appends to a cache and attends.
            start: First layer.
            operations: What the rest of a layer is made of.

        Returns:
            Hidden states leaving the last of them, and the updated caches.
        """
        angles = layers.rope_angles(positions, head_dim=self.config.head_dim, rope=self.config.rope)
        updated = []
        for offset, cache in enumerate(caches):
            x, cache = self.layers[start + offset](x, angles, cache, attend, operations)
            updated.append(cache)
        return x, updated

    def head(
        self, x: Float[Array, "R D"], group: collectives.Group = collectives.ALONE
    ) -> Float[Array, "r V"]:
        """Logits in float32 of gathered hidden states that left the last layer.

        Each device of a group makes some columns and gets some whole rows, those of
        `Group.own_rows`; R must be a multiple of the number of devices.
        """
        with jax.named_scope("head"):
            weight = self.embedding if self.head_weight is None else self.head_weight
            precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
            logits = jnp.einsum(
                "RD,VD->RV",
                self.norm(x),
                weight[...],
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            logits = group.columns_to_rows(logits)[:, : self.config.vocab_size]
            cap = self.config.logits_softcap
            return logits if cap is None else cap * jnp.tanh(logits / cap)


def parameter_specs(config: architecture.ModelConfig) -> list[layers.ParamSpec]:
    """Every weight of a model, in the order in which they are made."""
    found: list[layers.ParamSpec] = []

    def remember(spec: layers.ParamSpec) -> jax.ShapeDtypeStruct:
        found.append(spec)
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32)

    Transformer(remember, config)
    return found
