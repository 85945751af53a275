"""Operations of served models by name: what tests, benchmarks and tuning run kernels on.

Floating-point operations count a multiplication and an addition as two; bytes are each operand read
once and each result written once, in bfloat16. A kernel cannot run faster than the slower of the
two allows.

Source: sizes are those of the models' config.json on Hugging Face (meta-llama/Meta-Llama-3-8B and
-70B, Qwen/Qwen3-32B, mistralai/Mixtral-8x7B-v0.1); formulas as in NanoFlow (Zhu et al.,
arXiv 2408.12757, section 3).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int32

DENSE_BATCHES = (256, 512, 1024, 2048, 4096)
PAGE_SIZE = 64
_ITEM_BYTES = 2
# Decode attention: requests and mean cached tokens of each.
_DECODES = ((256, 1024), (512, 512), (64, 8192))
# Prefill attention: chunks, tokens of each, tokens cached before it.
_PREFILLS = ((1, 8192, 0), (1, 2048, 6144), (4, 512, 1536))
# Rows of the product that decode attention of the first size runs beside.
_PAIR_TOKENS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Sizes of one layer, or of one device's share of it.

    Attributes:
        num_experts: E; 0 in a dense layer.
        num_active: A.
        num_shares: Devices that have a share.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int = 0
    num_active: int = 0
    num_shares: int = 1

    def share(self, num_shares: int) -> "Layer":
        """What each of so many devices has under tensor parallelism.

        Raises:
            ValueError: They cannot have equal shares.
        """
        sizes = (self.num_heads, self.num_kv_heads, self.intermediate_size)
        if any(size % num_shares for size in sizes):
            raise ValueError(f"heads and width {sizes} are no multiples of {num_shares} shares")
        heads, kv_heads, width = (size // num_shares for size in sizes)
        return dataclasses.replace(
            self,
            num_heads=heads,
            num_kv_heads=kv_heads,
            intermediate_size=width,
            num_shares=num_shares,
        )


LLAMA_3_8B = Layer(
    hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336
)
LLAMA_3_70B = Layer(
    hidden_size=8192, num_heads=64, num_kv_heads=8, head_dim=128, intermediate_size=28672
)
QWEN3_32B = Layer(
    hidden_size=5120, num_heads=64, num_kv_heads=8, head_dim=128, intermediate_size=25600
)
MIXTRAL_8X7B = dataclasses.replace(LLAMA_3_8B, num_experts=8, num_active=2)

LAYERS: dict[str, Layer] = {
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b-tp8": LLAMA_3_70B.share(8),
    "qwen3-32b-tp4": QWEN3_32B.share(4),
    "mixtral-8x7b": MIXTRAL_8X7B,
}
# What an interpreter gets through; of no model.
TINY = Layer(hidden_size=64, num_heads=4, num_kv_heads=1, head_dim=64, intermediate_size=136)
TINY_EXPERTS = dataclasses.replace(TINY, num_experts=3, num_active=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """x [T, D] times a weight [F, D], or silu of it times a second one.

    Attributes:
        residual: Whether an array of the result's shape is added.
    """

    KERNEL: ClassVar[str] = "gemm"
    num_tokens: int
    depth: int
    num_columns: int
    gated: bool = False
    residual: bool = False

    @property
    def flops(self) -> int:
        """2 T D F, twice if gated."""
        return 2 * self.num_tokens * self.depth * self.num_columns * (1 + self.gated)

    @property
    def num_bytes(self) -> int:
        """Of x, weights, residual and result."""
        weights = self.num_columns * self.depth * (1 + self.gated)
        rows = self.num_tokens * (self.depth + self.num_columns * (1 + self.residual))
        return _ITEM_BYTES * (weights + rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedProduct:
    """Rows of T tokens, A for each, times the weights of their experts."""

    KERNEL: ClassVar[str] = "grouped_gemm"
    num_tokens: int
    depth: int
    num_columns: int
    num_experts: int
    num_active: int
    gated: bool = False

    @property
    def flops(self) -> int:
        """2 T A D F, twice if gated."""
        rows = self.num_tokens * self.num_active
        return 2 * rows * self.depth * self.num_columns * (1 + self.gated)

    @property
    def num_bytes(self) -> int:
        """Of the rows, the weights of all experts, and the results."""
        weights = self.num_experts * self.num_columns * self.depth * (1 + self.gated)
        rows = self.num_tokens * self.num_active * (self.depth + self.num_columns)
        return _ITEM_BYTES * (weights + rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """One query of each of R requests against its cached tokens.

    Attributes:
        context_len: Mean cached tokens.
        ragged: Whether lengths go from 1 to twice the mean, else all are the mean.
    """

    KERNEL: ClassVar[str] = "decode_attention"
    num_requests: int
    context_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ragged: bool = False
    page_size: int = PAGE_SIZE

    def context_lens(self) -> Int32[np.ndarray, "R"]:
        """Cached tokens of each request, always the same ones."""
        if not self.ragged:
            return np.full(self.num_requests, self.context_len, np.int32)
        lens = np.linspace(1, 2 * self.context_len - 1, self.num_requests).round()
        return np.random.default_rng(0).permutation(lens).astype(np.int32)

    @property
    def flops(self) -> int:
        """4 N H for each cached token: scores, and the sum of values."""
        return 4 * self.num_heads * self.head_dim * int(self.context_lens().sum())

    @property
    def num_bytes(self) -> int:
        """Of keys and values, queries and results."""
        cached = 2 * self.num_kv_heads * int(self.context_lens().sum())
        return _ITEM_BYTES * self.head_dim * (cached + 2 * self.num_requests * self.num_heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """Chunks of prompts, all of one length, each causal against its own prefix and itself."""

    KERNEL: ClassVar[str] = "prefill_attention"
    num_chunks: int
    chunk_len: int
    prefix_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = PAGE_SIZE

    @property
    def flops(self) -> int:
        """4 N H for each query and each token it sees."""
        seen = self.chunk_len * self.prefix_len + self.chunk_len * (self.chunk_len + 1) // 2
        return 4 * self.num_heads * self.head_dim * self.num_chunks * seen

    @property
    def num_bytes(self) -> int:
        """Of keys and values, queries and results."""
        cached = 2 * self.num_kv_heads * (self.prefix_len + self.chunk_len)
        rows = 2 * self.num_heads * self.chunk_len
        return _ITEM_BYTES * self.head_dim * self.num_chunks * (cached + rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Decode attention beside a product that does not depend on it."""

    KERNEL: ClassVar[str] = "fused"
    product: Product
    decode: Decode

    @property
    def flops(self) -> int:
        """Of both."""
        return self.product.flops + self.decode.flops

    @property
    def num_bytes(self) -> int:
        """Of both."""
        return self.product.num_bytes + self.decode.num_bytes


