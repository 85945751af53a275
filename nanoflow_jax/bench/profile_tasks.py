"""Operations of a layer as they are timed for a profile: the model's own code on random numbers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from nanoflow_jax.bench import kernel_tasks, profile_points
from nanoflow_jax.bench.kernel_ways import Setting, Task, Variant, Way
from nanoflow_jax.bench.profile_points import Item
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.kv_cache import tiles
from nanoflow_jax.models import architecture, layers, transformer
from nanoflow_jax.models.operations import ANYWHERE, PLAIN, SortedRows
from nanoflow_jax.models.paged_attention import PlainDecode, PlainPrefill
from nanoflow_jax.results import kernels
from nanoflow_jax.results.profile import LAUNCH

# An operation of XLA's is its own reference: what it means is tested elsewhere.
_OF_ITSELF = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ground:
    """What is timed.

    Attributes:
        device: Where.
        config: The model.
        dtype: Of weights and activations.
        page_size: Tokens in a page.
        tile_len: Tokens of a query tile of XLA's prefill attention.
        page_major: How caches lie.
        setting: Where our kernels run; None where they do not.
    """

    device: jax.Device
    config: architecture.ModelConfig
    dtype: np.dtype[Any]
    page_size: int
    tile_len: int
    page_major: bool
    setting: Setting | None


@dataclasses.dataclass(frozen=True)
class _Sized:
    """How much an operation reads."""

    num_bytes: int


class Tasks:
    """Makes tasks of items; those of one model share its weights.

    Attributes:
        ground: What is timed.
    """

    def __init__(self, ground: Ground) -> None:
        """Makes the weights of one layer and of the head.

        Args:
            ground: What is timed.
        """
        self.ground = ground
        last = ground.config.num_layers - 1
        random = np.random.default_rng(0)

        def make(spec: layers.ParamSpec) -> Any:
            whole = spec.mean + spec.std * _normal(random, *spec.shape)
            return whole.astype(ground.dtype)

        span = architecture.Span(last, last + 1)
        self._graph, state = nnx.split(transformer.Transformer(make, ground.config, span))
        self._host_weights, self._tree = jax.tree.flatten(state)
        self._weights: dict[int, list[Array]] = {}

    def build(self, item: Item, caps: tuple[int, ...]) -> Task:
        """An item as it is timed.

        Args:
            item: What to time.
            caps: SMs to give to our kernel, each in turn.
        """
        if not item.by_kernel:
            return self._plain(item)
        setting = self.ground.setting
        assert setting is not None
        task = kernel_tasks.build(
            profile_points.shape_of(self.ground.config, item),
            dataclasses.replace(setting, tile=item.tile),
        )
        kept = [
            variant
            for variant in task.variants
            if variant.way.name == kernels.OURS
            and (variant.num_ctas if variant.split is None else variant.split) in caps
        ]
        return dataclasses.replace(task, variants=kept, missing={})

    def _plain(self, item: Item) -> Task:
        """XLA's operation, which nothing but itself says the meaning of."""
        operation = _OPERATIONS[item.operation]

        def draw(seed: int) -> tuple[list[Array], Any]:
            drawn = operation.draw(self.ground, item, np.random.default_rng(seed))
            return self._copied_weights(seed), jax.device_put(drawn, self.ground.device)

        def run(operands: tuple[list[Array], Any]) -> tuple[Any, ...]:
            weights, drawn = operands
            model = nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))
            return tuple(jax.tree.leaves(operation.run(self.ground, model, drawn)))

        return Task(
            shape=_Sized(kernel_tasks.operand_bytes(draw(0))),
            draw=draw,
            reference=run,
            relative_error=_OF_ITSELF,
            variants=[Variant(way=Way(name=profile_points.XLA, function=run))],
            missing={},
        )

    def _copied_weights(self, seed: int) -> list[Array]:
        """The last layer and the head; in memory of its own for each set of operands."""
        if seed not in self._weights:
            device = self.ground.device
            self._weights[seed] = [jax.device_put(one, device) for one in self._host_weights]
        return self._weights[seed]


def _normal(random: np.random.Generator, *shape: int) -> Float[np.ndarray, "*X"]:
    """Made on the host, for which nothing is compiled."""
    return random.standard_normal(shape, np.float32)


