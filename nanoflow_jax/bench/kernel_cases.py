"""Kernels with the operands that they are checked and timed on, each beside its reference."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanoflow_jax.bench.draw import Draw
from nanoflow_jax.engine.kernel_choice import Maker
from pallas_kernels import decode_attention as decode_lib
from pallas_kernels import gemm as gemm_lib
from pallas_kernels import grouped_gemm as grouped_lib
from pallas_kernels import mosaic, prefill_tiles, work_list
from pallas_kernels import prefill_attention as prefill_lib
from pallas_kernels.decode_attention_triton import decode_attention_triton
from pallas_kernels.prefill_attention_triton import prefill_attention_triton
from pallas_kernels.side_by_side import side_by_side

# Of the 2-norm of a result: its rounding, that of the weights that multiply values, and the GPU's
# approximate exp2. Products of float32 are made of TF32, ten bits of mantissa.
_GEMM_ERROR = {"bfloat16": 4e-3, "float32": 2e-3}
_ATTENTION_ERROR = 1e-2
# What tells a case of a maker from another one's.
_SUFFIXES = {Maker.MOSAIC: "", Maker.TRITON: ", Triton"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel on one set of operands.

    Attributes:
        name: Of the kernel and its shape.
        operands: Arrays, drawn anew for each case.
        kernel: Takes the operands, then num_ctas and interpret by name; a tuple of results.
        reference: Takes the operands; the same results by the plain functions.
        relative_error: Largest distance of the two, as a share of the reference, in the 2-norm.
        num_ctas: Caps to run the kernel with.
        maker: Whose kernel it is.
    """

    name: str
    operands: Sequence[Any]
    kernel: Callable[..., tuple[Any, ...]]
    reference: Callable[..., tuple[Any, ...]]
    relative_error: float
    num_ctas: Sequence[int]
    maker: Maker = Maker.MOSAIC


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the cases are.

    Attributes:
        tokens: T of products and of prefill, and the ragged T beside it, so few that an expert has
            no more rows than the smallest tile.
        hidden: D.
        intermediate: F of the gated product.
        heads: N and K.
        head_dim: H.
        requests: R of decode.
        longest: Longest context.
        page_sizes: S; the first is the default.
        experts: E and A.
        num_ctas: Caps; the last is the whole device.
    """

    tokens: tuple[int, int]
    hidden: int
    intermediate: int
    heads: tuple[int, int]
    head_dim: int
    requests: int
    longest: int
    page_sizes: Sequence[int]
    experts: tuple[int, int]
    num_ctas: Sequence[int]


# Llama-3-8B's, with Mixtral's experts.
SERVED = Sizes(
    tokens=(2048, 203),
    hidden=4096,
    intermediate=14336,
    heads=(32, 8),
    head_dim=128,
    requests=256,
    longest=2048,
    page_sizes=(64, 16),
    experts=(8, 2),
    num_ctas=(16, 48, 100, 132),
)
# What an interpreter gets through: a few tiles each.
TINY = Sizes(
    tokens=(136, 13),
    hidden=64,
    intermediate=136,
    heads=(4, 1),
    head_dim=64,
    requests=3,
    longest=90,
    page_sizes=(64, 16),
    experts=(3, 2),
    num_ctas=(1, 3),
)


def cases(sizes: Sizes, seed: int) -> list[Case]:
    """All kernels; the same seed gives the same operands.

    Args:
        sizes: How large.
        seed: Of all random numbers.
    """
    draw = Draw(seed)
    return [
        *_products(sizes, draw),
        *(_grouped(sizes, draw, rows) for rows in sizes.tokens),
        *(_decode(sizes, draw, page_size) for page_size in sizes.page_sizes),
        *(_prefill(sizes, draw, rows) for rows in sizes.tokens),
        _fused(sizes, draw),
        _pod(sizes, draw),
        *(_decode(sizes, draw, size, maker=Maker.TRITON) for size in sizes.page_sizes),
        *(_prefill(sizes, draw, rows, maker=Maker.TRITON) for rows in sizes.tokens),
    ]


def _products(sizes: Sizes, draw: Draw) -> list[Case]:
    rows, ragged = sizes.tokens
    width, inner = sizes.hidden, sizes.intermediate
    float8 = jnp.float8_e4m3fn

    def scale(count: int) -> jax.Array:
        return jnp.abs(draw.normal(count, dtype=jnp.float32)) + 0.1

    def operands(count: int, depth: int, columns: int, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
        return {
            "x": draw.normal(count, depth, dtype=dtype),
            "w": draw.normal(columns, depth, dtype=dtype),
        }

    made = {
        f"gemm {rows} x {width} x {inner}, gated": {
            **operands(rows, width, inner),
            "w_up": draw.normal(inner, width),
        },
        f"gemm {rows} x {inner} x {width}, residual": {
            **operands(rows, inner, width),
            "residual": draw.normal(rows, width),
        },
        f"gemm {ragged} x {width} x {width}, bias": {
            **operands(ragged, width, width),
            "bias": draw.normal(width),
        },
        f"gemm {ragged} x {width} x {width}, float32": operands(
            ragged, width, width, dtype=jnp.float32
        ),
        f"gemm {rows} x {width} x {width}, float8": {
            **operands(rows, width, width, dtype=float8),
            "x_scale": scale(rows),
            "w_scale": scale(width),
        },
    }
    return [_product(name, fields, sizes) for name, fields in made.items()]


def _product(name: str, fields: dict[str, Any], sizes: Sizes) -> Case:
    names = list(fields)

    def kernel(*arrays: Any, num_ctas: int, interpret: Any) -> tuple[Any, ...]:
        given = dict(zip(names, arrays, strict=True))
        return (gemm_lib.gemm(**given, num_ctas=num_ctas, interpret=interpret),)

    def reference(*arrays: Any) -> tuple[Any, ...]:
        return (gemm_lib.gemm_reference(**dict(zip(names, arrays, strict=True))),)

    dtype = str(fields["x"].dtype)
    return Case(
        name=name,
        operands=list(fields.values()),
        kernel=kernel,
        reference=reference,
        relative_error=_GEMM_ERROR.get(dtype, _GEMM_ERROR["bfloat16"]),
        num_ctas=sizes.num_ctas,
    )


def _grouped(sizes: Sizes, draw: Draw, rows: int) -> Case:
    width, inner = sizes.hidden, sizes.intermediate
    num_experts, active = sizes.experts
    # The last expert gets no token.
    chosen = np.argsort(draw.host.random((rows, num_experts - 1)), axis=1)[:, :active]
    weights = draw.normal(num_experts, 2 * inner, width)
    x, experts = draw.normal(rows, width), jnp.asarray(chosen, jnp.int32)

    def both(product: Callable[..., Any], x: Any, w: Any, experts: Any) -> tuple[Any, ...]:
        groups = grouped_lib.plan_groups(experts, num_experts=num_experts)
        made = product(grouped_lib.permute(x, groups), w, groups, gated=True)
        # Rows after the used tiles hold anything.
        is_row = groups.sources < rows
        return (jnp.where(is_row[:, None], made, 0),)

    def kernel(*arrays: Any, num_ctas: int, interpret: Any) -> tuple[Any, ...]:
        product = functools.partial(
            grouped_lib.grouped_gemm, num_ctas=num_ctas, interpret=interpret
        )
        return both(product, *arrays)

    return Case(
        name=f"grouped gemm {rows} x {width} x {inner}, {active} of {num_experts} experts, gated",
        operands=(x, weights, experts),
        kernel=kernel,
        reference=functools.partial(both, grouped_lib.grouped_gemm_reference),
        relative_error=_GEMM_ERROR["bfloat16"],
        num_ctas=sizes.num_ctas,
    )


def _contexts(sizes: Sizes, draw: Draw) -> np.ndarray:
    lens = draw.host.integers(1, sizes.longest + 1, sizes.requests)
    lens[0], lens[-1] = 0, sizes.longest
    return lens.astype(np.int32)


def _decode_operands(sizes: Sizes, draw: Draw, page_size: int) -> tuple[Any, ...]:
    lens = _contexts(sizes, draw)
    heads, kv_heads = sizes.heads
    cache, table = draw.pages(
        lens.tolist(), heads=kv_heads, head_dim=sizes.head_dim, page_size=page_size
    )
    q = draw.normal(sizes.requests, heads, sizes.head_dim)
    return q, cache, table, jnp.asarray(lens)


def _decode(sizes: Sizes, draw: Draw, page_size: int, *, maker: Maker = Maker.MOSAIC) -> Case:
    operands = _decode_operands(sizes, draw, page_size)
    lens = np.asarray(operands[-1])
    is_plain = page_size == sizes.page_sizes[0]
    form: dict[str, Any] = {"scale": sizes.head_dim**-0.5}
    if not is_plain:
        form |= {"window": max(sizes.longest // 3, 1), "softcap": 30.0}

    def kernel(*arrays: Any, num_ctas: int, interpret: Any) -> tuple[Any, ...]:
        work = work_list.plan_decode(
            lens, num_kv_heads=sizes.heads[1], num_ctas=num_ctas, window=form.get("window")
        )
        attend: Callable[..., Any] = decode_lib.decode_attention
        if maker is Maker.TRITON:
            attend, interpret = decode_attention_triton, interpret is not None
        return (attend(*arrays, work, **form, num_ctas=num_ctas, interpret=interpret),)

    def reference(*arrays: Any) -> tuple[Any, ...]:
        return (decode_lib.decode_attention_reference(*arrays, **form),)

    more = "" if is_plain else ", window, soft-cap"
    return Case(
        name=f"decode attention, {sizes.requests} of up to {sizes.longest}, pages of {page_size}"
        f"{more}{_SUFFIXES[maker]}",
        maker=maker,
        operands=operands,
        kernel=kernel,
        reference=reference,
        relative_error=_ATTENTION_ERROR,
        num_ctas=sizes.num_ctas,
    )


def _prefill_operands(
    sizes: Sizes, draw: Draw, num_tokens: int, *, cuts_keys: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arrays, and what is by name; where tokens are few, keys may be cut into parts."""
    heads, kv_heads = sizes.heads
    # Three chunks: the start of a prompt, one behind a long prefix, one token.
    first = num_tokens // 2
    second = num_tokens - first - 3
    prefix = sizes.longest - second
    chunks = ((0, first, 0, 0), (first, second, prefix, 1), (num_tokens - 1, 1, 5, 2))
    cache, table = draw.pages(
        [position + length for _, length, position, _ in chunks],
        heads=kv_heads,
        head_dim=sizes.head_dim,
        page_size=sizes.page_sizes[0],
    )
    group = heads // kv_heads
    split = None
    capacity = prefill_tiles.max_tiles(num_tokens, len(chunks), group=group)
    if cuts_keys and num_tokens < sizes.tokens[0]:
        used = {"num_kv_heads": kv_heads, "num_ctas": sizes.num_ctas[-1]}
        split = prefill_tiles.KeySplit(**used, max_parts=prefill_tiles.max_parts(**used))
        capacity += split.max_parts
    tiles = prefill_tiles.build_prefill_tiles(
        chunks, group=group, capacity=capacity, num_tokens=num_tokens, split=split
    )
    q = draw.normal(num_tokens, heads, sizes.head_dim)
    return (q, cache, table), {"tiles": tiles, "scale": sizes.head_dim**-0.5}


