"""Every difference between the versions of jax that this project runs on.

0.10.2 is the newest for Python 3.11; 0.11.2 is what GPU machines are pinned to
(`constraints/gpu.txt`); later ones are what pip finds for Python 3.12.
"""

import contextlib
import functools
import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Literal

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # deprecated since 0.11: "will be removed in a future version"
    plt = None  # type: ignore[assignment]

_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
# 0.10 interprets products only: no transposed shared memory, no casts of layouts.
CAN_INTERPRET_MOSAIC = _VERSION >= (0, 11)
# 0.10 finds no layout for registers that are loaded from transposed shared memory.
CAN_LOAD_TRANSPOSED = _VERSION >= (0, 11)
# The backend for GPUs older than Hopper; 0.12.0.1 still has it.
HAS_PALLAS_TRITON = plt is not None
# Digits behind the name of a kernel; see `name_kernels`.
KERNEL_DIGITS = 16


def interpret_gpu_params(**options: Any) -> Any:
    """InterpretGPUParams, which runs Mosaic kernels on a CPU.

    Args:
        options: For instance detect_races=True, out_of_bounds_reads="uninitialized".
    """
    _race_states()
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams(**options)
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams(**options)


@functools.cache
def name_kernels() -> None:
    """Makes jax name Mosaic kernels after what they do, from now on.

    jax 0.11 writes into each kernel the number of kernels of the process before it. Then no two
    are equal: that of 32 layers is compiled 32 times, and no cache of programs knows it again.
    """
    from jax._src.lib import mosaic_gpu_dialect as dialect
    from jax._src.lib.mlir import ir
    from jax.experimental.mosaic.gpu import core as core_lib

    if not hasattr(dialect, "get_or_set_dump_options"):  # 0.10 has no such number
        return
    core: Any = core_lib
    lower = core.lower_mgpu_module

    def lower_named(module: Any, *arguments: Any, **options: Any) -> None:
        attributes = module.operation.attributes
        digest = hashlib.sha256(str(module).encode()).hexdigest()[:KERNEL_DIGITS]
        name = f"{attributes['sym_name'].value}_{digest}"
        attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(name)
        lower(module, *arguments, **options)

    core.lower_mgpu_module = lower_named


def load_row(ref: Any, columns: Any, *, layout: Any) -> Any:
    """Part of a vector in global memory, into registers of that layout; inside a Mosaic kernel."""
    if _VERSION < (0, 11):
        return plgpu.load(ref, (columns,), layout=layout, optimized=False)
    load: Any = plgpu.load  # typed against the oldest version
    return load(ref.at[columns], layout=layout, optimized=False)


def races_found() -> bool:
    """Whether a kernel that was interpreted with detect_races since the reset had a race."""
    return any(state.races_found for state in _race_states())


def reset_interpreter() -> None:
    """Forgets races, and a kernel that failed; without it later kernels fail too."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.reset_gpu_interpret_mode_state()
    _race_states().clear()


@functools.cache
def _race_states() -> list[Any]:
    """What the interpreter notes of races, a state for each kernel; jax keeps the last alone."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    has_own = hasattr(gpu_callbacks, "GPURaceDetectionState")
    name = "GPURaceDetectionState" if has_own else "RaceDetectionState"
    make = getattr(gpu_callbacks, name)
    states: list[Any] = []

    def noted(**options: Any) -> Any:
        states.append(make(**options))
        return states[-1]

    setattr(gpu_callbacks, name, noted)
    return states


