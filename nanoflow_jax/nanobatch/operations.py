"""A layer as a graph of named operations: what each reads and writes, and what bounds it.

Dependencies are not written down anywhere: they follow from what operations read and write. The
names are those of the `jax.named_scope` in which an operation runs, so that a profile, a plan and
a cost model speak of the same thing.

With several devices to a layer, two products have two layouts of their weight each, and every
token takes one of them (`Choice`). With the weight split along the summed axis, each device has
a part of the sum of every output, and an all-reduce adds them up. With the weight split by
columns, the input is gathered before the product and the output after it.
"""

import dataclasses
import enum
import functools


class Resource(enum.StrEnum):
    """What an operation keeps busy."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class Rows(enum.StrEnum):
    """How the rows of a value lie.

    TOKENS: in the order of the dense batch, so that any range of tokens can be cut out.
    GROUPED: sorted by expert among the tokens of one nano-operation; only a nano-operation of
        the same tokens can read them.
    DECODE: decode rows alone, those of each cell by themselves.
    CACHE: in pages of the KV cache, those of earlier steps too.
    """

    TOKENS = "tokens"
    GROUPED = "grouped"
    DECODE = "decode"
    CACHE = "cache"


@dataclasses.dataclass(frozen=True)
class Value:
    """What operations pass on, named as in the code of the layer."""

    name: str
    rows: Rows = Rows.TOKENS


# The residual stream as it enters a layer, between its two halves, and as it leaves.
X = Value("x")
MIDDLE = Value("middle")
Y = Value("y")
QKV = Value("qkv")
ROTATED = Value("rotated")
CACHE = Value("cache", Rows.CACHE)
# What both attentions give: the first for decode rows, the second for tokens of chunks.
DECODED = Value("decoded", Rows.DECODE)
PREFILLED = Value("prefilled")
NORMED = Value("normed")
ROUTED = Value("routed", Rows.GROUPED)
HIDDEN = Value("hidden")
HIDDEN_GROUPED = Value("hidden", Rows.GROUPED)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the ways of a product over several devices.

    Attributes:
        product: Which product: `o` or `down`.
        way: `reduce` or `gather`.
    """

    product: str
    way: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of a layer.

    Attributes:
        name: Unique in the layer.
        resource: What bounds it.
        reads: Values of its tokens that it needs.
        writes: The value of its tokens that it makes. Operations that write the same value belong
            to different ways of a product and fill in different tokens.
        sees_earlier: Reads the cache also where earlier tokens of the same dense batch lie.
        has_weights: Whether it multiplies with weights, which all its nano-operations share.
        choice: Which way of a product it belongs to, if that product has several.
    """

    name: str
    resource: Resource
    reads: tuple[Value, ...]
    writes: Value
    sees_earlier: bool = False
    has_weights: bool = False
    choice: Choice | None = None

    @property
    def is_token_wise(self) -> bool:
        """Whether a token's result follows from values of that token alone."""
        return CACHE not in self.reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGraph:
    """The operations of one layer, each after those that write what it reads.

    The layer reads `X`, which is the `Y` of the layer before.
    """

    operations: tuple[Operation, ...]

    def __post_init__(self) -> None:
        names = [op.name for op in self.operations]
        assert len(set(names)) == len(names), "two operations have one name"
        known = {X}
        for op in self.operations:
            assert known.issuperset(op.reads), f"{op.name} reads what nobody has written"
            known.add(op.writes)
        assert Y in known, "nothing leaves the layer"

    @functools.cached_property
    def by_name(self) -> dict[str, Operation]:
        """Operations by name."""
        return {op.name: op for op in self.operations}

    def writers(self, value: Value) -> tuple[Operation, ...]:
        """Operations that write a value; none of this layer writes X."""
        return tuple(op for op in self.operations if value == op.writes)

    @functools.cached_property
    def choices(self) -> dict[str, dict[str, tuple[Operation, ...]]]:
        """Operations by product and way, of products that have several ways."""
        found: dict[str, dict[str, tuple[Operation, ...]]] = {}
        for op in self.operations:
            if op.choice is not None:
                ways = found.setdefault(op.choice.product, {})
                ways[op.choice.way] = (*ways.get(op.choice.way, ()), op)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What decides which operations a layer has.

    Attributes:
        is_sparse: Whether its feed-forward is a mixture of experts.
        num_devices: Devices that share a layer (tensor parallel).
    """

    is_sparse: bool = False
    num_devices: int = 1

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ValueError(
                f"num_devices={self.num_devices} cannot hold a layer; give it at least 1"
            )


@functools.cache
def layer_graph(shape: LayerShape) -> LayerGraph:
    """The operations of a layer of this shape."""
    is_split = shape.num_devices > 1
    o = _output_ways() if is_split else (_compute("o", (X, DECODED, PREFILLED), MIDDLE),)
    return LayerGraph(operations=(*_attention(), *o, *_feed_forward(shape)))


def _compute(
    name: str, reads: tuple[Value, ...], writes: Value, *, choice: Choice | None = None
) -> Operation:
    return Operation(
        name=name,
        resource=Resource.COMPUTE,
        reads=reads,
        writes=writes,
        has_weights=True,
        choice=choice,
    )


def _network(
    name: str, reads: tuple[Value, ...], writes: Value, choice: Choice | None = None
) -> Operation:
    return Operation(
        name=name, resource=Resource.NETWORK, reads=reads, writes=writes, choice=choice
    )


def _attention() -> tuple[Operation, ...]:
    memory = functools.partial(Operation, resource=Resource.MEMORY)
    return (
        _compute("norm_kqv", (X,), QKV),
        memory(name="rope", reads=(QKV,), writes=ROTATED),
        memory(name="append", reads=(QKV, ROTATED), writes=CACHE),
        memory(name="decode_attention", reads=(ROTATED, CACHE), writes=DECODED),
        Operation(
            name="prefill_attention",
            resource=Resource.COMPUTE,
            reads=(ROTATED, CACHE),
            writes=PREFILLED,
            sees_earlier=True,
        ),
    )


def _output_ways() -> tuple[Operation, ...]:
    """O of several devices; the residual is added where the sum or the columns are whole."""
    reduce, gather = Choice("o", "reduce"), Choice("o", "gather")
    partial, heads, columns = Value("o_partial"), Value("attended_all"), Value("o_columns")
    return (
        _compute("o", (DECODED, PREFILLED), partial, choice=reduce),
        _network("o_reduce", (X, partial), MIDDLE, reduce),
        _network("attention_gather", (DECODED, PREFILLED), heads, gather),
        _compute("o_columns", (heads,), columns, choice=gather),
        _network("o_gather", (X, columns), MIDDLE, gather),
    )


def _feed_forward(shape: LayerShape) -> tuple[Operation, ...]:
    norm = Operation(name="norm", resource=Resource.MEMORY, reads=(MIDDLE,), writes=NORMED)
    reduce, gather = Choice("down", "reduce"), Choice("down", "gather")
    partial, all_hidden, columns = Value("down_partial"), Value("hidden_all"), Value("down_columns")
    hidden = HIDDEN_GROUPED if shape.is_sparse else HIDDEN
    if shape.num_devices == 1:
        down: tuple[Operation, ...] = (_compute("down", (MIDDLE, hidden), Y),)
    elif shape.is_sparse:  # its rows are sorted by expert until down has put them back
        down = (
            _compute("down", (hidden,), partial),
            _network("down_reduce", (MIDDLE, partial), Y),
        )
    else:
        down = (
            _compute("down", (hidden,), partial, choice=reduce),
            _network("down_reduce", (MIDDLE, partial), Y, reduce),
            _network("hidden_gather", (hidden,), all_hidden, gather),
            _compute("down_columns", (all_hidden,), columns, choice=gather),
            _network("down_gather", (MIDDLE, columns), Y, gather),
        )
    if not shape.is_sparse:
        return (norm, _compute("up_gate", (NORMED,), HIDDEN), *down)
    return (
        norm,
        _compute("route", (NORMED,), ROUTED),
        _compute("up_gate", (ROUTED,), HIDDEN_GROUPED),
        *down,
    )
