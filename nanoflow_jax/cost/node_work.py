"""What each node of a model has to compute and to move: the parts that two machines may share.

A node is the embedding, the attention or the feed-forward of a layer, or the norm and the head.
Operations are counted by `iteration`, for a model of the one layer.
"""

import dataclasses
import enum

from nanoflow_jax.cost import datasheets, iteration, serving
from nanoflow_jax.models import architecture

_BYTES = 2  # of an activation and, in `iteration`, of a weight and a cached number


class NodeKind(enum.StrEnum):
    """What a node is."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    HEAD = "head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """One node.

    Attributes:
        kind: What it is.
        layer: Of which layer; None for the embedding and the head.
        parameters: Weights. Tied embeddings count in both nodes, which may lie apart.
        kv_width: Numbers that it keeps of each token.
        window: Tokens that it keeps at most; None is all.
    """

    kind: NodeKind
    layer: int | None
    parameters: int
    kv_width: int = 0
    window: int | None = None

    @property
    def name(self) -> str:
        return str(self.kind) if self.layer is None else f"{self.kind} {self.layer}"

    def kv_tokens(self, context_len: float) -> float:
        """Tokens that it keeps of a request of so many; 0 if it keeps none."""
        if not self.kv_width:
            return 0.0
        return context_len if self.window is None else min(context_len, self.window)


def nodes(config: architecture.ModelConfig) -> tuple[Node, ...]:
    """All nodes of a model, in the order in which a token meets them."""
    vocabulary = config.vocab_size * config.hidden_size
    found = [Node(kind=NodeKind.EMBEDDING, layer=None, parameters=vocabulary)]
    for layer, window in enumerate(config.windows):
        one = _one_layer(config, layer)
        ahead = vocabulary * (1 if config.tied_embeddings else 2)
        attention = config.num_attention_parameters
        found += [
            Node(
                kind=NodeKind.ATTENTION,
                layer=layer,
                parameters=attention,
                kv_width=2 * config.num_kv_heads * config.head_dim,
                window=window,
            ),
            Node(kind=NodeKind.MLP, layer=layer, parameters=one.num_parameters - ahead - attention),
        ]
    return (*found, Node(kind=NodeKind.HEAD, layer=None, parameters=vocabulary))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeWork:
    """What a node does in one step.

    Attributes:
        flops: Multiplications and additions.
        weights: Parameters read, once for all rows.
        kv_numbers: Cached numbers read.
        moved_bytes: Activations and new cached numbers, read and written.
    """

    flops: float
    weights: float
    kv_numbers: float
    moved_bytes: float


def decode_work(
    config: architecture.ModelConfig, node: Node, *, rows: int, context_len: float
) -> NodeWork:
    """The work of one token of each of some requests.

    Args:
        config: The model.
        node: Which part of it.
        rows: Requests.
        context_len: Tokens that each sees, on average.
    """
    step = iteration.Step(
        tokens=rows, decode_rows=rows, decode_context=context_len, prompt_context=0.0
    )
    read = rows * node.kv_tokens(context_len) * node.kv_width
    return _work(config, node, step, kv_numbers=read)


def prefill_work(config: architecture.ModelConfig, node: Node, *, prompt_len: int) -> NodeWork:
    """The work of a prompt done at once, causally; the head sees its last token alone."""
    rows = 1 if node.kind is NodeKind.HEAD else 0
    step = iteration.Step(
        tokens=prompt_len, decode_rows=rows, decode_context=0.0, prompt_context=prompt_len / 2
    )
    return _work(config, node, step, kv_numbers=0.0)


def _work(
    config: architecture.ModelConfig, node: Node, step: iteration.Step, *, kv_numbers: float
) -> NodeWork:
    if node.kind is NodeKind.EMBEDDING:
        # A row is read and written for each token; nothing is computed.
        moved = 2 * _BYTES * step.tokens * config.hidden_size
        return NodeWork(flops=0.0, weights=0.0, kv_numbers=0.0, moved_bytes=moved)
    one = _one_layer(config, node.layer or 0)
    costs = [
        cost
        for cost in iteration.operation_costs(one, _ONE_DEVICE, step)
        if cost.name in _OPERATIONS[node.kind]
    ]
    weights = _weights_read(one, node, step)
    memory_bytes = sum(cost.memory_bytes for cost in costs)
    return NodeWork(
        flops=sum(cost.flops for cost in costs),
        weights=weights,
        kv_numbers=kv_numbers,
        moved_bytes=memory_bytes - _BYTES * (weights + kv_numbers),
    )


_OPERATIONS = {
    NodeKind.ATTENTION: ("kqv", "decode_attention", "prefill_attention", "o"),
    NodeKind.MLP: ("up_gate", "down"),
    NodeKind.HEAD: ("head",),
}
# `iteration` asks for devices, to count what they send each other: one sends nothing.
_ONE_DEVICE = serving.Cluster(accelerator=datasheets.accelerator("h100"), num_devices=1)


def _weights_read(one: architecture.ModelConfig, node: Node, step: iteration.Step) -> float:
    if node.kind is NodeKind.MLP and one.moe is not None and one.is_sparse(0):
        touched = iteration.touched_experts(one.moe, step.tokens)
        return touched * 3 * one.hidden_size * one.moe.intermediate_size
    return node.parameters


def _one_layer(config: architecture.ModelConfig, layer: int) -> architecture.ModelConfig:
    """The model as if it had that layer alone."""
    moe = config.moe
    if moe is not None:
        moe = dataclasses.replace(moe, sparse_layers=(moe.sparse_layers[layer],))
    return dataclasses.replace(config, num_layers=1, windows=(config.windows[layer],), moe=moe)
