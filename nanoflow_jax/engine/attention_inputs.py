"""What attention of a step needs from the host: written into its vector, read in its program.

Both ends of each implementation stand together, so that they cannot drift apart.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Int32

from nanoflow_jax.engine import packing
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.kv_cache import tiles
from nanoflow_jax.models import kernel_attention, paged_attention
from nanoflow_jax.scheduler import buckets
from pallas_kernels import mosaic, prefill_tiles, work_list

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

    def capped(self, num_ctas: int | None) -> "DecodeInputs":
        """The same for at most so many SMs; None for as many as now."""


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

    def capped(self, num_ctas: int | None) -> DecodeInputs:
        return self  # XLA cannot be held to a number


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
class FixedSplit:
    """Contexts that are cut at the same places in any batch.

    Attributes:
        split_len: Tokens after which decode attention cuts; keys of chunks are not cut at all.
        num_tokens: Most that are cached at once.
        context_len: Most of one request.
    """

    split_len: int
    num_tokens: int
    context_len: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelForm:
    """What plans for our attention kernels depend on.

    Attributes:
        num_kv_heads: K, on one device.
        group: G, query heads for each of them.
        windows: Of the model's layers, each once; each has a plan of its own.
        num_ctas: That will work.
        fixed_split: None cuts contexts where loads are equal, which depends on the batch.
    """

    num_kv_heads: int
    group: int
    windows: Sequence[int | None]
    num_ctas: int
    fixed_split: FixedSplit | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelDecodeInputs:
    """Shares of the decode kernel's workers.

    Attributes:
        form: What they depend on.
        attend: See `KernelDecode`.
        prepare: Likewise.
    """

    form: KernelForm
    attend: Callable[..., Array]
    prepare: Callable[..., mosaic.Kernel] | None = None

    def fields(self, bucket: buckets.Bucket) -> Fields:
        empty = np.zeros(bucket.decode_rows, np.int32)
        return _plan_fields("decode_work", (self._plan(empty, w) for w in self.form.windows))

    def write(self, views: Views, context_lens: Int32[np.ndarray, "R"]) -> None:
        plans = (self._plan(context_lens, window) for window in self.form.windows)
        _write_plans(views, "decode_work", plans)

    def read(self, arrays: Mapping[str, Array]) -> paged_attention.DecodeAttention:
        works = _read_plans(arrays, "decode_work", work_list.WorkList, self.form.windows)
        return kernel_attention.KernelDecode(
            works=works,
            num_ctas=self.form.num_ctas,
            attend=self.attend,
            prepare=self.prepare,
        )

    def capped(self, num_ctas: int | None) -> DecodeInputs:
        if num_ctas is None:
            return self
        return dataclasses.replace(self, form=dataclasses.replace(self.form, num_ctas=num_ctas))

    def _plan(self, context_lens: Any, window: int | None) -> work_list.WorkList:
        return work_list.plan_decode(
            context_lens,
            num_kv_heads=self.form.num_kv_heads,
            num_ctas=self.form.num_ctas,
            window=window,
            **self._cuts(len(context_lens)),
        )

    def _cuts(self, num_requests: int) -> dict[str, int]:
        fixed = self.form.fixed_split
        if fixed is None:
            return {}
        max_parts = work_list.most_parts(
            num_requests=num_requests,
            num_tokens=fixed.num_tokens,
            context_len=fixed.context_len,
            num_kv_heads=self.form.num_kv_heads,
            split_len=fixed.split_len,
        )
        return {"split_len": fixed.split_len, "max_parts": max_parts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelPrefillInputs:
    """Items of a prefill kernel.

    Attributes:
        form: What they depend on.
        attend: See `KernelPrefill`.
        cuts_keys: Whether it can merge parts of a tile's keys.
        prepare: See `KernelPrefill`.
    """

    form: KernelForm
    attend: Callable[..., Array]
    cuts_keys: bool
    prepare: Callable[..., mosaic.Kernel] | None = None

    def fields(self, bucket: buckets.Bucket) -> Fields:
        form, capacity = self.form, self._most_tiles(bucket)
        split = self._split(bucket)
        if split is not None:
            capacity += split.max_parts
        plans = (self._build((), split, window, capacity, bucket.tokens) for window in form.windows)
        return _plan_fields("prefill_items", plans)

    def write(self, views: Views, chunks: Sequence[tiles.Chunk]) -> None:
        name = functools.partial(_field_name, "prefill_items", 0)
        num_parts = 2 * len(views[name("group_items")])  # a tile that is cut has at least two
        split = self._key_split(num_parts) if num_parts else None
        capacity, num_tokens = len(views[name("starts")]), len(views[name("sources")])
        plans = (
            self._build(chunks, split, window, capacity, num_tokens) for window in self.form.windows
        )
        _write_plans(views, "prefill_items", plans)

    def read(self, arrays: Mapping[str, Array]) -> paged_attention.PrefillAttention:
        plans = _read_plans(arrays, "prefill_items", prefill_tiles.PrefillTiles, self.form.windows)
        return kernel_attention.KernelPrefill(
            tiles=plans,
            num_ctas=self.form.num_ctas,
            attend=self.attend,
            prepare=self.prepare,
        )

    def _most_tiles(self, bucket: buckets.Bucket) -> int:
        return prefill_tiles.max_tiles(bucket.tokens, bucket.prefill_rows, group=self.form.group)

    def _split(self, bucket: buckets.Bucket) -> prefill_tiles.KeySplit | None:
        """None, and no merge in the program, where whole tiles keep all CTAs busy."""
        if not self.cuts_keys or self.form.fixed_split is not None:
            return None
        whole = bucket.tokens // prefill_tiles.tile_len(self.form.group)
        if whole * self.form.num_kv_heads >= self.form.num_ctas:
            return None
        return self._key_split(
            prefill_tiles.max_parts(
                num_kv_heads=self.form.num_kv_heads, num_ctas=self.form.num_ctas
            )
        )

    def _key_split(self, max_parts: int) -> prefill_tiles.KeySplit:
        return prefill_tiles.KeySplit(
            num_kv_heads=self.form.num_kv_heads,
            num_ctas=self.form.num_ctas,
            max_parts=max_parts,
        )

    def _build(
        self,
        chunks: Any,
        split: prefill_tiles.KeySplit | None,
        window: int | None,
        capacity: int,
        num_tokens: int,
    ) -> prefill_tiles.PrefillTiles:
        return prefill_tiles.build_prefill_tiles(
            chunks,
            group=self.form.group,
            capacity=capacity,
            num_tokens=num_tokens,
            window=window,
            split=split,
        )


def _field_name(plan: str, window_index: int, part: str) -> str:
    return f"{plan}_{window_index}_{part}"


def _plan_fields(name: str, empty_plans: Iterable[Any]) -> Fields:
    """Fields that hold plans, one for each window; where nobody writes to them, empty ones."""
    return {
        _field_name(name, i, part): _field_of(array)
        for i, plan in enumerate(empty_plans)
        for part, array in plan._asdict().items()
    }


def _write_plans(views: Views, name: str, plans: Iterable[Any]) -> None:
    for i, plan in enumerate(plans):
        for part, array in plan._asdict().items():
            views[_field_name(name, i, part)][:] = array


def _read_plans(
    arrays: Mapping[str, Array], name: str, kind: Any, windows: Sequence[int | None]
) -> dict[int | None, Any]:
    return {
        window: kind(*(arrays[_field_name(name, i, part)] for part in kind._fields))
        for i, window in enumerate(windows)
    }


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
