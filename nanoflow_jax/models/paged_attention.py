"""Attention of a dense batch over paged caches: append, then decode rows and prompt chunks."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nanoflow_jax.kv_cache import attention, layout, tiles
from nanoflow_jax.models import transformer
from nanoflow_jax.models.operations import ANYWHERE, Place, after


class DecodeAttention(Protocol):
    """One query per row against that row's pages; zeros in rows of length 0."""

    def __call__(
        self,
        q: Float[Array, "R N H"],
        cache: Any,
        page_table: Int32[Array, "R M"],
        context_lens: Int32[Array, "R"],
        spec: transformer.AttentionSpec,
        *,
        place: Place,
    ) -> Float[Array, "R N H"]: ...


class PrefillAttention(Protocol):
    """Prompt chunks, which it knows, against the pages of their rows; zeros for other tokens."""

    def __call__(
        self,
        q: Float[Array, "T N H"],
        cache: Any,
        page_table: Int32[Array, "Q M"],
        spec: transformer.AttentionSpec,
        *,
        place: Place,
    ) -> Float[Array, "T N H"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainDecode:
    """`DecodeAttention` by XLA; a place's cap has no effect on it."""

    layout: layout.KvLayout

    def __call__(
        self,
        q: Float[Array, "R N H"],
        cache: Any,
        page_table: Int32[Array, "R M"],
        context_lens: Int32[Array, "R"],
        spec: transformer.AttentionSpec,
        *,
        place: Place,
    ) -> Float[Array, "R N H"]:
        return attention.decode_attention(
            self.layout,
            after(q, place.token),
            cache,
            page_table,
            context_lens,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainPrefill:
    """`PrefillAttention` by XLA; a place's cap has no effect on it.

    Attributes:
        layout: Of the cache.
        tiles: Query tiles of the chunks.
        tile_len: Tokens in a full tile.
    """

    layout: layout.KvLayout
    tiles: tiles.PrefillTiles
    tile_len: int

    def __call__(
        self,
        q: Float[Array, "T N H"],
        cache: Any,
        page_table: Int32[Array, "Q M"],
        spec: transformer.AttentionSpec,
        *,
        place: Place,
    ) -> Float[Array, "T N H"]:
        return attention.prefill_attention(
            self.layout,
            after(q, place.token),
            cache,
            page_table,
            self.tiles,
            tile_len=self.tile_len,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Where the tokens of one dense batch lie; decode rows come first.

    Attributes:
        pages: Page that takes each token's key and value; P drops it (padding).
        offsets: Place in that page.
        decode_pages: Pages of each decode row's context.
        decode_lens: Tokens of it, the new one included; 0 in unused rows.
        prefill_pages: Pages of each chunk's context; None in a program without chunks.
    """

    pages: Int32[Array, "T"]
    offsets: Int32[Array, "T"]
    decode_pages: Int32[Array, "R M"]
    decode_lens: Int32[Array, "R"]
    prefill_pages: Int32[Array, "Q M"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedAttention:
    """The serving `AttentionPath`, and the operations it consists of.

    Attributes:
        layout: Of the caches.
        batch: Where the tokens lie.
        decode: What decode rows attend with; None in a program without them.
        prefill: What chunks attend with; None in a program without them.
    """

    layout: layout.KvLayout
    batch: PagedBatch
    decode: DecodeAttention | None
    prefill: PrefillAttention | None

    def __call__(
        self,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        cache: Any,
        spec: transformer.AttentionSpec,
    ) -> tuple[Float[Array, "T N H"], Any]:
        """Appends the new keys and values, then attends to all that are cached."""
        cache = self.append(k, v, cache)
        decoded = self.attend_decode(q, cache, spec)
        return self.joined(decoded, self.attend_prefill(q, cache, spec)), cache

    def append(self, k: Float[Array, "T K H"], v: Float[Array, "T K H"], cache: Any) -> Any:
        """The cache with the new keys and values in it."""
        with jax.named_scope("append"):
            return self.layout.append(cache, k, v, self.batch.pages, self.batch.offsets)

    def attend_decode(
        self,
        q: Float[Array, "T N H"],
        cache: Any,
        spec: transformer.AttentionSpec,
        place: Place = ANYWHERE,
    ) -> Float[Array, "R N H"] | None:
        """Attention of the decode rows; None in a program without them."""
        b = self.batch
        if self.decode is None:
            return None
        with jax.named_scope("decode_attention"):
            q = q[: b.decode_lens.shape[0]]
            return self.decode(q, cache, b.decode_pages, b.decode_lens, spec, place=place)

    def attend_prefill(
        self,
        q: Float[Array, "T N H"],
        cache: Any,
        spec: transformer.AttentionSpec,
        place: Place = ANYWHERE,
    ) -> Float[Array, "T N H"] | None:
        """Attention of the chunks, zeros for other tokens; None in a program without them."""
        if self.prefill is None or self.batch.prefill_pages is None:
            return None
        with jax.named_scope("prefill_attention"):
            return self.prefill(q, cache, self.batch.prefill_pages, spec, place=place)

    def joined(
        self, decoded: Float[Array, "R N H"] | None, prefilled: Float[Array, "T N H"] | None
    ) -> Float[Array, "T N H"]:
        """What both attentions give, of which at least one is there."""
        if prefilled is None:
            assert decoded is not None
            return decoded
        if decoded is None:
            return prefilled
        # Each is zero where the other has a token.
        rows = decoded.shape[0]
        return jnp.concatenate([prefilled[:rows] + decoded, prefilled[rows:]])