@dataclasses.dataclass(frozen=True)
class _Operation:
    """One that XLA makes.

    Attributes:
        draw: What it reads beside weights, with a generator.
        run: Of the last layer.
    """

    draw: Callable[[Ground, Item, np.random.Generator], Any]
    run: Callable[[Ground, transformer.Transformer, Any], Any]


def _rows(*axes: str) -> Callable[[Ground, Item, np.random.Generator], list[Any]]:
    """Draws arrays of some rows, with axes by their letters."""

    def draw(ground: Ground, item: Item, random: np.random.Generator) -> list[Any]:
        c = ground.config
        sizes = {
            "D": (c.hidden_size,),
            "N": (c.num_heads, c.head_dim),
            "K": (c.num_kv_heads, c.head_dim),
            "F": (c.intermediate_size,),
        }
        return [_normal(random, item.tokens, *sizes[one]).astype(ground.dtype) for one in axes]

    return draw


def _layer(model: transformer.Transformer) -> transformer.Layer:
    layer: transformer.Layer = model.layers[0]
    return layer


def _rotate(ground: Ground, model: transformer.Transformer, drawn: Sequence[Array]) -> Any:
    q, k = drawn
    position = jnp.arange(q.shape[0], dtype=jnp.int32)
    c = ground.config
    angles = layers.rope_angles(position, head_dim=c.head_dim, rope=c.rope)
    return layers.rotate(q, *angles), layers.rotate(k, *angles)


def _layout(ground: Ground, num_pages: int) -> layout_lib.KvLayout:
    shape = layout_lib.CacheShape(
        num_pages=num_pages,
        page_size=ground.page_size,
        num_kv_heads=ground.config.num_kv_heads,
        head_dim=ground.config.head_dim,
        dtype=ground.dtype,
    )
    kind = layout_lib.PageMajorLayout if ground.page_major else layout_lib.TokenMinorLayout
    return kind(shape=shape)


@dataclasses.dataclass(frozen=True)
class _Cached:
    """Contexts in a cache, shuffled pages.

    Attributes:
        cache: That holds nothing else.
        table: Pages of each row.
    """

    cache: Any
    table: Int32[Array, "R M"]


jax.tree_util.register_dataclass(_Cached)


