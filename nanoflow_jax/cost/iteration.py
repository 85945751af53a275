"""What each operation of a serving step computes, moves and sends, over all layers and devices.

Counted as NanoFlow's Table 2 counts: nothing is fused, so that a product writes all that it makes;
each weight is read once a step, and activations once however many devices share a layer. What the
kernels of this project move is in `layer_work`.

Source: NanoFlow (arXiv 2408.12757v2), Table 2, from which the counting was worked out. Its causal
attention of prompts is not halved; `Step.prompt_context` says what a token sees.
"""

import dataclasses

from nanoflow_jax.cost import serving
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import architecture

_BYTES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What a step runs over.

    Attributes:
        tokens: Of the dense batch.
        decode_rows: Of them, those of requests that decode.
        decode_context: Cached tokens that each of these sees, on average.
        prompt_context: Tokens that each other token sees, on average.
    """

    tokens: float
    decode_rows: float
    decode_context: float
    prompt_context: float


def steady_step(mix: Mix, tokens: float) -> Step:
    """A step of the steady state: tokens as they come by, prompts attended to causally."""
    return Step(
        tokens=tokens,
        decode_rows=tokens * mix.decode_share,
        decode_context=mix.decode_context,
        prompt_context=mix.prefix,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperationCost:
    """One operation, of all layers and devices together.

    Attributes:
        name: What it is called.
        flops: Multiplications and additions.
        memory_bytes: Read and written.
        link_bytes: Sent to other devices.
    """

    name: str
    flops: float
    memory_bytes: float
    link_bytes: float = 0.0

    def compute_s(self, cluster: serving.Cluster) -> float:
        return self.flops / cluster.flops

    def memory_s(self, cluster: serving.Cluster) -> float:
        return self.memory_bytes / cluster.memory_bytes_per_s

    def network_s(self, cluster: serving.Cluster) -> float:
        return self.link_bytes / cluster.link_bytes_per_s

    def least_s(self, cluster: serving.Cluster) -> float:
        """The longest of the three: it takes no less."""
        return max(self.compute_s(cluster), self.memory_s(cluster), self.network_s(cluster))


def operation_costs(
    config: architecture.ModelConfig, cluster: serving.Cluster, step: Step
) -> tuple[OperationCost, ...]:
    """Every operation of a step, in the order of a layer; the head is last.

    Sampling, norms, rotary embeddings and residual additions are left out, as the paper does.

    Args:
        config: The model.
        cluster: The devices.
        step: What the step runs over.
    """
    c, layers = config, config.num_layers
    width, heads, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sent = serving.network_bytes(serving.sizes(c), cluster, step.tokens)
    network = OperationCost(
        # Half of the passes are the sums of an all-reduce: an addition for each number that comes.
        name="collectives",
        flops=sent / _BYTES / 2,
        memory_bytes=sent,
        link_bytes=sent,
    )
    return (
        _product("kqv", step.tokens, width, heads + 2 * kv, layers),
        _attention("decode_attention", c, step.decode_rows, step.decode_context, reads_cache=True),
        _attention(
            "prefill_attention",
            c,
            step.tokens - step.decode_rows,
            step.prompt_context,
            reads_cache=False,
        ),
        _product("o", step.tokens, heads, width, layers),
        *_feed_forward(c, step.tokens),
        *([network] if sent else []),
        # Rows that have logits: one of each request that decodes, and few of prompts.
        _product("head", step.decode_rows, width, c.vocab_size, 1),
    )


def _product(name: str, rows: float, depth: int, columns: int, layers: int) -> OperationCost:
    return OperationCost(
        name=name,
        flops=2.0 * rows * depth * columns * layers,
        memory_bytes=_BYTES * layers * (depth * columns + rows * (depth + columns)),
    )


def _attention(
    name: str,
    config: architecture.ModelConfig,
    queries: float,
    context: float,
    *,
    reads_cache: bool,
) -> OperationCost:
    """Queries read, results and new keys and values written; a prompt's own keys stay on chip."""
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    flops, moved = 0.0, 0.0
    for window in config.windows:
        seen = context if window is None else min(context, window)
        flops += 4 * queries * seen * heads
        moved += queries * (2 * heads + 2 * kv + (2 * kv * seen if reads_cache else 0))
    return OperationCost(name=name, flops=flops, memory_bytes=_BYTES * moved)


def _feed_forward(
    config: architecture.ModelConfig, tokens: float
) -> tuple[OperationCost, OperationCost]:
    """Up with gate, and down; of experts, the weights of those that some token is sent to."""
    c, width = config, config.hidden_size
    num_sparse = sum(c.is_sparse(layer) for layer in range(c.num_layers))
    dense = c.num_layers - num_sparse
    up = [_product("up_gate", tokens, width, 2 * c.intermediate_size, dense)]
    down = [_product("down", tokens, c.intermediate_size, width, dense)]
    if c.moe is not None and num_sparse:
        rows = tokens * c.moe.num_active
        touched = touched_experts(c.moe, tokens)
        for depth, columns, to in (
            (width, 2 * c.moe.intermediate_size, up),
            (c.moe.intermediate_size, width, down),
        ):
            weights = touched * depth * columns
            to.append(
                OperationCost(
                    name="experts",
                    flops=2.0 * rows * depth * columns * num_sparse,
                    memory_bytes=_BYTES * num_sparse * (weights + rows * (depth + columns)),
                )
            )
    return _sum("up_gate", up), _sum("down", down)


def touched_experts(moe: architecture.MoeConfig, tokens: float) -> float:
    """Experts that at least one token is sent to, if each choice is as likely as any other."""
    missed = 1.0 - moe.num_active / moe.num_experts
    return moe.num_experts * (1.0 - missed**tokens)


def _sum(name: str, parts: list[OperationCost]) -> OperationCost:
    return OperationCost(
        name=name,
        flops=sum(part.flops for part in parts),
        memory_bytes=sum(part.memory_bytes for part in parts),
    )
