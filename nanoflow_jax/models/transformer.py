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
from nanoflow_jax.models.operations import PLAIN, Operations, Place, after
from nanoflow_jax.nanobatch import builders, executor
from nanoflow_jax.nanobatch import operations as nano_operations
from nanoflow_jax.nanobatch.executor import Call
from nanoflow_jax.nanobatch.plan import Plan, TokenRange
from nanoflow_jax.parallel import collectives

# How the weight of a product lies for each of its ways.
_SPLIT = {"gather": "split by columns", "reduce": "split along the summed axis"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one layer's attention computes: scale, window in tokens, soft-cap."""

    scale: float
    window: int | None
    softcap: float | None


class AttentionPath(Protocol):
    """The operations of attention: caches a layer's new keys and values, attends to all cached.

    Each method is about some tokens of the dense batch and gets and gives their rows alone.
    """

    def append(
        self,
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        cache: Any,
        tokens: TokenRange,
    ) -> Any:
        """The cache with new keys and values in it."""

    def attend_decode(
        self, q: Float[Array, "T N H"], cache: Any, spec: AttentionSpec, call: Call
    ) -> tuple[Float[Array, "R N H"] | None, ...]:
        """Attention of the decode rows of each cell; None where it has none."""

    def attend_prefill(
        self, q: Float[Array, "T N H"], cache: Any, spec: AttentionSpec, call: Call
    ) -> Float[Array, "T N H"] | None:
        """Attention of tokens of chunks, zeros for others; None in a program without chunks."""

    def joined(
        self,
        decoded: tuple[Float[Array, "R N H"] | None, ...],
        prefilled: Float[Array, "T N H"] | None,
        tokens: TokenRange,
    ) -> Float[Array, "T N H"]:
        """What both attentions give for the same tokens."""


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


class Transformer(nnx.Module):
    """Embedding, layers, last norm and head of one model, or of some of its layers.

    Attributes:
        span: The layers that it holds. The embedding is there where the first one is, or where the
            head is made of it; norm and head are there where the last one is.
    """

    def __init__(
        self,
        make: layers.Maker,
        config: architecture.ModelConfig,
        span: architecture.Span | None = None,
    ):
        """Makes the weights of a span; of the whole model where none is named."""
        c = config
        start, stop = self.span = span or architecture.Span(0, c.num_layers)
        shape = (c.vocab_size, c.hidden_size)
        embedding = layers.ParamSpec(name="embedding", shape=shape, axes="VD")
        head = layers.ParamSpec(name="head", shape=shape, axes="VD")
        ends = stop == c.num_layers
        has_embedding = start == 0 or (ends and c.tied_embeddings)
        self.embedding = nnx.Param(make(embedding)) if has_embedding else None
        self.layers = nnx.List([Layer(make, i, c) for i in range(start, stop)])
        self.norm = layers.RmsNorm(make, "norm", c.hidden_size, config=c) if ends else None
        self.head_weight = nnx.Param(make(head)) if ends and not c.tied_embeddings else None
        self.config = c

    def embed(
        self, token_ids: Int[Array, "T"], group: collectives.Group = collectives.ALONE
    ) -> Float[Array, "T D"]:
        """Rows of the embedding, of which each device of a group has an equal share."""
        with jax.named_scope("embed"):
            assert self.embedding is not None, "these layers do not begin the model"
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
        plan: Plan | None = None,
        keep_lanes: bool = False,
    ) -> tuple[Float[Array, "T D"], list[Any]]:
        """Runs layers [start, start + len(caches)).

        Args:
            x: Hidden states entering layer `start`.
            positions: Position of each token in its request.
            caches: One cache per layer to run.
            attend: Appends to a cache and attends.
            start: First layer.
            operations: What the rest of a layer is made of.
            plan: How to split and order it all; None splits nothing.
            keep_lanes: See `executor.run`.

        Returns:
            Hidden states leaving the last of them, and the updated caches.

        Raises:
            ValueError: The plan is for another number of tokens or devices, or needs weights that
                lie otherwise.
        """
        c = self.config
        if plan is None:
            plan = builders.one(c.layer_shape, num_tokens=x.shape[0])
        if plan.num_tokens != x.shape[0]:
            raise ValueError(
                f"plan {plan.name!r} is for {plan.num_tokens} tokens and the dense batch has "
                f"{x.shape[0]}; give each bucket a plan of its own size"
            )
        _check_devices(plan, operations.group.num_devices)
        first = start - self.span.start
        chosen = [self.layers[first + i] for i in range(len(caches))]
        for layer in chosen:
            _check_ways(plan, layer, c.hidden_size)
        angles = layers.rope_angles(positions, head_dim=c.head_dim, rope=c.rope)
        return executor.run(
            plan,
            [self._graph(start + i, plan) for i in range(len(chosen))],
            x,
            caches,
            _LayerOperations(chosen, angles, attend, operations),
            keep_lanes=keep_lanes,
            together=operations.together,
            start_aside=operations.start_aside,
        )

    def _graph(self, layer: int, plan: Plan) -> nano_operations.LayerGraph:
        is_sparse = self.config.is_sparse(layer)
        return nano_operations.layer_graph(dataclasses.replace(plan.shape, is_sparse=is_sparse))

    def head(
        self, x: Float[Array, "R D"], group: collectives.Group = collectives.ALONE
    ) -> Float[Array, "r V"]:
        """Logits in float32 of gathered hidden states that left the last layer.

        Each device of a group makes some columns and gets some whole rows, those of
        `Group.own_rows`; R must be a multiple of the number of devices.
        """
        with jax.named_scope("head"):
            weight = self.embedding if self.head_weight is None else self.head_weight
            assert self.norm is not None and weight is not None, "these layers do not end the model"
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