Shape = Product | GroupedProduct | Decode | Prefill | Pair
KERNELS: tuple[str, ...] = tuple(
    kind.KERNEL for kind in (Product, Decode, Prefill, GroupedProduct, Pair)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A shape and where it comes from.

    Attributes:
        layer: Name in LAYERS.
        operation: kqv, o, gate_up, down, decode, prefill or a pair of them.
        size: What tells it from others of the operation: tokens, or requests and lengths.
    """

    layer: str
    operation: str
    size: str
    shape: Shape

    @property
    def name(self) -> str:
        """Such as llama-3-8b/gate_up/2048."""
        return f"{self.layer}/{self.operation}/{self.size}"


def products(layer: Layer, num_tokens: int) -> dict[str, Product | GroupedProduct]:
    """Products of a layer by operation; those of experts are grouped.

    A share's results are summed over devices before the residual, so it adds none.
    """
    heads, kv_heads = (n * layer.head_dim for n in (layer.num_heads, layer.num_kv_heads))
    residual = layer.num_shares == 1
    width, inner = layer.hidden_size, layer.intermediate_size
    found: dict[str, Product | GroupedProduct] = {
        "kqv": Product(num_tokens=num_tokens, depth=width, num_columns=heads + 2 * kv_heads),
        "o": Product(num_tokens=num_tokens, depth=heads, num_columns=width, residual=residual),
    }
    if layer.num_experts:
        experts: dict[str, Any] = {
            "num_tokens": num_tokens,
            "num_experts": layer.num_experts,
            "num_active": layer.num_active,
        }
        return found | {
            "gate_up": GroupedProduct(**experts, depth=width, num_columns=inner, gated=True),
            "down": GroupedProduct(**experts, depth=inner, num_columns=width),
        }
    return found | {
        "gate_up": Product(num_tokens=num_tokens, depth=width, num_columns=inner, gated=True),
        "down": Product(num_tokens=num_tokens, depth=inner, num_columns=width, residual=residual),
    }


def decode(layer: Layer, num_requests: int, context_len: int, *, ragged: bool = False) -> Decode:
    """Decode attention of a layer."""
    return Decode(
        num_requests=num_requests, context_len=context_len, ragged=ragged, **_heads(layer)
    )


def prefill(layer: Layer, num_chunks: int, chunk_len: int, prefix_len: int) -> Prefill:
    """Prefill attention of a layer."""
    return Prefill(
        num_chunks=num_chunks, chunk_len=chunk_len, prefix_len=prefix_len, **_heads(layer)
    )


def _heads(layer: Layer) -> dict[str, int]:
    return {
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
    }


def problems() -> tuple[Problem, ...]:
    """All served problems, those first that tell most: first each operation once."""
    found: list[Problem] = []
    ranks: list[tuple[int, int]] = []
    for number, (name, layer) in enumerate(LAYERS.items()):
        for rank, problem in _of_layer(name, layer):
            found.append(problem)
            ranks.append((rank, number))
    order = sorted(range(len(found)), key=lambda i: (*ranks[i], i))
    return tuple(found[i] for i in order)


def tiny_problems() -> tuple[Problem, ...]:
    """One problem of each kernel that an interpreter gets through in seconds."""
    pair = Pair(
        product=Product(num_tokens=136, depth=64, num_columns=136, gated=True),
        decode=decode(TINY, 3, 40, ragged=True),
    )
    shapes: dict[tuple[str, str], Shape] = {
        ("gate_up", "136"): pair.product,
        ("decode", "3x40-ragged"): pair.decode,
        ("prefill", "2x24+40"): prefill(TINY, 2, 24, 40),
        ("down", "24"): products(TINY_EXPERTS, 24)["down"],
        ("decode+gate_up", "136"): pair,
    }
    return tuple(
        Problem(layer="tiny", operation=operation, size=size, shape=shape)
        for (operation, size), shape in shapes.items()
    )


def _of_layer(name: str, layer: Layer) -> Iterator[tuple[int, Problem]]:
    """Problems of one layer with how soon each should come."""

    def problem(operation: str, size: Any, shape: Shape) -> Problem:
        return Problem(layer=name, operation=operation, size=str(size), shape=shape)

    for num_tokens in DENSE_BATCHES:
        # The largest batch and a nano-batch's tell most.
        rank = {4096: 0, 512: 1}.get(num_tokens, 2)
        for operation, product in products(layer, num_tokens).items():
            later = 0 if operation in ("gate_up", "down") else 1
            yield rank + later, problem(operation, num_tokens, product)
    # Experts change nothing of attention.
    if layer.num_experts:
        return
    for i, (requests, context) in enumerate(_DECODES):
        for ragged in (False, True):
            size = f"{requests}x{context}{'-ragged' if ragged else ''}"
            shape = decode(layer, requests, context, ragged=ragged)
            yield min(i + ragged, 2), problem("decode", size, shape)
    for i, (chunks, length, prefix) in enumerate(_PREFILLS):
        size = f"{chunks}x{length}+{prefix}"
        yield min(i, 2), problem("prefill", size, prefill(layer, chunks, length, prefix))
    product = products(layer, _PAIR_TOKENS)["gate_up"]
    assert isinstance(product, Product)
    beside = Pair(product=product, decode=decode(layer, *_DECODES[0]))
    yield 0, problem("decode+gate_up", _PAIR_TOKENS, beside)