def _prefill(sizes: Sizes, draw: Draw, num_tokens: int, *, maker: Maker = Maker.MOSAIC) -> Case:
    is_triton = maker is Maker.TRITON
    operands, form = _prefill_operands(sizes, draw, num_tokens, cuts_keys=not is_triton)

    def kernel(*arrays: Any, num_ctas: int, interpret: Any) -> tuple[Any, ...]:
        attend: Callable[..., Any] = prefill_lib.prefill_attention
        if is_triton:
            attend, interpret = prefill_attention_triton, interpret is not None
        return (attend(*arrays, **form, num_ctas=num_ctas, interpret=interpret),)

    def reference(*arrays: Any) -> tuple[Any, ...]:
        return (prefill_lib.prefill_attention_reference(*arrays, **form),)

    return Case(
        name=f"prefill attention, {num_tokens} tokens of 3 chunks, up to {sizes.longest}"
        f"{_SUFFIXES[maker]}",
        maker=maker,
        operands=operands,
        kernel=kernel,
        reference=reference,
        relative_error=_ATTENTION_ERROR,
        num_ctas=sizes.num_ctas,
    )


def _fused(sizes: Sizes, draw: Draw) -> Case:
    rows, width, inner = sizes.tokens[0], sizes.hidden, sizes.intermediate
    product = (draw.normal(rows, width), draw.normal(inner, width), draw.normal(inner, width))

    def prepare(arrays: Any, interpret: Any) -> mosaic.Kernel:
        x, w, w_up = arrays
        return gemm_lib.prepare_gemm(x, w, w_up=w_up)

    def reference(x: Any, w: Any, w_up: Any) -> Any:
        return gemm_lib.gemm_reference(x, w, w_up=w_up)

    return _beside_decode(
        f"gemm {rows} x {width} x {inner}", product, prepare, reference, sizes=sizes, draw=draw
    )


