"""How the KV cache of one layer lies in memory: its shape, writing to it, products with it.

Nothing outside this file knows an axis of the cache. A layout answers the two products of
attention for the pages it is asked for, so each can store keys the way its device multiplies best.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Shaped

_PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes of the cache of one layer, on one device.

    Attributes:
        num_pages: P, pages in the cache; ids are [0, P) and a token sent to page P is dropped.
        page_size: S, tokens in a page.
        num_kv_heads: K.
        head_dim: H.
        dtype: What keys and values are stored in, float32 or bfloat16.
    """

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype[Any]

    @property
    def page_bytes(self) -> int:
        """Bytes one page takes in one layer, keys and values."""
        elements = 2 * self.page_size * self.num_kv_heads * self.head_dim
        return elements * np.dtype(self.dtype).itemsize

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of one layer."""
        return self.num_pages * self.page_bytes


class KvLayout(Protocol):
    """What attention and the runner may ask of the cache of one layer.

    A cache is a pytree that only its layout looks into; a program donates it and gets it back.
    """

    @property
    def shape(self) -> CacheShape:
        """Sizes of the cache."""

    @property
    def axes(self) -> Any:
        """Letters of the axes of each array of a cache, in the cache's form."""

    def allocate(self) -> Any:
        """An empty cache of one layer."""

    def append(
        self,
        cache: Any,
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        pages: Int32[Array, "T"],
        offsets: Int32[Array, "T"],
    ) -> Any:
        """Store token t at offsets[t] of pages[t]; a token whose page is P is dropped."""

    @property
    def pages_at_once(self) -> int:
        """Pages worth asking `scores` and `mix` for in one call."""

    def scores(
        self, cache: Any, q: Float[Array, "R K Q H"], pages: Int32[Array, "R"], *, scale: float
    ) -> Float[Array, "R K Q S"]:
        """Products of each row's queries with the keys of its page, times scale, in float32."""

    def mix(
        self,
        cache: Any,
        weights: Float[Array, "R K Q S"],
        pages: Int32[Array, "R"],
        is_seen: Bool[Array, "R S"],
    ) -> Float[Array, "R K Q H"]:
        """Values of each row's page summed by weight, in float32.

        Weights of tokens that are not seen must be 0; whatever lies there, NaN too, is left out.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageMajorLayout:
    """One array per layer, a page's keys beside its values: [P, 2, K, S, H]. For GPUs."""

    shape: CacheShape

    @property
    def axes(self) -> str:
        """Letters of the axes of the array."""
        return "P2KSH"

    @property
    def pages_at_once(self) -> int:
        """All of them: a GPU wants one wide read."""
        return self.shape.num_pages

    def allocate(self) -> Float[Array, "P 2 K S H"]:
        """An empty cache of one layer."""
        s = self.shape
        return jnp.zeros((s.num_pages, 2, s.num_kv_heads, s.page_size, s.head_dim), s.dtype)

    def append(
        self,
        cache: Float[Array, "P 2 K S H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        pages: Int32[Array, "T"],
        offsets: Int32[Array, "T"],
    ) -> Float[Array, "P 2 K S H"]:
        """Store token t at offsets[t] of pages[t]; a token whose page is P is dropped."""
        token = jnp.stack([k, v], axis=1).astype(cache.dtype)  # [T, 2, K, H]
        return cache.at[pages, :, :, offsets].set(token, mode="drop")

    def scores(
        self,
        cache: Float[Array, "P 2 K S H"],
        q: Float[Array, "R K Q H"],
        pages: Int32[Array, "R"],
        *,
        scale: float,
    ) -> Float[Array, "R K Q S"]:
        """Products of each row's queries with the keys of its page, times scale, in float32."""
        keys = cache.at[pages, 0].get(mode="clip")  # [R, K, S, H]
        return _product("RKQH,RKSH->RKQS", q * scale, keys.astype(jnp.float32))

    def mix(
        self,
        cache: Float[Array, "P 2 K S H"],
        weights: Float[Array, "R K Q S"],
        pages: Int32[Array, "R"],
        is_seen: Bool[Array, "R S"],
    ) -> Float[Array, "R K Q H"]:
        """Values of each row's page summed by weight, in float32."""
        values = cache.at[pages, 1].get(mode="clip").astype(jnp.float32)  # [R, K, S, H]
        return _product("RKQS,RKSH->RKQH", weights, _zero_unseen(values, is_seen))


class KeysValues(NamedTuple):
    """Cache of one layer whose keys and values lie apart; see `TokenMinorLayout`."""

    keys: Shaped[Any, "P K H S"]
    values: Shaped[Any, "P K S H"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMinorLayout:
    """Keys [P, K, H, S] with tokens side by side, values [P, K, S, H]. For CPUs.

    XLA:CPU multiplies q with keys about twice as fast when the sum does not run along the
    innermost axis; see docs/decisions.md, CPU attention. bfloat16 is stored as its bits: XLA:CPU
    scatters real bfloat16 by way of a float32 copy of the whole cache.

    Attributes:
        shape: Sizes of the cache.
        gathered_bytes: Keys to gather at once, in float32. Above the default XLA:CPU spreads a
            gather over cores, and the product after it, which runs on one core, fetches half of
            it from the other core's cache.
    """

    shape: CacheShape
    gathered_bytes: int = 256 << 10

    @property
    def axes(self) -> KeysValues:
        """Letters of the axes of both arrays."""
        return KeysValues(keys="PKHS", values="PKSH")

    def allocate(self) -> KeysValues:
        """An empty cache of one layer."""
        s = self.shape
        dtype = jnp.uint16 if s.dtype == jnp.bfloat16 else s.dtype
        return KeysValues(
            keys=jnp.zeros((s.num_pages, s.num_kv_heads, s.head_dim, s.page_size), dtype),
            values=jnp.zeros((s.num_pages, s.num_kv_heads, s.page_size, s.head_dim), dtype),
        )

    def append(
        self,
        cache: KeysValues,
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        pages: Int32[Array, "T"],
        offsets: Int32[Array, "T"],
    ) -> KeysValues:
        """Store token t at offsets[t] of pages[t]; a token whose page is P is dropped."""
        return KeysValues(
            keys=cache.keys.at[pages, :, :, offsets].set(self._stored(k), mode="drop"),
            values=cache.values.at[pages, :, offsets].set(self._stored(v), mode="drop"),
        )

    @property
    def pages_at_once(self) -> int:
        """As many as keep their gathered keys in a core's own cache."""
        s = self.shape
        return max(1, self.gathered_bytes // (4 * s.num_kv_heads * s.head_dim * s.page_size))

    def scores(
        self,
        cache: KeysValues,
        q: Float[Array, "R K Q H"],
        pages: Int32[Array, "R"],
        *,
        scale: float,
    ) -> Float[Array, "R K Q S"]:
        """Products of each row's queries with the keys of its page, times scale, in float32."""
        keys = self._read(cache.keys, pages)  # [R, K, H, S]
        # Scaled here and not in q: XLA:CPU gathers with arithmetic a third faster than with the
        # plain copy that it would call memcpy for.
        return _product("RKQH,RKHS->RKQS", q, keys * scale)

    def mix(
        self,
        cache: KeysValues,
        weights: Float[Array, "R K Q S"],
        pages: Int32[Array, "R"],
        is_seen: Bool[Array, "R S"],
    ) -> Float[Array, "R K Q H"]:
        """Values of each row's page summed by weight, in float32."""
        values = self._read(cache.values, pages)  # [R, K, S, H]
        return _product("RKQS,RKSH->RKQH", weights, _zero_unseen(values, is_seen))

    def _stored(self, x: Float[Array, "T K H"]) -> Shaped[Array, "T K H"]:
        x = x.astype(self.shape.dtype)
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x

    def _read(
        self, stored: Shaped[Array, "P K ? ?"], pages: Int32[Array, "R"]
    ) -> Float[Array, "R K ? ?"]:
        x = stored.at[pages].get(mode="clip")
        return jax.lax.bitcast_convert_type(x, self.shape.dtype).astype(jnp.float32)


def _product(
    axes: str, rows: Float[Array, "R K Q ?"], pages: Float[Array, "R K ? ?"]
) -> Float[Array, "R K Q ?"]:
    """Einsum in float32: CPUs multiply bfloat16 slower than they widen it."""
    return jnp.einsum(
        axes,
        rows,
        pages,
        precision=_PRECISION,
        preferred_element_type=jnp.float32,
    )


def _zero_unseen(
    values: Float[Array, "R K S H"], is_seen: Bool[Array, "R S"]
) -> Float[Array, "R K S H"]:
    # A weight of 0 is not enough: 0 * NaN is NaN, and a page may hold what an older owner left.
    return jnp.where(is_seen[:, None, :, None], values, 0.0)