def abstract_gpu(kind: str, num_sms: int) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are lowered for a GPU that is not there."""
    from jax._src.mesh import AbstractDevice

    fields: dict[str, Any] = {"device_kind": kind, "num_cores": num_sms}
    if "platform" in inspect.signature(AbstractDevice).parameters:
        fields["platform"] = "gpu"
    # An empty mesh: with an explicit axis the transforms of Mosaic refs fail on 0.11.2.
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=AbstractDevice(**fields))
    return jax.sharding.use_abstract_mesh(mesh)


def start_on_stream(
    function: Callable[..., Any], arguments: Sequence[Any], *, stream: int
) -> tuple[Any, list[jax.Array]]:
    """Asks XLA to start a function on another stream of the GPU.

    Functions that are jitted within it are inlined: XLA has no stream for what they call.

    Args:
        function: Of pytrees of arrays.
        arguments: Of it; what is no array stays as it is.
        stream: Of those beside the main one, from 0.

    Returns:
        Its result, and all that it reads, behind one barrier: what comes after that can be started
        after it. Nothing is started, nor waited for, where the result has no arrays.
    """
    from jax.experimental import compute_on

    # 0.10 has another function of the shorter name, a context manager.
    annotate: Any = getattr(compute_on, "compute_on2", None) or compute_on.compute_on
    leaves, tree = jax.tree.flatten(list(arguments))
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    arrays = [leaf for leaf, there in zip(leaves, is_array, strict=True) if there]

    def of_arrays(*given: Any) -> Any:
        left = iter(given)
        whole = [
            next(left) if there else leaf for leaf, there in zip(leaves, is_array, strict=True)
        ]
        return function(*jax.tree.unflatten(tree, whole))

    traced, shape = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
    if not jax.tree.leaves(shape):
        return shape, []
    closed_over = len(traced.consts)
    read = jax.lax.optimization_barrier([*traced.consts, *arrays])
    flat = annotate(
        lambda *given: _inlined(traced.jaxpr, given[:closed_over], given[closed_over:]),
        compute_type=f"gpu_stream:{stream}",
        out_memory_spaces=jax.memory.Space.Device,
    )(*read)
    return jax.tree.unflatten(jax.tree.structure(shape), flat), read


def _inlined(jaxpr: Any, consts: Any, arguments: Any) -> list[Any]:
    """Evaluates a jaxpr, functions that are jitted in it as parts of it."""
    from jax._src import source_info_util

    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def read(atoms: Any) -> list[Any]:
        return [one.val if isinstance(one, Literal) else values[one] for one in atoms]

    for equation in jaxpr.eqns:
        primitive, operands = equation.primitive, read(equation.invars)
        scopes = source_info_util.current_name_stack() + equation.source_info.name_stack
        with source_info_util.user_context(None, name_stack=scopes), equation.ctx.manager:
            if primitive.name in ("jit", "pjit"):
                inner = equation.params["jaxpr"]
                made = _inlined(inner.jaxpr, inner.consts, operands)
            else:
                made = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
        results = made if isinstance(made, list | tuple) else [made]
        values.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars)


def device_kernels(launch: Callable[[], object]) -> list[tuple[str, float]]:
    """Kernels that ran on the GPU, in their order, as CUPTI saw them.

    Args:
        launch: Starts work and waits for it.

    Returns:
        Name and seconds of each.

    Raises:
        RuntimeError: CUPTI cannot be used: there is no GPU, or another profiler uses it.
    """
    try:
        from jax._src.lib import mosaic_gpu
    except ImportError as error:
        raise RuntimeError("jax has no CUDA plugin here, and with it no CUPTI") from error
    extension: Any = mosaic_gpu._mosaic_gpu_ext
    extension._cupti_init()
    try:
        launch()
    finally:
        # Not detached for good: it will be asked again.
        timings = extension._cupti_get_timings(False)
    return [(name, 1e-3 * milliseconds) for name, milliseconds in timings]


def check_pallas_triton() -> None:
    """Raises ValueError where this jax has no Triton backend of Pallas."""
    if plt is None:
        raise ValueError(
            f"jax {jax.__version__} has no Triton backend of Pallas; 0.12.0.1 still has it"
        )


def triton_call(
    body: Callable[..., None],
    *,
    out_shape: Any,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Callable[..., Any]:
    """A kernel for Pallas' Triton backend, to be called with its operands.

    Args:
        body: Takes refs of the operands, then of the results, all in global memory.
        out_shape: Shapes and dtypes of what it writes.
        grid: Programs along each axis.
        num_warps: Of a program.
        num_stages: Steps of a loop whose loads are on their way at a time.
        interpret: Whether to run on whatever is at hand instead of a GPU.

    Raises:
        ValueError: This jax has no such backend.
    """
    check_pallas_triton()
    # The warning comes when the program is lowered, where no context of ours reaches.
    warnings.filterwarnings(
        "ignore", "The Pallas Triton backend is deprecated", category=DeprecationWarning
    )
    return pl.pallas_call(
        body,
        out_shape=out_shape,
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
    )
