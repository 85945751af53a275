"""Which Hugging Face tensors make up each of our weights, and how they are put together."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from nanoflow_jax.models import architecture

# Buffers that old checkpoints stored beside the weights; they follow from the config.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The tensors behind one weight.

    Attributes:
        shapes: Tensor name to the shape it must have, in the order that `assemble` takes.
        assemble: Makes the weight, in its own shape, from the tensors.
    """

    shapes: Mapping[str, tuple[int, ...]]
    assemble: Callable[[Sequence[np.ndarray]], np.ndarray]


WeightMap = dict[str, Source]


def single(name: str, shape: tuple[int, ...]) -> Source:
    """A weight that is one tensor as it is."""
    return Source(shapes={name: shape}, assemble=lambda tensors: tensors[0])


def standard_map(config: architecture.ModelConfig) -> WeightMap:
    """The names that Llama set and most families kept."""
    c = config
    width = c.hidden_size
    found: WeightMap = {
        "embedding": single("model.embed_tokens.weight", (c.vocab_size, width)),
        "norm": single("model.norm.weight", (width,)),
    }
    if not c.tied_embeddings:
        found["head"] = single("lm_head.weight", (c.vocab_size, width))
    for layer in range(c.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        found[f"{ours}.attention_norm"] = single(f"{theirs}.input_layernorm.weight", (width,))
        found[f"{ours}.feed_forward_norm"] = single(
            f"{theirs}.post_attention_layernorm.weight", (width,)
        )
        found |= _attention(c, ours, f"{theirs}.self_attn")
        if not c.is_sparse(layer):
            found |= _dense(c, ours, f"{theirs}.mlp")
    return found


def _attention(c: architecture.ModelConfig, ours: str, theirs: str) -> WeightMap:
    width, kv, group, head = c.hidden_size, c.num_kv_heads, c.group_size, c.head_dim

    def join(tensors: Sequence[np.ndarray]) -> np.ndarray:
        q, k, v = tensors
        rest = q.shape[1:]
        parts = (
            q.reshape(kv, group, head, *rest),
            k.reshape(kv, 1, head, *rest),
            v.reshape(kv, 1, head, *rest),
        )
        return np.concatenate(parts, axis=1)

    sizes = {"q_proj": kv * group * head, "k_proj": kv * head, "v_proj": kv * head}
    found: WeightMap = {
        f"{ours}.qkv": Source(
            shapes={f"{theirs}.{n}.weight": (size, width) for n, size in sizes.items()},
            assemble=join,
        ),
        f"{ours}.o": Source(
            shapes={f"{theirs}.o_proj.weight": (width, kv * group * head)},
            assemble=lambda tensors: tensors[0].reshape(width, kv, group, head),
        ),
    }
    if c.qkv_bias:
        found[f"{ours}.qkv_bias"] = Source(
            shapes={f"{theirs}.{n}.bias": (size,) for n, size in sizes.items()}, assemble=join
        )
    if c.o_bias:
        found[f"{ours}.o_bias"] = single(f"{theirs}.o_proj.bias", (width,))
    if c.qk_norm:
        found[f"{ours}.query_norm"] = single(f"{theirs}.q_norm.weight", (head,))
        found[f"{ours}.key_norm"] = single(f"{theirs}.k_norm.weight", (head,))
    return found


def _dense(c: architecture.ModelConfig, ours: str, theirs: str) -> WeightMap:
    width, hidden = c.hidden_size, c.intermediate_size
    found: WeightMap = {
        f"{ours}.gate_up": Source(
            shapes={
                f"{theirs}.gate_proj.weight": (hidden, width),
                f"{theirs}.up_proj.weight": (hidden, width),
            },
            assemble=np.stack,
        ),
        f"{ours}.down": single(f"{theirs}.down_proj.weight", (width, hidden)),
    }
    if c.mlp_bias:
        found[f"{ours}.gate_up_bias"] = Source(
            shapes={
                f"{theirs}.gate_proj.bias": (hidden,),
                f"{theirs}.up_proj.bias": (hidden,),
            },
            assemble=np.stack,
        )
        found[f"{ours}.down_bias"] = single(f"{theirs}.down_proj.bias", (width,))
    return found


def experts(
    config: architecture.ModelConfig,
    layer: int,
    *,
    router: str,
    expert: str,
    gate: str,
    up: str,
    down: str,
) -> WeightMap:
    """The sparse feed-forward of one layer.

    Args:
        config: The model.
        layer: Which layer.
        router: Name of the router's tensor.
        expert: Prefix of one expert's tensors, with `{}` for its number.
        gate: Name of the gate projection under that prefix.
        up: Name of the up projection.
        down: Name of the down projection.
    """
    assert config.moe is not None
    count, hidden, width = (
        config.moe.num_experts,
        config.moe.intermediate_size,
        config.hidden_size,
    )

    def join(tensors: Sequence[np.ndarray]) -> np.ndarray:
        pairs = [np.stack(tensors[i : i + 2]) for i in range(0, len(tensors), 2)]
        return np.stack(pairs)

    both = {
        f"{expert.format(e)}.{name}.weight": (hidden, width)
        for e in range(count)
        for name in (gate, up)
    }
    downs = {f"{expert.format(e)}.{down}.weight": (width, hidden) for e in range(count)}
    return {
        f"layers.{layer}.router": single(router, (count, width)),
        f"layers.{layer}.experts_gate_up": Source(shapes=both, assemble=join),
        f"layers.{layer}.experts_down": Source(shapes=downs, assemble=np.stack),
    }


def check_complete(
    found: Mapping[str, tuple[int, ...]],
    weights: WeightMap,
    *,
    known: WeightMap | None = None,
    tied_embeddings: bool,
) -> None:
    """Raises unless a folder holds every tensor of a model, in its shape, and no unknown one.

    Args:
        found: Tensor name to shape, as the folder has them.
        weights: What is needed.
        known: What the whole model needs, if this is a part of it.
        tied_embeddings: A stored head is a copy of the embedding then, and is not read.

    Raises:
        ValueError: A tensor is missing, misshapen, or has no place in the model.
    """
    wanted = {name: shape for source in weights.values() for name, shape in source.shapes.items()}
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(
            f"the folder lacks {_some(missing)}: the download is incomplete or config.json "
            "belongs to another model"
        )
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise ValueError(
                f"tensor {name} has shape {tuple(found[name])}, but config.json asks for {shape}: "
                "the weights belong to another model"
            )
    spare = set(found) - {name for source in (known or weights).values() for name in source.shapes}
    spare = {name for name in spare if not name.endswith(_DERIVED_SUFFIXES)}
    if tied_embeddings:
        spare.discard("lm_head.weight")
    if spare:
        raise ValueError(
            f"config.json has no place for {_some(sorted(spare))}: ignoring weights would change "
            "the result; the weights belong to another model or family"
        )


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more tensors" if len(names) > most else ""
    return ", ".join(names[:most]) + more
