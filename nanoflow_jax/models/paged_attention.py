"""Attention of a dense batch over paged caches: append, then decode rows and prompt chunks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nanoflow_jax.kv_cache import attention, layout, tiles
from nanoflow_jax.models import transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Where the tokens of one dense batch lie; decode rows come first.

    Attributes:
        pages: Page that takes each token's key and value; P drops it (padding).
        offsets: Place in that page.
        decode_pages: Pages of each decode row's context.
        decode_lens: Tokens of it, the new one included; 0 in unused rows.
        prefill_pages: Pages of each chunk's context; None in a program without chunks.
        prefill_tiles: Query tiles of the chunks.
        tile_len: Tokens in a full tile.
    """

    pages: Int32[Array, "T"]
    offsets: Int32[Array, "T"]
    decode_pages: Int32[Array, "R M"]
    decode_lens: Int32[Array, "R"]
    prefill_pages: Int32[Array, "Q M"] | None
    prefill_tiles: tiles.PrefillTiles | None
    tile_len: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedAttention:
    """The serving `AttentionPath`."""

    layout: layout.KvLayout
    batch: PagedBatch

    def __call__(
        self,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        cache: Any,
        spec: transformer.AttentionSpec,
    ) -> tuple[Float[Array, "T N H"], Any]:
        """Appends the new keys and values, then attends to all that are cached."""
        b = self.batch
        options: dict[str, Any] = {
            "scale": spec.scale,
            "window": spec.window,
            "softcap": spec.softcap,
        }
        with jax.named_scope("append"):
            cache = self.layout.append(cache, k, v, b.pages, b.offsets)
        rows = b.decode_lens.shape[0]
        decoded = None
        if rows:
            with jax.named_scope("decode_attention"):
                decoded = attention.decode_attention(
                    self.layout, q[:rows], cache, b.decode_pages, b.decode_lens, **options
                )
        if b.prefill_pages is None or b.prefill_tiles is None:
            assert decoded is not None
            return decoded, cache
        with jax.named_scope("prefill_attention"):
            out = attention.prefill_attention(
                self.layout,
                q,
                cache,
                b.prefill_pages,
                b.prefill_tiles,
                tile_len=b.tile_len,
                **options,
            )
        if decoded is None:
            return out, cache
        # Each is zero where the other has a token.
        return jnp.concatenate([out[:rows] + decoded, out[rows:]]), cache
