"""What attention of a step needs from the host: written into its vector, read in its program.

Both ends of each implementation stand together, so that they cannot drift apart.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Int32

from nanoflow_jax.engine import packing
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.kv_cache import tiles
from nanoflow_jax.models import kernel_attention, paged_attention
from nanoflow_jax.scheduler import buckets
from pallas_kernels import prefill_tiles, work_list

Views = Mapping[str, np.ndarray]
Fields = dict[str, packing.Field]


class DecodeInputs(Protocol):
    """Both ends of what attention of decode rows needs beside pages and lengths."""

    def fields(self, bucket: buckets.Bucket) -> Fields:
        """What lies in the vector."""

    def write(self, views: Views, context_lens: Int32[np.ndarray, "R"]) -> None:
        """Plans a step: cached tokens of each row, its newest included; 0 in unused rows."""

    def read(self, arrays: Mapping[str, Array]) -> paged_attention.DecodeAttention:
        """The attention, in a program."""


class PrefillInputs(Protocol):
    """Both ends of what attention of prompt chunks needs beside pages."""

    def fields(self, bucket: buckets.Bucket) -> Fields:
        """What lies in the vector."""

    def write(self, views: Views, chunks: Sequence[tiles.Chunk]) -> None:
        """Plans a step."""

    def read(self, arrays: Mapping[str, Array]) -> paged_attention.PrefillAttention:
        """The attention, in a program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainDecodeInputs:
    """XLA plans nothing."""

    layout: layout_lib.KvLayout

    def fields(self, bucket: buckets.Bucket) -> Fields:
        return {}

    def write(self, views: Views, context_lens: Int32[np.ndarray, "R"]) -> None:
        pass

    def read(self, arrays: Mapping[str, Array]) -> paged_attention.DecodeAttention:
        return paged_attention.PlainDecode(layout=self.layout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainPrefillInputs:
    """Query tiles of at most tile_len tokens."""

    layout: layout_lib.KvLayout
    tile_len: int

    def fields(self, bucket: buckets.Bucket) -> Fields:
        capacity = tiles.max_tiles(bucket.tokens, bucket.prefill_rows, tile_len=self.tile_len)
        return {"tiles": packing.Field(shape=(4, capacity))}

    def write(self, views: Views, chunks: Sequence[tiles.Chunk]) -> None:
        columns = views["tiles"]
        columns[:] = np.stack(
            tiles.build_prefill_tiles(chunks, tile_len=self.tile_len, capacity=columns.shape[1])
        )

    def read(self, arrays: Mapping[str, Array]) -> paged_attention.PrefillAttention:
        return paged_attention.PlainPrefill(
            layout=self.layout,
            tiles=tiles.PrefillTiles(*arrays["tiles"]),
            tile_len=self.tile_len,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelDecodeInputs:
    """Shares of the decode kernel's workers, for each window of the model.

    Attributes:
        num_kv_heads: K.
        windows: Of the model's layers, each once.
        num_ctas: That will work.
        attend: See `KernelDecode`.
    """

    num_kv_heads: int
    windows: Sequence[int | None]
    num_ctas: int
    attend: Callable[..., Array]

    def fields(self, bucket: buckets.Bucket) -> Fields:
        # A plan without requests says what unused entries hold.
        empty = self._plan(np.zeros(bucket.decode_rows, np.int32), None)
        return {
            _work_name(i, name): _field_of(array)
            for i in range(len(self.windows))
            for name, array in empty._asdict().items()
        }

    def write(self, views: Views, context_lens: Int32[np.ndarray, "R"]) -> None:
        for i, window in enumerate(self.windows):
            for name, array in self._plan(context_lens, window)._asdict().items():
                views[_work_name(i, name)][:] = array

    def read(self, arrays: Mapping[str, Array]) -> paged_attention.DecodeAttention:
        works = {
            window: work_list.WorkList(
                *(arrays[_work_name(i, name)] for name in work_list.WorkList._fields)
            )
            for i, window in enumerate(self.windows)
        }
        return kernel_attention.KernelDecode(works=works, attend=self.attend)

    def _plan(self, context_lens: Any, window: int | None) -> work_list.WorkList:
        return work_list.plan_decode(
            context_lens, num_kv_heads=self.num_kv_heads, num_ctas=self.num_ctas, window=window
        )


def _work_name(window_index: int, field: str) -> str:
    return f"decode_work_{window_index}_{field}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelPrefillInputs:
    """Tiles of the prefill kernel, the same for all windows: they say only what costs most.

    Attributes:
        group: G, query heads for each KV head.
        num_ctas: Most SMs to use.
        attend: See `KernelPrefill`.
    """

    group: int
    num_ctas: int
    attend: Callable[..., Array]

    def fields(self, bucket: buckets.Bucket) -> Fields:
        capacity = prefill_tiles.max_tiles(bucket.tokens, bucket.prefill_rows, group=self.group)
        empty = self._build((), capacity, bucket.tokens)
        return {_tiles_name(name): _field_of(array) for name, array in empty._asdict().items()}

    def write(self, views: Views, chunks: Sequence[tiles.Chunk]) -> None:
        capacity = len(views[_tiles_name("starts")])
        built = self._build(chunks, capacity, len(views[_tiles_name("sources")]))
        for name, array in built._asdict().items():
            views[_tiles_name(name)][:] = array

    def read(self, arrays: Mapping[str, Array]) -> paged_attention.PrefillAttention:
        built = prefill_tiles.PrefillTiles(
            *(arrays[_tiles_name(name)] for name in prefill_tiles.PrefillTiles._fields)
        )
        return kernel_attention.KernelPrefill(
            tiles=built, num_ctas=self.num_ctas, attend=self.attend
        )

    def _build(self, chunks: Any, capacity: int, num_tokens: int) -> prefill_tiles.PrefillTiles:
        return prefill_tiles.build_prefill_tiles(
            chunks, group=self.group, capacity=capacity, num_tokens=num_tokens
        )


def _tiles_name(field: str) -> str:
    return f"prefill_tiles_{field}"


def _field_of(array: Int32[np.ndarray, "..."]) -> packing.Field:
    """A field that holds this array, of equal elements, where nobody writes to it."""
    return packing.Field(shape=array.shape, fill=int(array.max(initial=0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """What attention of a step is made of.

    Attributes:
        decode: Of rows with one token to do.
        prefill: Of chunks.
    """

    decode: DecodeInputs
    prefill: PrefillInputs

    def fields(self, bucket: buckets.Bucket) -> Fields:
        """What lies in the vector of a bucket's forward."""
        found = self.decode.fields(bucket) if bucket.decode_rows else {}
        return found | (self.prefill.fields(bucket) if bucket.prefill_rows else {})
