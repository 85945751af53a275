"""From what was chosen to the objects that a step's programs and inputs are made with."""

import functools
from collections.abc import Sequence
from typing import Any

from nanoflow_jax import compat
from nanoflow_jax.engine import attention_inputs
from nanoflow_jax.engine.kernel_choice import Choice, Choices, Maker, Operation
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.models import architecture, kernel_groups, kernel_operations
from nanoflow_jax.models import operations as operation_lib
from nanoflow_jax.nanobatch import executor as nanobatch
from pallas_kernels.decode_attention import decode_attention, prepare_decode
from pallas_kernels.decode_attention_triton import decode_attention_triton
from pallas_kernels.prefill_attention import prefill_attention, prepare_prefill
from pallas_kernels.prefill_attention_triton import prefill_attention_triton


def operations(
    choices: Choices,
    *,
    together: kernel_groups.KernelGroups | None = None,
    start_aside: nanobatch.StartAside | None = None,
) -> operation_lib.Operations:
    """Products of the layers, and how they run beside attention.

    Args:
        choices: What was chosen.
        together: From `kernels_together`, where kernels are to run as one; None elsewhere.
        start_aside: See `nanobatch.executor.run`.
    """
    made = operation_lib.PLAIN
    products, experts = made.products, made.experts
    gemm, grouped = choices[Operation.GEMM], choices[Operation.GROUPED_GEMM]
    if gemm.maker is Maker.MOSAIC:
        products = kernel_operations.KernelProducts(
            num_ctas=choices.num_ctas, interpret=_interpret(gemm)
        )
    if grouped.maker is Maker.MOSAIC:
        experts = kernel_operations.KernelExperts(
            num_ctas=choices.num_ctas, interpret=_interpret(grouped)
        )
    return operation_lib.Operations(
        products=products, experts=experts, together=together, start_aside=start_aside
    )


def kernels_together(
    choices: Choices, config: architecture.ModelConfig
) -> kernel_groups.KernelGroups:
    """Runs kernels of ours in one.

    Args:
        choices: What was chosen.
        config: The model, or the share of it that one device has.
    """
    ours = {name: choices[name].maker is Maker.MOSAIC for name in Operation}
    return kernel_groups.KernelGroups(
        config=config,
        products=ours[Operation.GEMM],
        expert_products=ours[Operation.GROUPED_GEMM],
        decode_attention=ours[Operation.DECODE_ATTENTION],
        prefill_attention=ours[Operation.PREFILL_ATTENTION],
        interpret=_interpret(choices[Operation.GEMM]),
    )


def attention(
    choices: Choices,
    *,
    layout: layout_lib.KvLayout,
    group: int,
    windows: Sequence[int | None],
    tile_len: int,
    fixed_split: attention_inputs.FixedSplit | None = None,
) -> attention_inputs.AttentionInputs:
    """Attention, and what the host plans of it.

    Args:
        choices: What was chosen.
        layout: Of the cache; kernels want `PageMajorLayout`.
        group: G, query heads for each kv head of a device.
        windows: Of the model's layers, each once.
        tile_len: Tokens in a tile of the plain path.
        fixed_split: See `KernelForm`; the plain path cuts nothing.
    """
    decode: attention_inputs.DecodeInputs = attention_inputs.PlainDecodeInputs(layout=layout)
    prefill: attention_inputs.PrefillInputs = attention_inputs.PlainPrefillInputs(
        layout=layout, tile_len=tile_len
    )
    form = attention_inputs.KernelForm(
        num_kv_heads=layout.shape.num_kv_heads,
        group=group,
        windows=windows,
        num_ctas=choices.num_ctas,
        fixed_split=fixed_split,
    )
    if (chosen := choices[Operation.DECODE_ATTENTION]).maker is not Maker.PLAIN:
        decode = _decode_inputs(form, chosen)
    if (chosen := choices[Operation.PREFILL_ATTENTION]).maker is not Maker.PLAIN:
        prefill = _kernel_prefill(chosen, form)
    return attention_inputs.AttentionInputs(decode=decode, prefill=prefill)


def wants_page_major(choices: Choices) -> bool:
    """Whether the cache must lie as kernels read it."""
    attentions = (Operation.DECODE_ATTENTION, Operation.PREFILL_ATTENTION)
    return any(choices[operation].maker is not Maker.PLAIN for operation in attentions)


def _decode_inputs(
    form: attention_inputs.KernelForm, choice: Choice
) -> attention_inputs.KernelDecodeInputs:
    if choice.maker is Maker.TRITON:
        attend = functools.partial(decode_attention_triton, interpret=choice.interpreted)
        return attention_inputs.KernelDecodeInputs(form=form, attend=attend)
    interpret = _interpret(choice)
    return attention_inputs.KernelDecodeInputs(
        form=form,
        attend=functools.partial(decode_attention, interpret=interpret),
        prepare=functools.partial(prepare_decode, interpret=interpret),
    )


def _kernel_prefill(
    choice: Choice, form: attention_inputs.KernelForm
) -> attention_inputs.KernelPrefillInputs:
    """The kernel, and plans that it can run."""
    if choice.maker is Maker.TRITON:
        attend = functools.partial(prefill_attention_triton, interpret=choice.interpreted)
        return attention_inputs.KernelPrefillInputs(form=form, attend=attend, cuts_keys=False)
    interpret = _interpret(choice)
    return attention_inputs.KernelPrefillInputs(
        form=form,
        attend=functools.partial(prefill_attention, interpret=interpret),
        cuts_keys=True,
        prepare=functools.partial(prepare_prefill, interpret=interpret),
    )


def _interpret(choice: Choice) -> Any:
    if not choice.interpreted:
        return None
    return compat.interpret_gpu_params(out_of_bounds_reads="uninitialized")
