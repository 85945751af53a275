"""The forward program that an H200 would run, compiled without one."""

import collections
import dataclasses
import functools

import deviceless
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanoflow_jax import config
from nanoflow_jax.engine import implementations, kernel_choice, programs
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.models import huggingface, presets, transformer
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
        read, num_layers=_LAYERS, windows=read.windows[:_LAYERS], moe=moe, vocab_size=1024
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


@functools.cache
def _program(preset, *asked):
    """The forward of a model of two layers, with what an H200 chooses unless something is asked."""
    model = _model_config(preset)
    served = kernel_choice.Served(config=model, dtype=np.dtype(jnp.bfloat16), page_size=_PAGE_SIZE)
    knobs = {f"kernel_{operation}": "pallas" for operation in asked}
    section = config.EngineConfig.from_knobs(**knobs).kernels
    choices = kernel_choice.choose(section, _H200, served)
    kv_layout = _layout(model)
    sizes = programs.Sizes(
        max_requests=_BUCKET.decode_rows,
        max_pages=_MAX_PAGES,
        num_pages=_NUM_PAGES,
        dense_batch=_BUCKET.tokens,
        vocab_size=model.vocab_size,
        penalty_requests=1,
        attention=implementations.attention(choices, layout=kv_layout, config=model, tile_len=128),
    )

    def make(spec):
        return jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)

    graph, state = nnx.split(transformer.Transformer(make, model))
    weights, treedef = jax.tree.flatten(state)
    forward = programs.build_forward(
        graph,
        treedef,
        layout=kv_layout,
        sizes=sizes,
        bucket=_BUCKET,
        operations=implementations.operations(choices),
    )
    return deviceless.program(
        jax.jit(forward, donate_argnums=0, keep_unused=True),
        [jax.eval_shape(kv_layout.allocate)] * _LAYERS,
        jax.ShapeDtypeStruct((sizes.max_requests,), jnp.int32),
        weights,
        jax.ShapeDtypeStruct((programs.forward_packing(sizes, _BUCKET).size,), jnp.int32),
    )


_KERNELS = {
    ("llama-3-8b",): ("decode_attention", "prefill_attention"),
    ("gemma-2-9b",): ("decode_attention", "prefill_attention"),
    ("llama-3-8b", "gemm"): (
        "decode_attention",
        "prefill_attention",
        "norm_kqv",
        "o",
        "up_gate",
        "down",
    ),
    ("mixtral-8x7b",): ("decode_attention", "prefill_attention", "up_gate", "down"),
}


def test_x():
    for case in _KERNELS:
        p = _program(*case)
        print(case, p.memory, len(p.launches))
        print(collections.Counter(k.kind for k in p.launches))
        for l in p.launches:
            print("  ", l.kind, l.name, l.scope)
        print([(c.name, c.shape, c.scope) for c in p.copies])
        print([(c.name, c.shape, c.scope) for c in p.instructions if c.opcode == "transpose"])
        print([(k.registers, k.spill_bytes, k.grid, k.shared_bytes) for k in p.mosaic_kernels])