def _pod(sizes: Sizes, draw: Draw) -> Case:
    operands, form = _prefill_operands(sizes, draw, sizes.tokens[0])

    def prepare(arrays: Any, interpret: Any) -> mosaic.Kernel:
        return prefill_lib.prepare_prefill(*arrays, **form, interpret=interpret)

    def reference(*arrays: Any) -> Any:
        return prefill_lib.prefill_attention_reference(*arrays, **form)

    name = f"prefill attention, {sizes.tokens[0]} tokens"
    return _beside_decode(name, operands, prepare, reference, sizes=sizes, draw=draw)


def _beside_decode(
    name: str,
    operands: tuple[Any, ...],
    prepare: Callable[[Any, Any], mosaic.Kernel],
    reference: Callable[..., Any],
    *,
    sizes: Sizes,
    draw: Draw,
) -> Case:
    """A kernel, prepared from its operands, with some CTAs, and decode attention with the rest."""
    attention = _decode_operands(sizes, draw, sizes.page_sizes[0])
    lens = np.asarray(attention[-1])
    scale = sizes.head_dim**-0.5
    most, cut = sizes.num_ctas[-1], len(operands)

    def kernel(*arrays: Any, num_ctas: int, interpret: Any) -> tuple[Any, ...]:
        # Planned for as many CTAs as never run it: the bits are to be the same.
        work = work_list.plan_decode(lens, num_kv_heads=sizes.heads[1], num_ctas=most)
        q, cache, table, context_lens = arrays[cut:]
        decode = decode_lib.prepare_decode(
            q, cache, table, context_lens, work, scale=scale, interpret=interpret
        )
        kernels = [prepare(arrays[:cut], interpret), decode]
        return side_by_side(kernels, (num_ctas,), num_ctas=most, interpret=interpret)

    def references(*arrays: Any) -> tuple[Any, ...]:
        decode = decode_lib.decode_attention_reference(*arrays[cut:], scale=scale)
        return reference(*arrays[:cut]), decode

    return Case(
        name=f"decode attention beside {name}, {most} CTAs in all",
        operands=(*operands, *attention),
        kernel=kernel,
        reference=references,
        relative_error=_ATTENTION_ERROR,
        num_ctas=(max(most // 3, 1), most - most // 3),
    )
