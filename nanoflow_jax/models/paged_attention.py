"""Attention of a dense batch over paged caches: append, then decode rows and prompt chunks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nanoflow_jax.kv_cache import attention, layout, tiles
from nanoflow_jax.models import transformer
from nanoflow_jax.models.operations import Place, after
from nanoflow_jax.nanobatch import dealing
from nanoflow_jax.nanobatch.executor import Call
from nanoflow_jax.nanobatch.plan import TokenRange


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
    """Where the tokens of one dense batch lie.

    Attributes:
        cells: In each of them decode rows come first; their rows of the two arrays below lie
            together.
        pages: Page that takes each token's key and value; P drops it (padding).
        offsets: Place in that page.
        decode_pages: Pages of each decode row's context.
        decode_lens: Tokens of it, the new one included; 0 in unused rows.
        prefill_pages: Pages of each chunk's context; None in a program without chunks.
    """

    cells: tuple[dealing.Cell, ...]
    pages: Int32[Array, "T"]
    offsets: Int32[Array, "T"]
    decode_pages: Int32[Array, "R M"]
    decode_lens: Int32[Array, "R"]
    prefill_pages: Int32[Array, "Q M"] | None

    def cells_in(self, tokens: TokenRange) -> tuple[dealing.Cell, ...]:
        """Cells of some tokens, which no cell reaches over."""
        return tuple(cell for cell in self.cells if cell.tokens.overlaps(tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedAttention:
    """The serving `AttentionPath`.

    Attributes:
        layout: Of the caches.
        batch: Where the tokens lie.
        decode: What decode rows attend with, by the key of the nano-operation.
        prefill: What chunks attend with, likewise; empty in a program without chunks.
    """

    layout: layout.KvLayout
    batch: PagedBatch
    decode: Mapping[str, DecodeAttention]
    prefill: Mapping[str, PrefillAttention]

    def append(
        self,
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        cache: Any,
        tokens: TokenRange,
    ) -> Any:
        """See `AttentionPath`, as the rest."""
        some = slice(*tokens)
        with jax.named_scope("append"):
            return self.layout.append(cache, k, v, self.batch.pages[some], self.batch.offsets[some])

    def attend_decode(
        self, q: Float[Array, "T N H"], cache: Any, spec: transformer.AttentionSpec, call: Call
    ) -> tuple[Float[Array, "R N H"] | None, ...]:
        cells = self.batch.cells_in(call.tokens)
        rows = slice(cells[0].first_decode_row, cells[-1].end_decode_row)
        if rows.start == rows.stop:
            return (None,) * len(cells)
        starts = [cell.tokens.start - call.tokens.start for cell in cells]
        with jax.named_scope("decode_attention"):
            out = self.decode[call.key](
                _concatenate(
                    [q[at : at + cell.decode_rows] for at, cell in zip(starts, cells, strict=True)]
                ),
                cache,
                self.batch.decode_pages[rows],
                self.batch.decode_lens[rows],
                spec,
                place=Place.of(call),
            )
        return tuple(
            out[cell.first_decode_row - rows.start : cell.end_decode_row - rows.start]
            if cell.decode_rows
            else None
            for cell in cells
        )

    def attend_prefill(
        self, q: Float[Array, "T N H"], cache: Any, spec: transformer.AttentionSpec, call: Call
    ) -> Float[Array, "T N H"] | None:
        if self.batch.prefill_pages is None:
            return None
        with jax.named_scope("prefill_attention"):
            return self.prefill[call.key](
                q,
                cache,
                self.batch.prefill_pages,
                spec,
                place=Place.of(call),
            )

    def joined(
        self,
        decoded: tuple[Float[Array, "R N H"] | None, ...],
        prefilled: Float[Array, "T N H"] | None,
        tokens: TokenRange,
    ) -> Float[Array, "T N H"]:
        if prefilled is None:  # a program of decode rows alone, which fill their cells
            return _concatenate([rows for rows in decoded if rows is not None])
        parts = []
        for cell, rows in zip(self.batch.cells_in(tokens), decoded, strict=True):
            start, stop = (border - tokens.start for border in cell.tokens)
            if rows is not None:
                # Each is zero where the other has a token.
                parts.append(prefilled[start : start + cell.decode_rows] + rows)
            parts.append(prefilled[start + cell.decode_rows : stop])
        return _concatenate(parts)


def _concatenate(parts: Sequence[Float[Array, "R N H"]]) -> Float[Array, "R N H"]:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
