"""What kernels are compared with: XLA, cuBLASLt, cuDNN, and libraries that are installed."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from nanoflow_jax.bench import kernel_peers as peers
from nanoflow_jax.bench.kernel_ways import Setting, Variant, Way
from pallas_kernels import problem_shapes

GRAPH_MODE = "xla_gpu_command_buffer_scheduling_mode"
LEAST_GRAPH = "xla_gpu_graph_min_graph_size"
_NEED_GPU = frozenset({"cublaslt", "cudnn", "flashinfer", "pallas, graph branches"})
# A gated product whose factors are rounded to bfloat16 before they meet.
_GATED_SLACK = 2.0
_LIBRARIES = frozenset({"torch", "tokamax", "flashinfer"})


def missing(setting: Setting, names: Sequence[str]) -> dict[str, str]:
    """Of such baselines those that cannot be had here, and why."""
    found = {}
    for name in names:
        if name in _LIBRARIES and importlib.util.find_spec(name) is None:
            found[name] = "is not installed"
        elif name in _NEED_GPU and not setting.on_gpu:
            found[name] = "needs a GPU"
    return found


def _is_there(setting: Setting, name: str) -> bool:
    return not missing(setting, (name,))


def einsum(operands: Any) -> tuple[Array, ...]:
    """A product as XLA likes it: both factors of a gate in one, results in bfloat16.

    Args:
        operands: x and residual in `ours`, weights [C, F, D] in `stacked`.
    """
    ours, weights = operands["ours"], operands["stacked"]
    made = jnp.einsum("TD,CFD->CTF", ours["x"], weights)
    y = made[0]
    if len(weights) > 1:
        gate, up = made.astype(jnp.float32)
        y = (jax.nn.silu(gate) * up).astype(y.dtype)
    if "residual" in ours:
        y = y + ours["residual"]
    return (y,)


def products(setting: Setting) -> list[Variant]:
    """XLA's choice, which may be a kernel of its own, and cuBLASLt."""
    ways = [Way(name="xla", function=einsum, slack=_GATED_SLACK)]
    if setting.on_gpu:
        options = {"xla_gpu_enable_triton_gemm": False}
        ways.append(Way(name="cublaslt", function=einsum, options=options, slack=_GATED_SLACK))
    return [Variant(way=way) for way in ways]


def sorted_rows(
    x: Float[Array, "T D"], experts: Int32[Array, "T A"], *, num_experts: int
) -> dict[str, Array]:
    """Rows by expert without padding, for ragged_dot.

    Returns:
        rows [T A, D], sizes [E], rows of each expert, and places [T A], the row of each choice of
        each token.
    """
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    number = jnp.arange(num_experts, dtype=flat.dtype)
    sizes = (flat[:, None] == number[None]).sum(axis=0, dtype=jnp.int32)
    return {"rows": x[order // experts.shape[1]], "sizes": sizes, "places": places}


def grouped(setting: Setting, *, gated: bool) -> list[Variant]:
    """jax.lax.ragged_dot, weights input-major, and tokamax's."""

    def run(product: Any) -> Any:
        def call(operands: Any) -> tuple[Array, ...]:
            rows = operands["sorted"]
            y = product(rows["rows"], operands["w_in_out"], rows["sizes"])
            if gated:
                gate, up = jnp.split(y.astype(jnp.float32), 2, axis=1)
                y = (jax.nn.silu(gate) * up).astype(y.dtype)
            return (y,)

        return call

    def by_choice(operands: Any, results: Sequence[Array]) -> tuple[Array, ...]:
        return (results[0][operands["sorted"]["places"]],)

    ways = [
        Way(name="ragged_dot", function=run(jax.lax.ragged_dot), view=by_choice, slack=_GATED_SLACK)
    ]
    if _is_there(setting, "tokamax"):
        import tokamax

        product = tokamax.ragged_dot
        ways.append(Way(name="tokamax", function=run(product), view=by_choice, slack=_GATED_SLACK))
    return [Variant(way=way) for way in ways]


def attention(
    shape: problem_shapes.Decode | problem_shapes.Prefill, setting: Setting
) -> list[Variant]:
    """jax.nn.dot_product_attention by XLA and by cuDNN, torch's and tokamax's, and FlashInfer's.

    All but FlashInfer's get keys and values that lie dense, one request after another. A prefix, or
    for torch and tokamax contexts of several lengths, are a mask that is read.
    """
    if isinstance(shape, problem_shapes.Decode):
        ragged, is_causal, has_prefix = shape.ragged, False, False
        paged = peers.flashinfer_decode(shape.page_size)
    else:
        ragged, is_causal, has_prefix = False, not shape.prefix_len, shape.prefix_len > 0
        paged = peers.flashinfer_prefill(shape.page_size, shape.chunk_len)

    def mask(operands: Any) -> Array | None:
        num_keys = operands["k"].shape[1]
        if ragged:
            return _length_mask(operands["lens"], num_keys)
        return _causal_mask(operands["q"].shape[1], num_keys) if has_prefix else None

    def run(attend: Any, *, lens: bool, **how: Any) -> Any:
        def call(operands: Any) -> tuple[Array, ...]:
            form: dict[str, Any] = {"is_causal": is_causal}
            if lens and ragged:
                form["key_value_seq_lengths"] = operands["lens"]
            elif (seen := mask(operands)) is not None:
                form["mask"] = seen
            # Libraries promote dtypes and ranks, which our tests do not allow.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                made = attend(*(operands[name] for name in ("q", "k", "v")), **form, **how)
            return (made.reshape(-1, *made.shape[2:]),)

        return call

    attend = jax.nn.dot_product_attention
    names = ["xla", *(["cudnn"] if setting.on_gpu else [])]
    ways = [Way(name=name, function=run(attend, lens=True, implementation=name)) for name in names]
    if _is_there(setting, "tokamax"):
        import tokamax

        attend = tokamax.dot_product_attention
        ways.append(Way(name="tokamax", function=run(attend, lens=False)))
    if _is_there(setting, "torch"):
        ways.append(peers.torch_attention(mask, is_causal=is_causal))
    if _is_there(setting, "flashinfer"):
        ways.append(paged)
    return [Variant(way=way) for way in ways]


def _causal_mask(num_queries: int, num_keys: int) -> Bool[Array, "1 1 T C"]:
    """The last query sees all keys, each one before it one less."""
    query = jnp.arange(num_keys - num_queries, num_keys, dtype=jnp.int32)
    return (jnp.arange(num_keys, dtype=jnp.int32)[None] <= query[:, None])[None, None]


def _length_mask(lens: Int32[Array, "R"], num_keys: int) -> Bool[Array, "R 1 1 C"]:
    return (jnp.arange(num_keys, dtype=jnp.int32)[None] < lens[:, None])[:, None, None]
