"""Problems as they are timed: operands, our kernels on any share of the SMs, baselines beside them.

Of a grouped product, sorting rows by expert and adding them up again are left out on all sides. Of
attention, baselines get keys and values that lie dense, one request after another: they follow no
page table.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from nanoflow_jax.bench import kernel_baselines as baselines
from nanoflow_jax.bench.draw import Draw
from nanoflow_jax.bench.kernel_ways import Setting, Task, Variant, Way
from nanoflow_jax.results import kernels
from pallas_kernels import grouped_gemm as grouped_lib
from pallas_kernels import problem_shapes as shapes
from pallas_kernels import work_list
from pallas_kernels.decode_attention import decode_attention, prepare_decode
from pallas_kernels.gemm import gemm, gemm_reference, prepare_gemm
from pallas_kernels.mosaic import Kernel
from pallas_kernels.prefill_attention import prefill_attention, prepare_prefill
from pallas_kernels.prefill_tiles import PrefillTiles, build_prefill_tiles, max_tiles
from pallas_kernels.side_by_side import on_share, side_by_side

# As in kernel_cases: rounding of the result, and the GPU's approximate exp2.
_PRODUCT_ERROR = 4e-3
_ATTENTION_ERROR = 1e-2
# Shares are measured at multiples of so many SMs.
_SHARE_STEP = 8

Operands = dict[str, Any]


def shares(num_sms: int) -> tuple[int, ...]:
    """Shares of a device that are measured, the whole of it last."""
    step = _SHARE_STEP if num_sms > _SHARE_STEP else 1
    return (*range(step, num_sms, step), num_sms)


def build(shape: shapes.Shape, setting: Setting) -> Task:
    """Everything that is timed of one shape."""
    makers: Mapping[type, Callable[[Any, Setting], Task]] = {
        shapes.Product: _product,
        shapes.GroupedProduct: _grouped,
        shapes.Decode: _decode,
        shapes.Prefill: _prefill,
        shapes.Pair: _pair,
    }
    return makers[type(shape)](shape, setting)


def _on_shares(
    prepare: Callable[[Operands], Kernel], setting: Setting, view: Any = None
) -> list[Variant]:
    """A kernel on every share, by one executable."""

    def run(operands: Operands, share: Int32[Array, ""]) -> tuple[Array, ...]:
        made = on_share(
            prepare(operands), share, num_ctas=setting.num_sms, interpret=setting.interpret
        )
        return (made,)

    way = Way(name=kernels.OURS, function=run, view=view)
    return [
        Variant(way=way, num_ctas=share, more=(jnp.int32(share),))
        for share in shares(setting.num_sms)
    ]


def _static(run: Callable[..., Array], setting: Setting, view: Any = None) -> list[Variant]:
    """A kernel whose grid is the device: what its CTAs pay for a share that is an operand."""

    def whole(operands: Operands) -> tuple[Array, ...]:
        return (run(operands, num_ctas=setting.num_sms, interpret=setting.interpret),)

    way = Way(name="pallas, static grid", function=whole, view=view)
    return [Variant(way=way, num_ctas=setting.num_sms)]


def _draw_product(shape: shapes.Product, draw: Draw) -> Operands:
    weight = (shape.num_columns, shape.depth)
    drawn = {"x": draw.normal(shape.num_tokens, shape.depth), "w": draw.normal(*weight)}
    if shape.gated:
        drawn["w_up"] = draw.normal(*weight)
    if shape.residual:
        drawn["residual"] = draw.normal(shape.num_tokens, shape.num_columns)
    return drawn


def _product(shape: shapes.Product, setting: Setting) -> Task:
    tile = setting.tile

    def draw(seed: int) -> Operands:
        drawn = _draw_product(shape, Draw(seed))
        weights = [drawn[name] for name in ("w", "w_up") if name in drawn]
        return {"ours": drawn, "stacked": jnp.stack(weights)}

    def run(operands: Operands, **how: Any) -> Array:
        return gemm(**operands["ours"], tile=tile, **how)

    found = [
        *_on_shares(lambda operands: prepare_gemm(**operands["ours"], tile=tile), setting),
        *_static(run, setting),
        *baselines.products(setting),
    ]
    return Task(
        shape=shape,
        draw=draw,
        reference=lambda operands: (gemm_reference(**operands["ours"]),),
        relative_error=_PRODUCT_ERROR,
        variants=found,
        missing=baselines.missing(setting, ("cublaslt",)),
    )


def _grouped(shape: shapes.GroupedProduct, setting: Setting) -> Task:
    num_experts, gated = shape.num_experts, shape.gated
    columns = shape.num_columns * (1 + gated)

    def draw(seed: int) -> Operands:
        drawn = Draw(seed)
        order = np.argsort(drawn.host.random((shape.num_tokens, num_experts)), axis=1)
        experts = jnp.asarray(order[:, : shape.num_active], jnp.int32)
        groups = jax.jit(grouped_lib.plan_groups, static_argnames="num_experts")(
            experts, num_experts=num_experts
        )
        x, w = (
            drawn.normal(shape.num_tokens, shape.depth),
            drawn.normal(num_experts, columns, shape.depth),
        )
        return {
            "x": grouped_lib.permute(x, groups),
            "w": w,
            "groups": groups,
            "sorted": baselines.sorted_rows(x, experts, num_experts=num_experts),
            "w_in_out": jnp.swapaxes(w, 1, 2),
        }

    def run(operands: Operands, **how: Any) -> Array:
        x, w, groups = (operands[name] for name in ("x", "w", "groups"))
        return grouped_lib.grouped_gemm(x, w, groups, gated=gated, **how)

    def prepare(operands: Operands) -> Kernel:
        x, w, groups = (operands[name] for name in ("x", "w", "groups"))
        return grouped_lib.prepare_grouped_gemm(x, w, groups, gated=gated)

    def by_choice(operands: Operands, results: Sequence[Array]) -> tuple[Array, ...]:
        """Rows in the order of tokens and their experts, padding left out."""
        return (results[0][operands["groups"].places.reshape(-1)],)

    def reference(operands: Operands) -> tuple[Array, ...]:
        x, w, groups = (operands[name] for name in ("x", "w", "groups"))
        made = grouped_lib.grouped_gemm_reference(x, w, groups, gated=gated)
        return by_choice(operands, (made,))

    return Task(
        shape=shape,
        draw=draw,
        reference=reference,
        relative_error=_PRODUCT_ERROR,
        variants=[
            *_on_shares(prepare, setting, by_choice),
            *_static(run, setting, by_choice),
            *baselines.grouped(setting, gated=gated),
        ],
        missing=baselines.missing(setting, ("tokamax",)),
    )


def _draw_decode(shape: shapes.Decode, draw: Draw) -> Operands:
    lens = shape.context_lens()
    cache, table = draw.pages(
        lens.tolist(),
        heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
    )
    q = draw.normal(shape.num_requests, shape.num_heads, shape.head_dim)
    return {"q": q, "cache": cache, "page_table": table, "context_lens": jnp.asarray(lens)}


def _plan(shape: shapes.Decode, num_ctas: int, setting: Setting) -> work_list.WorkList:
    plan = work_list.plan_decode(
        shape.context_lens(),
        num_kv_heads=shape.num_kv_heads,
        num_ctas=num_ctas,
        max_ctas=setting.num_sms,
    )
    on_device: Any = map(jnp.asarray, plan)
    return work_list.WorkList(*on_device)


def _decode(shape: shapes.Decode, setting: Setting) -> Task:
    scale = shape.head_dim**-0.5

    def draw(seed: int) -> Operands:
        drawn = _draw_decode(shape, Draw(seed))
        k, v = _dense(drawn["cache"], drawn["page_table"], drawn["context_lens"])
        q = drawn["q"][:, None]
        return {"ours": drawn, "q": q, "k": k, "v": v, "lens": drawn["context_lens"]}

    def run(operands: Operands, work: work_list.WorkList) -> tuple[Array, ...]:
        made = decode_attention(
            **operands["ours"], work=work, scale=scale, interpret=setting.interpret
        )
        return (made,)

    way = Way(name=kernels.OURS, function=run)
    ours = [
        Variant(way=way, num_ctas=share, more=(_plan(shape, share, setting),))
        for share in shares(setting.num_sms)
    ]
    return Task(
        shape=shape,
        draw=draw,
        reference=functools.partial(_plain_attention, prefix_len=None),
        relative_error=_ATTENTION_ERROR,
        variants=[*ours, *baselines.attention(shape, setting)],
        missing=baselines.missing(setting, ("cudnn", "torch", "tokamax", "flashinfer")),
    )


def _prefill(shape: shapes.Prefill, setting: Setting) -> Task:
    scale, context_len = shape.head_dim**-0.5, shape.prefix_len + shape.chunk_len
    num_tokens, group = shape.num_chunks * shape.chunk_len, shape.num_heads // shape.num_kv_heads
    aligned = shape.chunk_len % 8 == 0
    chunks = [
        (i * shape.chunk_len, shape.chunk_len, shape.prefix_len, i) for i in range(shape.num_chunks)
    ]
    tiles = build_prefill_tiles(
        chunks,
        group=group,
        capacity=max_tiles(num_tokens, len(chunks), group=group),
        num_tokens=num_tokens,
        aligned=aligned,
    )

    def draw(seed: int) -> Operands:
        drawn, lens = Draw(seed), [context_len] * shape.num_chunks
        cache, table = drawn.pages(
            lens,
            heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            page_size=shape.page_size,
        )
        context_lens = jnp.asarray(lens, jnp.int32)
        k, v = _dense(cache, table, context_lens)
        q = drawn.normal(num_tokens, shape.num_heads, shape.head_dim)
        ours = {"q": q, "cache": cache, "page_table": table}
        q = q.reshape(shape.num_chunks, shape.chunk_len, *q.shape[1:])
        k, v = k[:, :context_len], v[:, :context_len]
        more = {"tiles": PrefillTiles(*map(jnp.asarray, tiles)), "lens": context_lens}
        return {"ours": ours, "q": q, "k": k, "v": v, **more}

    def run(operands: Operands, **how: Any) -> Array:
        return prefill_attention(
            **operands["ours"], tiles=operands["tiles"], scale=scale, aligned=aligned, **how
        )

    def prepare(operands: Operands) -> Kernel:
        return prepare_prefill(
            **operands["ours"],
            tiles=operands["tiles"],
            scale=scale,
            aligned=aligned,
            interpret=setting.interpret,
        )

    prefix = shape.prefix_len
    return Task(
        shape=shape,
        draw=draw,
        reference=functools.partial(_plain_attention, prefix_len=prefix),
        relative_error=_ATTENTION_ERROR,
        variants=[
            *_on_shares(prepare, setting),
            *_static(run, setting),
            *baselines.attention(shape, setting),
        ],
        missing=baselines.missing(setting, ("cudnn", "torch", "tokamax", "flashinfer")),
    )


def _pair(shape: shapes.Pair, setting: Setting) -> Task:
    scale, num_sms = shape.decode.head_dim**-0.5, setting.num_sms

    def draw(seed: int) -> Operands:
        drawn = Draw(seed)
        product = _draw_product(shape.product, drawn)
        weights = jnp.stack([product[name] for name in ("w", "w_up") if name in product])
        return {
            "product": product,
            "decode": _draw_decode(shape.decode, drawn),
            "xla": {"ours": product, "stacked": weights},
        }

    def attend(operands: Operands, work: work_list.WorkList) -> Array:
        return decode_attention(
            **operands["decode"], work=work, scale=scale, interpret=setting.interpret
        )

    def fused(operands: Operands, work: work_list.WorkList, share: Any) -> tuple[Array, ...]:
        decode = prepare_decode(
            **operands["decode"],
            work=work,
            scale=scale,
            interpret=setting.interpret,
        )
        both = [prepare_gemm(**operands["product"]), decode]
        made = side_by_side(both, share.reshape(1), num_ctas=num_sms, interpret=setting.interpret)
        return tuple(made)

    def branches(operands: Operands, work: work_list.WorkList, share: Any) -> tuple[Array, ...]:
        product = on_share(
            prepare_gemm(**operands["product"]),
            share,
            num_ctas=num_sms,
            interpret=setting.interpret,
        )
        return product, attend(operands, work)

    def one_then_other(operands: Operands, work: work_list.WorkList) -> tuple[Array, ...]:
        product = gemm(**operands["product"], num_ctas=num_sms, interpret=setting.interpret)
        return product, attend(operands, work)

    def with_xla(operands: Operands, work: work_list.WorkList) -> tuple[Array, ...]:
        return *baselines.einsum(operands["xla"]), attend(operands, work)

    whole = (_plan(shape.decode, num_sms, setting),)
    splits = [
        (share, (_plan(shape.decode, num_sms - share, setting), jnp.int32(share)))
        for share in shares(num_sms)[:-1]
    ]
    ways = [Way(name=kernels.OURS, function=fused, is_wall=True)]
    if setting.on_gpu:
        options = {baselines.GRAPH_MODE: "CONCURRENT", baselines.LEAST_GRAPH: 1}
        ways.append(
            Way(name="pallas, graph branches", function=branches, options=options, is_wall=True)
        )
    in_turn = [
        Way(name=kernels.IN_TURN, function=one_then_other, is_wall=True),
        Way(name="xla, then pallas", function=with_xla, is_wall=True),
    ]

    def reference(operands: Operands) -> tuple[Array, ...]:
        decode = operands["decode"]
        k, v = _dense(decode["cache"], decode["page_table"], decode["context_lens"])
        dense = {"q": decode["q"][:, None], "k": k, "v": v, "lens": decode["context_lens"]}
        attention = _plain_attention(dense, prefix_len=None)
        return gemm_reference(**operands["product"]), *attention

    return Task(
        shape=shape,
        draw=draw,
        reference=reference,
        relative_error=_ATTENTION_ERROR,
        variants=[
            *(
                Variant(way=way, num_ctas=num_sms, split=split, more=more)
                for way in ways
                for split, more in splits
            ),
            *(Variant(way=way, num_ctas=num_sms, more=whole) for way in in_turn),
        ],
        missing=baselines.missing(setting, ("pallas, graph branches",)),
    )


@jax.jit
def _dense(
    cache: Float[Array, "P 2 K S H"],
    page_table: Int32[Array, "R M"],
    context_lens: Int32[Array, "R"],
) -> tuple[Float[Array, "R C K H"], Float[Array, "R C K H"]]:
    """Keys and values of each request in one piece, zeros behind its last token."""
    pages = jnp.moveaxis(cache[page_table], 2, 0)  # [2, R, M, K, S, H]
    _, R, M, K, S, H = pages.shape
    rows = jnp.swapaxes(pages, 3, 4).reshape(2, R, M * S, K, H)
    is_there = jnp.arange(M * S, dtype=jnp.int32)[None] < context_lens[:, None]
    k, v = jnp.where(is_there[None, :, :, None, None], rows, jnp.zeros((), rows.dtype))
    return k, v


def _plain_attention(operands: Operands, *, prefix_len: int | None) -> tuple[Array, ...]:
    """Attention as it is written in books, one KV head of one request at a time, in float32.

    Args:
        operands: q [R, T, N, H], k and v [R, C, K, H], lens [R].
        prefix_len: Tokens before the first query, which sees itself too; None if all are seen.

    Returns:
        [R T, N, H] in q's dtype.
    """
    q, k, v, lens = (operands[name] for name in ("q", "k", "v", "lens"))
    (R, T, N, H), (C, K) = q.shape, k.shape[1:3]
    queries = jnp.moveaxis(q.reshape(R, T, K, N // K, H), 1, 3)  # [R, K, G, T, H]
    key = jnp.arange(C, dtype=jnp.int32)
    last = jnp.full(T, C, jnp.int32)
    if prefix_len is not None:
        last = prefix_len + jnp.arange(T, dtype=jnp.int32)

    def one(operands: tuple[Array, ...]) -> Float[Array, "G T H"]:
        q, k, v, length = operands
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        scores = jnp.einsum("GTH,CH->GTC", q, k, precision="highest") / math.sqrt(H)
        is_seen = (key[None] <= last[:, None]) & (key[None] < length)
        weights = jax.nn.softmax(scores, axis=-1, where=is_seen[None])
        mixed = jnp.einsum("GTC,CH->GTH", weights, v, precision="highest")
        return mixed.astype(operands[0].dtype)

    flat = (
        queries.reshape(R * K, N // K, T, H),
        jnp.swapaxes(k, 1, 2).reshape(R * K, C, H),
        jnp.swapaxes(v, 1, 2).reshape(R * K, C, H),
        jnp.repeat(lens, K),
    )
    mixed = jax.lax.map(one, flat).reshape(R, K, N // K, T, H)
    return (jnp.moveaxis(mixed, 3, 1).reshape(R * T, N, H),)


def operand_bytes(operands: Any) -> int:
    """Of all arrays."""
    return sum(array.nbytes for array in jax.tree.leaves(operands))
