"""The forward program that an H200 would run, compiled without one."""

import dataclasses
import functools
import math

import deviceless
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest
from flax import nnx

from nanoflow_jax import compat, config
from nanoflow_jax.engine import implementations, invariance, kernel_choice, programs
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.models import huggingface, loading, presets, transformer
from nanoflow_jax.scheduler.buckets import Bucket

_LAYERS = 2
_BUCKET = Bucket(tokens=512, decode_rows=256, prefill_rows=8)
_NUM_PAGES, _PAGE_SIZE, _MAX_PAGES = 1024, 64, 16
_H200 = kernel_choice.Machine(
    name="NVIDIA H200",
    compute_capability=(9, 0),
    num_sms=132,
    jax_version=jax.__version__,
    can_interpret=False,
    num_threads=16,
)


def _model_config(preset):
    read = huggingface.read_config(presets.load(preset))
    moe = read.moe and dataclasses.replace(read.moe, sparse_layers=read.moe.sparse_layers[:_LAYERS])
    return dataclasses.replace(
        read, num_layers=_LAYERS, windows=read.windows[:_LAYERS], moe=moe, vocab_size=1000
    )


def _layout(model):
    return layout_lib.PageMajorLayout(
        shape=layout_lib.CacheShape(
            num_pages=_NUM_PAGES,
            page_size=_PAGE_SIZE,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=np.dtype(jnp.bfloat16),
        )
    )


def _forward(preset, *asked, num_devices=1, is_invariant=False):
    """The forward of a model of two layers, with what an H200 chooses unless something is asked.

    Returns:
        The program and the shapes of its arguments.
    """
    model = _model_config(preset)
    placement = dataclasses.replace(
        loading.place_model(model, jax.devices()[:num_devices]), adds_in_order=is_invariant
    )
    share = loading.share_of_one_device(model, placement)
    knobs = {f"kernel_{operation}": "pallas" for operation in asked}
    choices = kernel_choice.choose(
        config.EngineConfig.from_knobs(**knobs).kernels,
        _H200,
        kernel_choice.Served(config=share, dtype=np.dtype(jnp.bfloat16), page_size=_PAGE_SIZE),
    )
    sizes = programs.Sizes(
        max_requests=_BUCKET.decode_rows,
        max_pages=_MAX_PAGES,
        num_pages=_NUM_PAGES,
        dense_batch=_BUCKET.tokens,
        vocab_size=model.vocab_size,
        penalty_requests=1,
        num_devices=num_devices,
        attention=implementations.attention(
            choices,
            layout=_layout(share),
            group=share.group_size,
            windows=share.distinct_windows,
            tile_len=128,
            fixed_split=invariance.fixed_split(
                num_tokens=_NUM_PAGES * _PAGE_SIZE, context_len=_MAX_PAGES * _PAGE_SIZE
            )
            if is_invariant
            else None,
        ),
    )

    def make(spec):
        sharding = placement.sharding(spec.axes)
        return jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=sharding)

    graph, state = nnx.split(transformer.Transformer(make, model))
    weights, treedef = jax.tree.flatten(state)
    cache = placement.spec("P2KSH")
    forward = programs.build_forward(
        graph,
        treedef,
        layout=_layout(share),
        sizes=sizes,
        bucket=_BUCKET,
        operations=implementations.operations(choices),
        shares=programs.Shares(
            placement=placement,
            caches=[cache] * _LAYERS,
            weights=[weight.sharding.spec for weight in weights],
        ),
    )
    return forward, (
        [jax.eval_shape(_layout(model).allocate)] * _LAYERS,
        jax.ShapeDtypeStruct((sizes.max_requests,), jnp.int32),
        [jax.ShapeDtypeStruct(weight.shape, weight.dtype) for weight in weights],
        jax.ShapeDtypeStruct((programs.forward_packing(sizes, _BUCKET).size,), jnp.int32),
    )


