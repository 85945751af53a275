"""Attention over pages by the kernels of `pallas_kernels`, and what they can do."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from nanoflow_jax.models import architecture, transformer
from nanoflow_jax.models.operations import Place
from pallas_kernels import decode_attention as decode_lib
from pallas_kernels import mosaic, prefill_tiles, work_list
from pallas_kernels import prefill_attention as prefill_lib
from pallas_kernels.decode_attention_triton import decode_attention_triton
from pallas_kernels.prefill_attention_triton import prefill_attention_triton


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelDecode:
    """`DecodeAttention` by our kernel.

    Attributes:
        works: The plan for each window of the model, made on the host.
        num_ctas: Most SMs to use.
        attend: A kernel of `pallas_kernels` with the operands of its `decode_attention`, told
            whether it is interpreted.
        prepare: The same, of its `prepare_decode`; None if it cannot run beside other kernels.
    """

    works: Mapping[int | None, work_list.WorkList]
    num_ctas: int
    attend: Callable[..., Array]
    prepare: Callable[..., mosaic.Kernel] | None = None

    def __call__(
        self,
        q: Float[Array, "R N H"],
        cache: Float[Array, "P 2 K S H"],
        page_table: Int32[Array, "R M"],
        context_lens: Int32[Array, "R"],
        spec: transformer.AttentionSpec,
        *,
        place: Place,
    ) -> Float[Array, "R N H"]:
        """See `DecodeAttention`; any cap gives the same result."""
        operands = (q, cache, page_table, context_lens, self.works[spec.window])
        return _attend(self, operands, spec, place)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelPrefill:
    """`PrefillAttention` by our kernel.

    Attributes:
        tiles: Of the step's chunks, for each window of the model.
        num_ctas: Most SMs to use.
        attend: A kernel of `pallas_kernels` with the operands of its `prefill_attention`, told
            whether it is interpreted.
        prepare: The same, of its `prepare_prefill`; None if it cannot run beside other kernels.
    """

    tiles: Mapping[int | None, prefill_tiles.PrefillTiles]
    num_ctas: int
    attend: Callable[..., Array]
    prepare: Callable[..., mosaic.Kernel] | None = None

    def __call__(
        self,
        q: Float[Array, "T N H"],
        cache: Float[Array, "P 2 K S H"],
        page_table: Int32[Array, "Q M"],
        spec: transformer.AttentionSpec,
        *,
        place: Place,
    ) -> Float[Array, "T N H"]:
        """See `PrefillAttention`; any cap gives the same result."""
        return _attend(self, (q, cache, page_table, self.tiles[spec.window]), spec, place)


def _attend(
    made: KernelDecode | KernelPrefill,
    operands: Sequence[Any],
    spec: transformer.AttentionSpec,
    place: Place,
) -> Array:
    """By itself, or by who runs kernels here; parts are then merged on all SMs."""
    form = {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap}
    if place.run_kernel is not None and made.prepare is not None:
        return place.run_kernel(made.prepare(*operands, **form, merge_ctas=made.num_ctas))
    num_ctas = place.num_ctas or made.num_ctas
    return made.attend(*operands, **form, num_ctas=num_ctas, token=place.token)


def check_decode(config: architecture.ModelConfig, dtype: np.dtype[Any], page_size: int) -> None:
    """Raises ValueError where the decode kernel cannot serve a model; the kernel says why."""
    _try_decode(
        lambda *batch, **form: _results(decode_lib.prepare_decode(*batch, **form)),
        config,
        dtype,
        page_size,
    )


def check_decode_triton(
    config: architecture.ModelConfig, dtype: np.dtype[Any], page_size: int
) -> None:
    """As `check_decode`, of the kernel for GPUs before Hopper."""
    _try_decode(decode_attention_triton, config, dtype, page_size)


def _try_decode(
    decode: Callable[..., Any],
    config: architecture.ModelConfig,
    dtype: np.dtype[Any],
    page_size: int,
) -> None:
    lens = np.ones((1,), np.int32)
    work = work_list.plan_decode(lens, num_kv_heads=config.num_kv_heads, num_ctas=1)
    for form in _forms(config):
        jax.eval_shape(
            lambda q, cache, table, lens, form=form: decode(q, cache, table, lens, work, **form),
            *_operands(config, dtype, page_size),
            jax.ShapeDtypeStruct(lens.shape, lens.dtype),
        )


def check_prefill(config: architecture.ModelConfig, dtype: np.dtype[Any], page_size: int) -> None:
    """Raises ValueError where the prefill kernel cannot serve a model; the kernel says why."""
    _try_prefill(
        lambda *batch, **form: _results(prefill_lib.prepare_prefill(*batch, **form)),
        config,
        dtype,
        page_size,
    )


def check_prefill_triton(
    config: architecture.ModelConfig, dtype: np.dtype[Any], page_size: int
) -> None:
    """As `check_prefill`, of the kernel for GPUs before Hopper."""
    _try_prefill(prefill_attention_triton, config, dtype, page_size)


def _try_prefill(
    prefill: Callable[..., Any],
    config: architecture.ModelConfig,
    dtype: np.dtype[Any],
    page_size: int,
) -> None:
    group = config.group_size
    tiles = prefill_tiles.build_prefill_tiles(
        [(0, 1, 0, 0)],
        group=group,
        capacity=prefill_tiles.max_tiles(1, 1, group=group),
        num_tokens=1,
    )
    for form in _forms(config):
        jax.eval_shape(
            lambda q, cache, table, form=form: prefill(q, cache, table, tiles, **form),
            *_operands(config, dtype, page_size),
        )


def _forms(config: architecture.ModelConfig) -> list[dict[str, Any]]:
    """What the model says of scores, for each of its windows."""
    scores = {"scale": config.query_scale, "softcap": config.attention_softcap}
    return [{**scores, "window": window} for window in config.distinct_windows]


def _operands(
    config: architecture.ModelConfig, dtype: np.dtype[Any], page_size: int
) -> list[jax.ShapeDtypeStruct]:
    """One query, one page, and the table that has it."""
    c = config
    return [
        jax.ShapeDtypeStruct((1, c.num_heads, c.head_dim), dtype),
        jax.ShapeDtypeStruct((1, 2, c.num_kv_heads, page_size, c.head_dim), dtype),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
    ]


def _results(kernel: Any) -> Any:
    """Something that `eval_shape` can look at; the kernel is not run."""
    return [jnp.zeros(result.shape, result.dtype) for result in kernel.results]