def _cached(ground: Ground, random: np.random.Generator, *, rows: int, length: int) -> _Cached:
    """A cache full of random numbers, and where rows of so many tokens lie in it."""
    pages_each = -(-length // ground.page_size)
    num_pages = rows * pages_each
    whole = jax.eval_shape(_layout(ground, num_pages).allocate)

    def numbers(leaf: jax.ShapeDtypeStruct) -> Any:
        drawn = _normal(random, *leaf.shape).astype(ground.dtype)
        return drawn if leaf.dtype == ground.dtype else drawn.view(leaf.dtype)  # as its bits

    order = random.permutation(num_pages).astype(np.int32).reshape(rows, pages_each)
    return _Cached(jax.tree.map(numbers, whole), jnp.asarray(order))


def _append_draw(ground: Ground, item: Item, random: np.random.Generator) -> Any:
    k, v = _rows("K", "K")(ground, item, random)
    return k, v, _layout(ground, -(-item.tokens // ground.page_size)).allocate()


def _append(ground: Ground, model: transformer.Transformer, drawn: Any) -> Any:
    k, v, cache = drawn
    token = jnp.arange(k.shape[0], dtype=jnp.int32)
    size = ground.page_size
    layout = _layout(ground, -(-k.shape[0] // size))
    return layout.append(cache, k, v, token // size, token % size)


def _decode_draw(ground: Ground, item: Item, random: np.random.Generator) -> Any:
    (q,) = _rows("N")(ground, item, random)
    lens = np.full(item.tokens, item.context, np.int32)
    return q, _cached(ground, random, rows=item.tokens, length=item.context), lens


def _decode(ground: Ground, model: transformer.Transformer, drawn: Any) -> Any:
    q, cached, lens = drawn
    layout = _layout(ground, cached.table.size)
    attend = PlainDecode(layout=layout)
    spec = _layer(model).spec
    return attend(q, cached.cache, cached.table, lens, spec, place=ANYWHERE)


def _prefill_draw(ground: Ground, item: Item, random: np.random.Generator) -> Any:
    (q,) = _rows("N")(ground, item, random)
    count, length, prefix = profile_points.chunks(item.tokens, item.context)
    tile_len = min(ground.tile_len, item.tokens)
    cut = tiles.build_prefill_tiles(
        [tiles.Chunk(i * length, length, prefix, i) for i in range(count)],
        tile_len=tile_len,
        capacity=tiles.max_tiles(item.tokens, count, tile_len=tile_len),
    )
    cached = _cached(ground, random, rows=count, length=prefix + length)
    return q, cached, cut


def _prefill(ground: Ground, model: transformer.Transformer, drawn: Any) -> Any:
    q, cached, cut = drawn
    layout = _layout(ground, cached.table.size)
    tile_len = min(ground.tile_len, q.shape[0])
    attend = PlainPrefill(layout=layout, tiles=cut, tile_len=tile_len)
    return attend(q, cached.cache, cached.table, _layer(model).spec, place=ANYWHERE)


def _expand_draw(ground: Ground, item: Item, random: np.random.Generator) -> Any:
    """Normalised rows, and of a mixture of experts which of them every row goes to."""
    (x,) = _rows("D")(ground, item, random)
    return x, _routed(ground, item, random, x)


def _contract_draw(ground: Ground, item: Item, random: np.random.Generator) -> Any:
    moe = ground.config.moe
    if not ground.config.layer_shape.is_sparse or moe is None:
        return _rows("D", "F")(ground, item, random)
    (x,) = _rows("D")(ground, item, random)
    rows = item.tokens * moe.num_active
    hidden = _normal(random, rows, moe.intermediate_size).astype(ground.dtype)
    return x, dataclasses.replace(_routed(ground, item, random, x), rows=hidden)


def _routed(ground: Ground, item: Item, random: np.random.Generator, x: Any) -> Any:
    moe = ground.config.moe
    if not ground.config.layer_shape.is_sparse or moe is None:
        return None
    order = np.argsort(random.random((item.tokens, moe.num_experts)), axis=1)
    experts = jnp.asarray(order[:, : moe.num_active], jnp.int32)
    groups = PLAIN.experts.group(experts, num_experts=moe.num_experts)
    shares = jnp.full(experts.shape, 1 / moe.num_active, jnp.float32)
    rows = PLAIN.experts.spread(jnp.asarray(x), groups)
    return layers.Routed(rows=rows, groups=(groups.order, groups.sizes), shares=shares)


def _grouped(routed: layers.Routed) -> layers.Routed:
    """With groups as experts know them, part of which is no array."""
    order, sizes = routed.groups
    groups = SortedRows(order=order, sizes=sizes, num_active=routed.shares.shape[1])
    return dataclasses.replace(routed, groups=groups)


def _expand(ground: Ground, model: transformer.Transformer, drawn: Any) -> Any:
    x, routed = drawn
    feed_forward: Any = _layer(model).feed_forward
    if routed is None:
        return feed_forward.expand(x)
    return feed_forward.expand(_grouped(routed)).rows


def _contract(ground: Ground, model: transformer.Transformer, drawn: Any) -> Any:
    x, hidden = drawn
    if isinstance(hidden, layers.Routed):
        hidden = _grouped(hidden)
    return _layer(model).feed_forward.contract(x, hidden)


_OPERATIONS: dict[str, _Operation] = {
    LAUNCH: _Operation(_rows("D"), lambda ground, model, drawn: drawn[0] + 1),
    "norm_kqv": _Operation(
        _rows("D"), lambda ground, model, drawn: _layer(model).attention.norm_kqv(*drawn)
    ),
    "rope": _Operation(_rows("N", "K"), _rotate),
    "append": _Operation(_append_draw, _append),
    "decode_attention": _Operation(_decode_draw, _decode),
    "prefill_attention": _Operation(_prefill_draw, _prefill),
    "o": _Operation(
        _rows("D", "N"), lambda ground, model, drawn: _layer(model).attention.output(*drawn)
    ),
    "norm": _Operation(
        _rows("D"), lambda ground, model, drawn: _layer(model).feed_forward.normalise(*drawn)
    ),
    "route": _Operation(
        _rows("D"), lambda ground, model, drawn: _layer(model).feed_forward.route(*drawn)
    ),
    "up_gate": _Operation(_expand_draw, _expand),
    "down": _Operation(_contract_draw, _contract),
    "head": _Operation(_rows("D"), lambda ground, model, drawn: model.head(*drawn)),
}
