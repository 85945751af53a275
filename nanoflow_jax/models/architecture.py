"""The shape of a model: everything the forward pass needs to know, whatever the family."""

import dataclasses
import enum
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from nanoflow_jax.nanobatch import operations

DEFAULT_ROPE_THETA = 10000.0


class Span(NamedTuple):
    """Layers [start, stop) of a model; embedding and head belong to the first and the last."""

    start: int
    stop: int

    def covers(self, other: "Span") -> bool:
        """Whether all layers of another are among these."""
        return self.start <= other.start and other.stop <= self.stop


def cut(num_layers: int, borders: Iterable[int]) -> tuple[Span, ...]:
    """The segments of a model that is cut at some borders.

    Args:
        num_layers: L.
        borders: Where, ascending; border i is before layer i.

    Raises:
        ValueError: They do not ascend, or one is not between two layers.
    """
    edges = [0, *borders, num_layers]
    spans = tuple(Span(a, b) for a, b in itertools.pairwise(edges))
    if any(span.start >= span.stop for span in spans):
        raise ValueError(
            f"a grid of cuts at {', '.join(map(str, edges[1:-1]))} does not ascend between 0 and "
            f"{num_layers}, the number of layers; give each border once, in order"
        )
    return spans


class Activation(enum.StrEnum):
    """The gate's non-linearity."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; with `factor` set, Llama 3.1's frequency scaling.

    Source: arXiv 2104.09864; the scaling is section 3 of the Llama 3.1 model code's
    description: wavelengths beyond `original_max_len / low_freq_factor` are stretched by
    `factor`, those under `original_max_len / high_freq_factor` kept, those between blended.
    """

    theta: float = DEFAULT_ROPE_THETA
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Sparse feed-forward: E experts, A active per token.

    Attributes:
        normalise: Divide the chosen experts' probabilities by their sum.
        sparse_layers: One entry per layer; False keeps the dense feed-forward there.
    """

    num_experts: int
    num_active: int
    intermediate_size: int
    normalise: bool
    sparse_layers: tuple[bool, ...]

    def __post_init__(self) -> None:
        if self.num_active > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_active} is more than the model's "
                f"{self.num_experts} experts; check config.json"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer.

    Attributes:
        family: Name of the file under `models/families` that reads its weights.
        query_scale: Factor on query-key products.
        windows: One entry per layer: a token sees this many tokens, itself included; None is all.
        attention_softcap: Scores pass through `c * tanh(s / c)`.
        logits_softcap: The same for logits.
        norm_offset: Added to every norm's weight (Gemma stores weight - 1).
        post_norms: Norms also after attention and feed-forward, before the residual.
        embedding_scale: Factor on embeddings.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context_len: int
    norm_eps: float
    rope: RopeConfig
    query_scale: float
    windows: tuple[int | None, ...]
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: Activation = Activation.SILU
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: float = 1.0
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}; check config.json"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding needs pairs")
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"config.json names a window for {len(self.windows)} layers, "
                f"but the model has {self.num_layers}"
            )

    @property
    def group_size(self) -> int:
        """Query heads per kv head: G = N / K."""
        return self.num_heads // self.num_kv_heads

    @property
    def distinct_windows(self) -> tuple[int | None, ...]:
        """Each window that a layer has, once."""
        return tuple(dict.fromkeys(self.windows))

    def is_sparse(self, layer: int) -> bool:
        return self.moe is not None and self.moe.sparse_layers[layer]

    @property
    def layer_shape(self) -> operations.LayerShape:
        """Of a layer that has all operations which any layer has."""
        return operations.LayerShape(is_sparse=any(map(self.is_sparse, range(self.num_layers))))

    @property
    def num_parameters(self) -> int:
        """Weights in total, embeddings included, biases and norms left out."""
        return self._num_parameters(0 if self.moe is None else self.moe.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """Weights that one token meets: of the experts, those that it is sent to."""
        return self._num_parameters(0 if self.moe is None else self.moe.num_active)

    @property
    def num_attention_parameters(self) -> int:
        """Weights of a layer's attention."""
        return (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size

    def _num_parameters(self, experts_counted: int) -> int:
        attention = self.num_attention_parameters
        total = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        for layer in range(self.num_layers):
            total += attention
            if self.moe is not None and self.is_sparse(layer):
                expert = 3 * self.hidden_size * self.moe.intermediate_size
                total += experts_counted * expert + self.moe.num_experts * self.hidden_size
            else:
                total += 3 * self.hidden_size * self.intermediate_size
        return total
