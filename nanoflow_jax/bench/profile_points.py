"""Which operations of a model are timed for its profile, over which sizes, and how much that is."""

import dataclasses
from collections.abc import Iterator, Sequence

from nanoflow_jax.bench import kernel_timing
from nanoflow_jax.models import architecture
from nanoflow_jax.nanobatch import operations
from nanoflow_jax.results.profile import LAUNCH
from pallas_kernels import problem_shapes
from pallas_kernels.gemm_role import GemmTile, default_tile

XLA = "xla"
ATTENTION = ("decode_attention", "prefill_attention")
# Products by what `problem_shapes` calls them.
KERNEL_PRODUCTS = {"kqv": "kqv", "o": "o", "up_gate": "gate_up", "down": "down"}
# What a kernel does of these; XLA makes all else.
_BY_KERNELS = frozenset({"norm_kqv", *KERNEL_PRODUCTS, *ATTENTION})
# Cached tokens of one problem may take so much of a device's memory.
_CACHE_SHARE = 1 / 16
# Rows of products of which a tile is chosen that the default would not take.
_TILE_ROWS = (64, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured.

    Attributes:
        tokens: Rows of products, and tokens of chunks.
        decode_rows: Rows of decode attention.
        contexts: Cached tokens that each row of attention sees on average.
        pair_tokens: Rows of the products of pairs.
        pair_rows: Decode rows beside them.
        pair_context: Cached tokens of each of those.
        share_step: SMs from one cap to the next.
        effort: Of each point.
    """

    tokens: tuple[int, ...]
    decode_rows: tuple[int, ...]
    contexts: tuple[int, ...]
    pair_tokens: tuple[int, ...] = ()
    pair_rows: tuple[int, ...] = ()
    pair_context: int = 1024
    share_step: int = 16
    effort: kernel_timing.Effort

    def __post_init__(self) -> None:
        for flag, numbers in (("tokens", self.tokens), ("contexts", self.contexts)):
            if not numbers or min(numbers) < 1:
                raise ValueError(f"--{flag}={','.join(map(str, numbers))}: give some from 1 on")


GPU = Scale(
    tokens=(128, 256, 512, 1024, 2048),
    decode_rows=(16, 64, 256, 1024),
    contexts=(256, 1024, 4096),
    pair_tokens=(512, 2048),
    pair_rows=(64, 256),
    effort=kernel_timing.Effort(),
)
QUICK_GPU = dataclasses.replace(
    GPU,
    tokens=(256, 1024, 2048),
    decode_rows=(64, 512),
    contexts=(512, 2048),
    pair_tokens=(1024,),
    share_step=32,
    effort=kernel_timing.Effort(rounds=3),
)
CPU = Scale(
    tokens=(16, 32, 64, 128, 256, 512),
    decode_rows=(1, 4, 16, 64, 256),
    contexts=(64, 256, 1024),
    effort=kernel_timing.Effort(rounds=15, sample_s=0.005),
)
QUICK_CPU = dataclasses.replace(
    CPU,
    tokens=(64, 512),
    decode_rows=(4, 256),
    contexts=(64, 1024),
    effort=kernel_timing.Effort(rounds=3, sample_s=0.005),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One program, on all caps that it can be given.

    Attributes:
        operation: As `results.profile.Point` names it; of a pair, its product.
        tokens: Rows.
        context: Of attention.
        by_kernel: Whether our kernel does it, else XLA does.
        tile: How our product is cut; None for the kernel's own choice.
        beside: Decode rows of the attention that runs beside the product, if any.
    """

    operation: str
    tokens: int
    context: int = 0
    by_kernel: bool = False
    tile: GemmTile | None = None
    beside: int | None = None

    @property
    def tile_name(self) -> str:
        """As `results.profile.Point` has it."""
        if self.tile is not None:
            return f"{self.tile.rows} rows"
        return "" if self.by_kernel else XLA

    @property
    def name(self) -> str:
        """What tells it from others."""
        cached = f"+{self.context}" if self.context else ""
        if self.beside is not None:
            return f"{self.operation}/{self.tokens} beside decode/{self.beside}{cached}"
        tile = f", {self.tile_name}" if self.tile_name else ""
        return f"{self.operation}/{self.tokens}{cached}{tile}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What is measured on.

    Attributes:
        num_sms: Of a GPU that runs our kernels; None of what has no shares to give.
        memory_bytes: Of the device.
        item_bytes: Of a number of the model.
    """

    num_sms: int | None
    memory_bytes: int
    item_bytes: int

    def caps(self, step: int) -> tuple[int, ...]:
        """SMs that operations are given, the whole device last."""
        assert self.num_sms is not None
        return (*range(step, self.num_sms, step), self.num_sms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """What will be timed.

    Attributes:
        items: In order: those that tell most come first.
        notes: What is left out, and why.
    """

    items: tuple[Item, ...]
    notes: tuple[str, ...]


def plan(config: architecture.ModelConfig, machine: Machine, scale: Scale) -> Planned:
    """What to time of a model's layer on a machine."""
    notes = []
    if machine.num_sms is None:
        notes = [
            "operations are XLA's, with the one cap 'all': no kernel that keeps to a share of the "
            "device runs here",
            "no pairs: this device runs one operation after another",
        ]
    items, left_out = [], []
    for item in _items(config, machine, scale):
        too_long = item.context > config.max_context_len
        if too_long or _cached_bytes(item, config, machine) > machine.memory_bytes * _CACHE_SHARE:
            left_out.append(item.name)
        else:
            items.append(item)
    if left_out:
        notes.append(
            f"not measured, as the model or {_CACHE_SHARE:.1%} of the memory holds no such "
            f"contexts: {', '.join(left_out)}"
        )
    return Planned(items=tuple(items), notes=tuple(notes))


def _cached_bytes(item: Item, config: architecture.ModelConfig, machine: Machine) -> int:
    tokens = 2 * config.num_kv_heads * config.head_dim * machine.item_bytes * item.context
    return tokens * (item.tokens if item.beside is None else item.beside)


def _items(config: architecture.ModelConfig, machine: Machine, scale: Scale) -> Iterator[Item]:
    yield Item(operation=LAUNCH, tokens=1)
    has_kernels = machine.num_sms is not None
    shape = config.layer_shape
    names = [op.name for op in operations.layer_graph(shape).operations]
    # The largest sizes first: they tell most.
    for tokens in sorted(scale.tokens, reverse=True):
        for name in [*names, "head"]:
            if name not in ATTENTION:
                yield from _products(
                    name, tokens, has_kernels=has_kernels, is_sparse=shape.is_sparse
                )
        for context in scale.contexts:
            yield Item(
                operation="prefill_attention",
                tokens=tokens,
                context=context,
                by_kernel=has_kernels,
            )
    for rows in sorted(scale.decode_rows, reverse=True):
        for context in scale.contexts:
            yield Item(
                operation="decode_attention", tokens=rows, context=context, by_kernel=has_kernels
            )
    if has_kernels:
        yield from _pairs(scale, is_sparse=shape.is_sparse)


def _products(name: str, tokens: int, *, has_kernels: bool, is_sparse: bool) -> Iterator[Item]:
    """Of an operation that is no attention: XLA's, and our kernel's with each tile."""
    yield Item(operation=name, tokens=tokens)
    kernel = "kqv" if name == "norm_kqv" else name
    if not has_kernels or name not in _BY_KERNELS:
        return
    if is_sparse and kernel in ("up_gate", "down"):
        yield Item(operation=kernel, tokens=tokens, by_kernel=True)
        return
    for tile in tiles(2 if kernel == "up_gate" else 1):
        yield Item(operation=kernel, tokens=tokens, by_kernel=True, tile=tile)


def _pairs(scale: Scale, *, is_sparse: bool) -> Iterator[Item]:
    for tokens in scale.pair_tokens:
        for name in ("kqv", "o") if is_sparse else KERNEL_PRODUCTS:
            for rows in scale.pair_rows:
                yield Item(
                    operation=name,
                    tokens=tokens,
                    context=scale.pair_context,
                    by_kernel=True,
                    beside=rows,
                )


def tiles(num_factors: int) -> tuple[GemmTile, ...]:
    """Ways of cutting a product that are worth a look.

    Args:
        num_factors: 2 in a gated layer.
    """
    found = (default_tile("bfloat16", rows, num_factors=num_factors) for rows in _TILE_ROWS)
    return tuple(dict.fromkeys(found))


def layer_of(config: architecture.ModelConfig) -> problem_shapes.Layer:
    """A layer as kernels' problems know it."""
    moe = config.moe if config.layer_shape.is_sparse else None
    return problem_shapes.Layer(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size if moe is None else moe.intermediate_size,
        num_experts=0 if moe is None else moe.num_experts,
        num_active=0 if moe is None else moe.num_active,
    )


def shape_of(config: architecture.ModelConfig, item: Item) -> problem_shapes.Shape:
    """The problem of an item that a kernel of ours does."""
    layer = layer_of(config)
    if item.operation == "decode_attention":
        return problem_shapes.decode(layer, item.tokens, item.context)
    if item.operation == "prefill_attention":
        return problem_shapes.prefill(layer, *chunks(item.tokens, item.context))
    name = KERNEL_PRODUCTS[item.operation]
    product = problem_shapes.products(layer, item.tokens)[name]
    if item.beside is None:
        return product
    assert isinstance(product, problem_shapes.Product)
    decode = problem_shapes.decode(layer, item.beside, item.context)
    return problem_shapes.Pair(product=product, decode=decode)


def chunks(tokens: int, context: int) -> tuple[int, int, int]:
    """Chunks of a prompt whose tokens see so many on average.

    Returns:
        How many, tokens of each, and tokens cached before it.
    """
    length = min(tokens, 2 * context)
    while tokens % length:
        length -= 1
    return tokens // length, length, context - length // 2


def samples_of(item: Item, machine: Machine, scale: Scale) -> int:
    """Points that an item gives."""
    if not item.by_kernel:
        return 1
    assert machine.num_sms is not None
    caps = len(machine.caps(scale.share_step))
    return caps - 1 if item.beside is not None else caps


def seconds_of(
    planned: Sequence[Item], machine: Machine, scale: Scale, *, compile_s: float
) -> tuple[int, float]:
    """How many points there are, and about how long they take.

    Args:
        planned: What will be timed.
        machine: Where.
        scale: How much.
        compile_s: Of a program, with drawing what it reads.
    """
    points = sum(samples_of(item, machine, scale) for item in planned)
    effort = scale.effort
    return points, points * effort.rounds * effort.sample_s + len(planned) * compile_s
