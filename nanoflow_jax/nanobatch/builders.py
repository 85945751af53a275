"""Plans that follow from a model's shape and a few sizes."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from nanoflow_jax.nanobatch import legality, operations
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import (
    GRANULE,
    H200_SMS,
    NanoOperation,
    Plan,
    TokenRange,
    find_cells,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What a plan shares out, and how finely.

    Attributes:
        num_sms: SMs.
        attention_ctas: SMs for decode attention. By the roofline 32 of an H200's 132 keep an 8B
            model's attention about as long as its products where requests are 512/512 or 1024/512
            (`python -m nanoflow_jax.overlap`), and with the 100 that are left the 896 tiles of
            up-gate of 1024 tokens are nine rounds that are nearly full; with 84, eleven.
        network_ctas: SMs for collectives; none without several devices.
        granule: Ranges begin at its multiples.
    """

    num_sms: int = H200_SMS
    attention_ctas: int = 32
    network_ctas: int = 16
    granule: int = GRANULE


def one(
    shape: operations.LayerShape,
    *,
    num_tokens: int,
    num_sms: int = H200_SMS,
    by_columns: Collection[str] = (),
) -> Plan:
    """The plain forward pass: nothing is split, and one operation runs after another.

    Products over several devices take the all-reduce, but those of `by_columns` the gathers.
    """
    whole = TokenRange(0, num_tokens)
    graph = operations.layer_graph(shape)
    order = [
        NanoOperation(operation=op.name, tokens=whole, lane=Resource.COMPUTE)
        for op in graph.operations
        if op.choice is None
        or op.choice.way == ("gather" if op.choice.product in by_columns else "reduce")
    ]
    return _finish("one", shape, order, num_tokens=num_tokens, num_sms=num_sms, granule=GRANULE)