@functools.cache
def _program(*case):
    """Compiled for an H200."""
    forward, shapes = _forward(*case)
    if not compat.CAN_INTERPRET_MOSAIC:
        pytest.skip("whole layers take minutes to compile: on the jax of GPU machines alone")
    return deviceless.program(jax.jit(forward, donate_argnums=0, keep_unused=True), *shapes)


# The second of each merges parts; 512 prompt tokens are too few for whole tiles on all SMs.
_ATTENTION = ("decode_attention", "prefill_attention") * 2
_KERNELS = {
    ("llama-3-8b",): _ATTENTION,
    ("llama-3-8b", "gemm"): ("norm_kqv", *_ATTENTION, "o", "up_gate", "down"),
    ("mixtral-8x7b",): (*_ATTENTION, "up_gate", "down"),
}


# Instructions that name arrays which are there already.
_NOTHING_MADE = ("parameter", "bitcast", "get-tuple-element", "tuple")


def _weight_bytes(model):
    """Sizes of the layers' matrices."""
    specs = [spec for spec in transformer.parameter_specs(model) if spec.name.startswith("layers.")]
    return {2 * size for spec in specs if (size := math.prod(spec.shape)) > 1 << 19}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", deviceless.cases([(case,) for case in _KERNELS]), ids=" ".join)
def test_each_layer_has_its_kernels_and_copies_neither_caches_nor_weights(case):
    program, model = _program(*case), _model_config(case[0])
    kernels = [one.scope.split("/") for one in program.launches if one.kind == "kCustomCall"]
    found = [next((part for part in scope if part in _KERNELS[case]), scope) for scope in kernels]
    # The two attentions may run in either order.
    count = len(_KERNELS[case])
    by_layer = [sorted(found[i : i + count]) for i in range(0, len(found), count)]
    assert by_layer == [sorted(_KERNELS[case])] * _LAYERS
    for kernel in program.mosaic_kernels:
        assert kernel.spill_bytes == 0
        assert kernel.grid[0] <= _H200.num_sms

    cache_bytes = _layout(model).shape.cache_bytes
    assert program.memory.alias_bytes == _LAYERS * cache_bytes
    # Parts of the step's one vector are copied for kernels to read, and what loops count with.
    by_name = {one.name: one for one in program.instructions}
    copied = [by_name[launch.name] for launch in program.launches if "Copy" in launch.kind]
    for one in (*program.copies, *copied):
        assert one.num_bytes <= 1 << 16
    assert not [one for one in program.instructions if one.opcode == "transpose"]
    made = {one.num_bytes for one in program.instructions if one.opcode not in _NOTHING_MADE}
    assert not made & _weight_bytes(model)


def test_each_of_two_devices_runs_kernels_on_its_heads_and_widths():
    forward, shapes = _forward("llama-3-8b", "gemm", num_devices=2)
    text = kernel_runs.lowered(forward, *shapes)
    assert text.count("@mosaic_gpu_v2") == _LAYERS * len(_KERNELS["llama-3-8b", "gemm"])
    # Attention and feed-forward of each layer, and the embedding.
    assert text.count('"stablehlo.all_reduce"') == 2 * _LAYERS + 1
    half_of_cache = f"tensor<{_NUM_PAGES}x2x4x{_PAGE_SIZE}x128xbf16>"
    assert half_of_cache in text


def test_devices_that_add_in_order_reduce_nothing_by_themselves():
    forward, shapes = _forward("llama-3-8b", "gemm", num_devices=2, is_invariant=True)
    text = kernel_runs.lowered(forward, *shapes)
    # Keys of chunks are not cut, so that no parts of theirs are merged.
    assert text.count("@mosaic_gpu_v2") == _LAYERS * (len(_KERNELS["llama-3-8b", "gemm"]) - 1)
    assert "all_reduce" not in text
    # One for each sum, and one that makes rows of the logits.
    assert text.count('"stablehlo.all_to_all"') == 2 * _LAYERS + 2