def _check_devices(plan: Plan, num_devices: int) -> None:
    """Refuses what these devices cannot run; in a plan for one, an operation sums by itself."""
    if plan.shape.num_devices not in (1, num_devices):
        raise ValueError(
            f"plan {plan.name!r} spreads a layer over {plan.shape.num_devices} devices and the "
            f"model is on {num_devices}; take a plan for {num_devices} or for 1"
        )


def _check_ways(plan: Plan, layer: Layer, hidden_size: int) -> None:
    """Refuses a plan that multiplies with another part of a weight than these devices have."""
    columns = {"o": layer.attention.num_columns}
    if isinstance(layer.feed_forward, layers.FeedForward):
        columns["down"] = layer.feed_forward.num_columns
    for product, count in columns.items():
        fitting = "gather" if count < hidden_size else "reduce"
        for way in plan.ways.get(product, {"reduce"}) - {fitting}:
            raise ValueError(
                f"plan {plan.name!r} wants the weight of {product} {_SPLIT[way]}, and it is "
                f"{_SPLIT[fitting]}; take its way {fitting!r}, and a plan for all devices"
            )


class _LayerOperations:
    """Runs operations of layers by their names in `nanobatch.operations`."""

    def __init__(
        self,
        chosen: Sequence[Layer],
        angles: tuple[Float[Array, "T h"], Float[Array, "T h"]],
        attend: AttentionPath,
        operations: Operations,
    ) -> None:
        self._layers = chosen
        self._angles = angles
        self._attend = attend
        self._operations = operations

    def __call__(self, call: Call, *reads: Any) -> Any:
        layer = self._layers[call.layer]
        place = Place.of(call)
        # What XLA makes by itself takes no operand that it does not read.
        first, *rest = reads
        match call.operation:
            case "norm_kqv":
                return layer.attention.norm_kqv(first, self._operations.at(place))
            case "rope":
                return self._rotate(after(first, call.token), call.tokens)
            case "append":
                value, (rotated, cache) = after(first[2], call.token), rest
                return self._attend.append(rotated[1], value, cache, call.tokens)
            case "decode_attention":
                return self._attend.attend_decode(first[0], rest[0], layer.spec, call)
            case "prefill_attention":
                return self._attend.attend_prefill(first[0], rest[0], layer.spec, call)
            case "o":
                *x, decoded, prefilled = reads
                attended = self._attend.joined(decoded, prefilled, call.tokens)
                operations = self._operations.at(place)
                if x:
                    return layer.attention.output(x[0], attended, operations)
                with jax.named_scope("o"):
                    return layer.attention.project(attended, operations)
            case "o_reduce":
                return layer.attention.add(first, self._sum(rest[0], call))
            case "attention_gather":
                decoded, prefilled = reads
                return self._gather(self._attend.joined(decoded, prefilled, call.tokens), call)
            case "o_columns":
                with jax.named_scope("o_columns"):
                    return layer.attention.project(first, self._operations.at(place))
            case "o_gather":
                return layer.attention.add(first, self._gather(rest[0], call))
            case "norm":
                return layer.feed_forward.normalise(after(first, call.token))
            case "route":
                return layer.feed_forward.route(
                    after(first, call.token), self._operations.at(place)
                )
            case "up_gate":
                return layer.feed_forward.expand(first, self._operations.at(place))
            case "down":
                if rest:
                    return layer.feed_forward.contract(first, rest[0], self._operations.at(place))
                with jax.named_scope("down"):
                    return layer.feed_forward.project(first, self._operations.at(place))
            case "down_reduce":
                return layer.feed_forward.add(first, self._sum(rest[0], call))
            case "hidden_gather":
                return self._gather(first, call)
            case "down_columns":
                with jax.named_scope("down_columns"):
                    return layer.feed_forward.project(first, self._operations.at(place))
            case "down_gather":
                return layer.feed_forward.add(first, self._gather(rest[0], call))
        raise AssertionError(f"nothing runs {call.operation}")

    def _sum(self, partial: Float[Array, "T D"], call: Call) -> Float[Array, "T D"]:
        with jax.named_scope(call.operation):
            return self._operations.group.sum(after(partial, call.token))

    def _gather(self, share: Float[Array, "T c *X"], call: Call) -> Float[Array, "T C *X"]:
        with jax.named_scope(call.operation):
            return self._operations.group.all_columns(after(share, call.token))

    def _rotate(
        self,
        qkv: tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]],
        tokens: TokenRange,
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"]]:
        with jax.named_scope("rope"):
            angles = [part[slice(*tokens)] for part in self._angles]
            return layers.rotate(qkv[0], *angles), layers.rotate(qkv[1], *angles)


def parameter_specs(
    config: architecture.ModelConfig, span: architecture.Span | None = None
) -> list[layers.ParamSpec]:
    """Every weight of a model, or of some layers, in the order in which they are made."""
    found: list[layers.ParamSpec] = []

    def remember(spec: layers.ParamSpec) -> jax.ShapeDtypeStruct:
        found.append(spec)
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32)

    Transformer(remember, config, span)
    return found
