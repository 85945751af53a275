"""What XLA makes of the plain parts of a layer, for a GPU that is not there.

RoPE, append, norms and residual additions have no kernel of ours: docs/decisions.md, Elementwise
operations. These tests hold XLA to what was found there.
"""

import collections
import dataclasses
import functools
import itertools

import deviceless
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanoflow_jax.kv_cache import layout
from nanoflow_jax.models import huggingface, presets, transformer
from nanoflow_jax.models.kernel_operations import KernelProducts
from nanoflow_jax.models.operations import PLAIN

_NUM_TOKENS, _NUM_LAYERS = 2048, 4
_CONFIG = huggingface.read_config(presets.load("llama-3-8b"))
_LAYOUT = layout.PageMajorLayout(
    shape=layout.CacheShape(
        num_pages=512,
        page_size=64,
        num_kv_heads=_CONFIG.num_kv_heads,
        head_dim=_CONFIG.head_dim,
        dtype=np.dtype(jnp.bfloat16),
    )
)


def _ints(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.int32)


@dataclasses.dataclass(frozen=True)
class _AppendAlone:
    """Writes into pages; what stands in place of attention gives its queries back."""

    pages: jax.Array
    offsets: jax.Array

    def append(self, k, v, cache, tokens):
        with jax.named_scope("append"):
            return _LAYOUT.append(cache, k, v, self.pages, self.offsets)

    def attend_decode(self, q, cache, spec, call):
        return (None,)

    def attend_prefill(self, q, cache, spec, call):
        # Attention is a kernel: XLA does not see through it, nor through this.
        return jax.lax.optimization_barrier((q, cache))[0]

    def joined(self, decoded, prefilled, tokens):
        return prefilled


def _run(graph, operations):
    def run(weights, x, positions, caches, pages, offsets):
        return nnx.merge(graph, weights).run_layers(
            x, positions, caches, _AppendAlone(pages, offsets), operations=operations
        )

    return jax.jit(run, donate_argnums=3)


@functools.cache
def _program(*, num_layers=_NUM_LAYERS, operations=PLAIN):
    def make(spec):
        return jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)

    graph, weights = nnx.split(transformer.Transformer(make, _CONFIG))
    x = jax.ShapeDtypeStruct((_NUM_TOKENS, _CONFIG.hidden_size), jnp.bfloat16)
    caches = [jax.eval_shape(_LAYOUT.allocate)] * num_layers
    index = _ints(_NUM_TOKENS)
    return deviceless.program(_run(graph, operations), weights, x, index, caches, index, index)


def _launches():
    """Launches by what they do, products apart."""
    parts = {
        "/rope/": "rope",
        "/append/": "append",
        "/norm_kqv/": "norm",
        "/norm/": "norm",
        "/o/": "add",
        "/down/": "add",
        "/up_gate/": "activation",
        "/pow": "angles",
        "/sin": "angles",
    }
    found = collections.defaultdict(list)
    for launch in _program().launches:
        if "dot_general" not in launch.scope:
            (part,) = {value for key, value in parts.items() if key in launch.scope}
            found[part].append(launch)
    return found


def test_caches_of_all_layers_are_written_in_place_and_nothing_is_copied():
    program = _program()
    assert program.memory.alias_bytes == _NUM_LAYERS * _LAYOUT.shape.cache_bytes
    assert not program.copies
    assert not any("Copy" in launch.kind for launch in program.launches)
    # Less than one cache: what the largest products write, and the residual stream.
    rows = 3 * _CONFIG.intermediate_size + 4 * _CONFIG.hidden_size
    assert program.memory.temp_bytes <= 2 * _NUM_TOKENS * rows


def test_rope_and_append_are_two_kernels_and_norms_and_residuals_three_in_each_layer():
    found = {part: len(launches) for part, launches in _launches().items()}
    assert found["rope"] == found["append"] == found["activation"] == _NUM_LAYERS
    assert found["norm"] == 2 * _NUM_LAYERS
    # One for attention and feed-forward together; in the first layers even less.
    assert found["add"] <= _NUM_LAYERS
    assert found["angles"] == 2


def test_beside_our_products_norms_are_one_kernel_each_and_residual_additions_none():
    ours = KernelProducts(num_ctas=132, interpret=None)
    program = _program(num_layers=1, operations=dataclasses.replace(PLAIN, products=ours))
    parts = [launch.scope.split("/")[3] for launch in program.launches[2:]]  # after the angles
    rest = ["o", "norm", "up_gate", "down"]
    assert parts[:2] == ["norm_kqv", "norm_kqv"]
    assert sorted(parts[2:4]) == ["append", "rope"]
    assert parts[4:] == rest
    kinds = collections.Counter(launch.kind for launch in program.launches)
    assert kinds == {"kCustomKernel": 6, "kCustomCall": 4}
    assert program.memory.alias_bytes == _LAYOUT.shape.cache_bytes
    assert not program.copies


def test_rope_of_keys_is_part_of_the_append():
    program = _program()
    products = {one.name: one.shape for one in program.instructions if "/norm_kqv/" in one.scope}
    for launch in _launches()["append"]:
        (append,) = [one for one in program.instructions if one.name == launch.name]
        # The cache, keys and values as the product left them, cosines and sines, page and offset.
        assert len(append.operands) == 6
        (qkv,) = [products[name] for name in append.operands if name in products]
        assert qkv == f"bf16[{_NUM_TOKENS},6144]"


def test_fusions_need_few_registers_and_no_spills():
    for launch in itertools.chain.from_iterable(_launches().values()):
        kernel = _program().kernel(launch.kernel)
        assert kernel.spill_bytes == 0
        assert kernel.registers <= 64
        assert kernel.shared_bytes <= 8192
