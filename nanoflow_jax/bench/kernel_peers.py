"""Attention and grouped products of other libraries, where they are installed.

Their arrays are jax's own, handed over by DLPack; nothing is copied. They are imported where they
are used: most machines have none of them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanoflow_jax.bench.kernel_ways import Way

_WORKSPACE_BYTES = 128 << 20


class _Pending:
    """A tensor of torch that `jax.block_until_ready` can wait for."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def block_until_ready(self) -> "_Pending":
        if self.tensor.is_cuda:
            import torch

            torch.cuda.synchronize()
        return self


def _as_jax(_: Any, results: Sequence[Any]) -> tuple[jax.Array, ...]:
    return tuple(jnp.from_dlpack(one.tensor.contiguous()) for one in results)


def _tensors(operands: Any, names: Sequence[str]) -> list[Any]:
    import torch

    return [torch.from_dlpack(operands[name]) for name in names]


def torch_attention(mask: Any, *, is_causal: bool) -> Way:
    """scaled_dot_product_attention of torch, over dense keys and values.

    Args:
        mask: Takes operands; what each query sees, [R or 1, 1, T, C], or None for all.
        is_causal: Whether each query sees those up to itself.
    """

    def call(operands: Any) -> tuple[Any, ...]:
        import torch

        q, k, v = (x.transpose(1, 2) for x in _tensors(operands, ("q", "k", "v")))
        seen = mask(operands)
        form = {} if seen is None else {"attn_mask": torch.from_dlpack(seen)}
        attend = torch.nn.functional.scaled_dot_product_attention
        made = attend(q, k, v, is_causal=is_causal, enable_gqa=True, **form)
        return (_Pending(made.transpose(1, 2).flatten(0, 1)),)

    return Way(name="torch", function=call, view=_as_jax, compiled=False)


def flashinfer_decode(page_size: int) -> Way:
    """BatchDecodeWithPagedKVCacheWrapper, over the same pages as ours."""

    def plan(wrapper: Any, pages: Any, q: Any, kv_heads: int) -> None:
        wrapper.plan(*pages, q.shape[1], kv_heads, q.shape[2], page_size, q_data_type=q.dtype)

    return _flashinfer("BatchDecodeWithPagedKVCacheWrapper", plan, page_size)


def flashinfer_prefill(page_size: int, chunk_len: int) -> Way:
    """BatchPrefillWithPagedKVCacheWrapper, over the same pages as ours."""

    def plan(wrapper: Any, pages: Any, q: Any, kv_heads: int) -> None:
        import torch

        starts = torch.arange(0, q.shape[0] + 1, chunk_len, dtype=torch.int32, device=q.device)
        form = {"causal": True, "q_data_type": q.dtype}
        wrapper.plan(starts, *pages, q.shape[1], kv_heads, q.shape[2], page_size, **form)

    return _flashinfer("BatchPrefillWithPagedKVCacheWrapper", plan, page_size)


def _flashinfer(name: str, plan: Any, page_size: int) -> Way:
    planned: dict[int, Any] = {}  # by the operands' table, so that planning is not timed

    def call(operands: Any) -> tuple[Any, ...]:
        q, cache = _tensors(operands["ours"], ("q", "cache"))
        key = id(operands["ours"]["page_table"])
        if key not in planned:
            import flashinfer
            import torch

            space = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
            planned[key] = getattr(flashinfer, name)(space, "HND")
            table, lens = operands["ours"]["page_table"], operands["lens"]
            pages = [
                torch.from_numpy(one).to(q.device) for one in page_lists(table, lens, page_size)
            ]
            plan(planned[key], pages, q, cache.shape[2])
        return (_Pending(planned[key].run(q, cache)),)

    return Way(name="flashinfer", function=call, view=_as_jax, compiled=False)


def page_lists(table: Any, lens: Any, page_size: int) -> tuple[np.ndarray, ...]:
    """A page table as FlashInfer has it, all int32.

    Returns:
        Starts [R + 1] of each request in the second; pages of all requests; tokens [R] in the last
        page of each.
    """
    rows, lengths = np.asarray(table), np.asarray(lens)
    counts = -(-lengths // page_size)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    pages = np.concatenate([row[:count] for row, count in zip(rows, counts, strict=True)])
    return starts, pages.astype(np.int32), (lengths - (counts - 1) * page_size).astype(np.int32)