def share_out(num_sms: int, *, granule: int = GRANULE) -> Device:
    """A device of any size, shared as the default one is, which nobody has measured yet."""
    usual = Device()
    return Device(
        num_sms=num_sms,
        attention_ctas=max(1, usual.attention_ctas * num_sms // usual.num_sms),
        network_ctas=max(1, usual.network_ctas * num_sms // usual.num_sms),
        granule=granule,
    )


def halves(
    shape: operations.LayerShape,
    *,
    num_tokens: int,
    first: int | None = None,
    device: Device | None = None,
) -> Plan:
    """Two halves on one GPU: decode attention of one beside the products of the other.

    In lanes, A and B being the halves and l + 1 the next layer:

        memory   decode A, l + 1           | decode B, l + 1
        compute  o to down B, l; kqv B, l+1 | o to down A, l + 1; kqv A, l + 2

    Prefill attention runs in the compute lane right after its append: later, it would wait for
    the other half's append too.

    Args:
        shape: Of a layer.
        num_tokens: Tokens of the dense batch, at least two granules.
        first: Tokens of half A, a multiple of the granule; half of all if None.
        device: How to share the GPU; None takes the defaults.

    Raises:
        ValueError: The layer is spread over several devices, or the halves cannot be.

    Source: arXiv 2408.12757 section 4, the pipeline of an 8B model on one GPU.
    """
    device = device or Device()
    if shape.num_devices > 1:
        raise ValueError(
            f"a plan of halves runs on one device and the layer is spread over "
            f"{shape.num_devices}; take tensor_parallel"
        )
    a, b = _halve(num_tokens, first, device.granule)
    layer = _Layer(shape, compute=device.num_sms - device.attention_ctas, device=device)
    order = [
        *layer.nano("decode_attention", a, shift=1),
        *layer.after_attention(b, shift=0),
        *layer.before_attention([b], shift=1),
        *layer.nano("prefill_attention", b, shift=1),
        *layer.nano("decode_attention", b, shift=1),
        *layer.after_attention(a, shift=1),
        *layer.before_attention([a], shift=2),
        *layer.nano("prefill_attention", a, shift=2),
    ]
    return _finish(
        "halves",
        shape,
        order,
        num_tokens=num_tokens,
        num_sms=device.num_sms,
        granule=device.granule,
    )


def tensor_parallel(
    shape: operations.LayerShape,
    *,
    num_tokens: int,
    first: int | None = None,
    gathers: bool = True,
    device: Device | None = None,
) -> Plan:
    """Several devices to a layer: collectives and decode attention under products.

    The halves are A = A1 + A2 and B = B1 + B2. What runs beside what, from the start of a layer:

        compute             memory       network
        kqv A1              |            down_reduce B1 of the layer before
        kqv A2, prefill A   decode A1    down_reduce B2 of it
        kqv B1              decode A2    |
        kqv B2, prefill B   decode B1    attention_gather A
        o_columns A         decode B2    |
        o B                 |            o_gather A
        up_gate, down A     |            o_reduce B
        up_gate, down B     |            down_reduce A

    A's o has its weight by columns, between two gathers; B's has it along the summed axis, before
    an all-reduce, which replaces both of B's gathers: a gather before o could hide under nothing.

    Args:
        shape: Of a layer, on at least two devices.
        num_tokens: Tokens of the dense batch, at least four granules.
        first: Tokens of half A, a multiple of the granule; half of all if None.
        gathers: Whether A's o is the one by columns; otherwise it is as B's.
        device: How to share each GPU; None takes the defaults.

    Raises:
        ValueError: The layer is on one device, or the parts cannot be.

    Source: arXiv 2408.12757 figure 6, the pipeline of a 70B model on 8 GPUs.
    """
    device = device or Device()
    if shape.num_devices == 1:
        raise ValueError("a tensor-parallel plan needs several devices to a layer; take halves")
    a, b = _halve(num_tokens, first, device.granule)
    a1, a2 = _cut(a, None, device.granule)
    b1, b2 = _cut(b, None, device.granule)
    beside_network = device.num_sms - device.network_ctas
    early = _Layer(shape, compute=beside_network - device.attention_ctas, device=device)
    late = _Layer(shape, compute=beside_network, device=device)
    output = ("attention_gather", "o_columns", "o_gather") if gathers else ("o", "o_reduce")
    order = [
        *early.attention(a1),
        *early.attention(a2),
        *early.nano("prefill_attention", a),
        *early.attention(b1),
        *early.attention(b2),
        *early.nano("prefill_attention", b),
        *(nano for name in output for nano in early.nano(name, a)),
        *late.nano("o", b),
        *late.nano("o_reduce", b),
        *late.feed_forward(a),
        *late.nano("down_reduce", a),
        *late.feed_forward(b),
        *late.nano("down_reduce", b1),
        *late.nano("down_reduce", b2),
    ]
    return _finish(
        "tensor_parallel",
        shape,
        order,
        num_tokens=num_tokens,
        num_sms=device.num_sms,
        granule=device.granule,
    )


class _Layer:
    """Makes nano-operations of one layer in their usual lanes.

    What XLA makes itself (rope, append, norm) is short, has no cap and is in no lane.
    """

    def __init__(self, shape: operations.LayerShape, *, compute: int, device: Device) -> None:
        self._graph = operations.layer_graph(shape)
        self._ctas = {
            Resource.COMPUTE: compute,
            Resource.MEMORY: device.attention_ctas,
            Resource.NETWORK: device.network_ctas,
        }

    def nano(self, name: str, tokens: TokenRange, *, shift: int = 0) -> list[NanoOperation]:
        op = self._graph.by_name.get(name)
        if op is None:  # dense layers do not route
            return []
        is_short = name in ("rope", "append", "norm")
        lane = None if is_short else op.resource
        ctas = None if lane is None else self._ctas[lane]
        return [NanoOperation(operation=name, tokens=tokens, lane=lane, num_ctas=ctas, shift=shift)]

    def before_attention(
        self, parts: Iterable[TokenRange], *, shift: int = 0
    ) -> list[NanoOperation]:
        names = ("norm_kqv", "rope", "append")
        return [
            n for tokens in parts for name in names for n in self.nano(name, tokens, shift=shift)
        ]

    def attention(self, tokens: TokenRange) -> list[NanoOperation]:
        return [*self.before_attention([tokens]), *self.nano("decode_attention", tokens)]

    def feed_forward(self, tokens: TokenRange, *, shift: int = 0) -> list[NanoOperation]:
        names = ("norm", "route", "up_gate", "down")
        return [nano for name in names for nano in self.nano(name, tokens, shift=shift)]

    def after_attention(self, tokens: TokenRange, *, shift: int = 0) -> list[NanoOperation]:
        return [*self.nano("o", tokens, shift=shift), *self.feed_forward(tokens, shift=shift)]


def _halve(num_tokens: int, first: int | None, granule: int) -> tuple[TokenRange, TokenRange]:
    return _cut(TokenRange(0, num_tokens), first, granule)


def _cut(tokens: TokenRange, first: int | None, granule: int) -> tuple[TokenRange, TokenRange]:
    """Two parts, the first of `first` tokens, or of half of them, rounded down to the granule."""
    if first is None:
        first = tokens.length // 2 // granule * granule
    if not 0 < first < tokens.length:
        raise ValueError(
            f"{tokens} cannot be cut after {first} tokens; each part needs at least the granule "
            f"of {granule} tokens: take a larger dense batch, a smaller granule or one nano-batch"
        )
    middle = tokens.start + first
    return TokenRange(tokens.start, middle), TokenRange(middle, tokens.stop)


def _finish(
    name: str,
    shape: operations.LayerShape,
    order: Sequence[NanoOperation],
    *,
    num_tokens: int,
    num_sms: int,
    granule: int,
) -> Plan:
    """The plan, checked; decode rows are dealt as tokens are."""
    cells = find_cells([nano.tokens for nano in order], num_tokens=num_tokens)
    plan = Plan(
        name=name,
        shape=shape,
        num_tokens=num_tokens,
        granule=granule,
        num_sms=num_sms,
        decode_weights=tuple(cell.length for cell in cells),
        order=tuple(order),
    )
    legality.check(plan)
    return plan
