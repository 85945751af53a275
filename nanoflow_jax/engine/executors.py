"""How the nano-operations of a plan are run at once, or not at all.

With `graph`, XLA makes CUDA graphs whose nodes wait only for what they read (and for tokens, which
hold lanes together), and does not merge what a plan has split. With `fused` attention and a product
that the plan has beside it are one kernel of ours, and the rest runs one after another on all SMs.
With `streams` attention has a stream of its own, and barriers keep the order in which all is
started; there are no CUDA graphs then, in which XLA would wait for it at once. With `sequential`
XLA makes its own order: one after another.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from nanoflow_jax import compat
from nanoflow_jax.config import Executor
from nanoflow_jax.engine import compiler, implementations
from nanoflow_jax.engine.kernel_choice import Choices, Maker, Operation
from nanoflow_jax.models import architecture
from nanoflow_jax.models import operations as operation_lib
from nanoflow_jax.nanobatch.executor import StartAside
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import Plan

_LOG = logging.getLogger(__name__)
# What each of them undoes otherwise: docs/decisions.md, Overlap is read from compiled programs.
_SPLIT_OPTIONS: Mapping[str, bool | int | str] = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_all_reduce_combine_threshold_bytes": 0,
}
_NEEDS_GPU = {
    Executor.GRAPH: "makes CUDA graphs",
    Executor.STREAMS: "starts attention on a stream of its own",
    Executor.FUSED: "runs products and attention in one kernel",
}
_OPTIONS: Mapping[Executor, Mapping[str, bool | int | str]] = {
    Executor.GRAPH: {
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
        "xla_gpu_graph_min_graph_size": 1,
        **_SPLIT_OPTIONS,
    },
    Executor.STREAMS: {
        "xla_gpu_enable_command_buffer": "",
        "xla_gpu_experimental_stream_annotation": True,
        **_SPLIT_OPTIONS,
    },
    Executor.FUSED: _SPLIT_OPTIONS,
    Executor.SEQUENTIAL: {},
}


def choose(
    asked: Executor,
    plans: Iterable[Plan],
    *,
    on_gpu: bool,
    interprets: bool = False,
    refused_options: Callable[[Mapping[str, Any]], Mapping[str, str]] = compiler.refused_options,
    why_no_streams: Callable[[], str | None] = compiler.why_no_streams,
) -> Executor:
    """The executor of an engine, never `auto`.

    Args:
        asked: The knob.
        plans: Of all buckets.
        on_gpu: Whether it runs on one.
        interprets: Whether products are interpreted kernels, which need none.
        refused_options: Asks the installed jax; see `compiler.refused_options`.
        why_no_streams: Likewise.

    Raises:
        ValueError: One is asked for that cannot run here.
    """
    if asked in _NEEDS_GPU and not on_gpu and not (asked is Executor.FUSED and interprets):
        raise ValueError(
            f"--executor={asked} {_NEEDS_GPU[asked]}, and there is no GPU here; leave it out, or "
            "look at the order of a step with python -m nanoflow_jax.overlap"
        )
    chosen = asked
    if asked is Executor.AUTO:
        chosen = Executor.GRAPH if on_gpu and any(map(cuts, plans)) else Executor.SEQUENTIAL
    refused = [*refused_options(compiler_options(chosen)).values()]
    if chosen is Executor.STREAMS and (reason := why_no_streams()) is not None:
        refused.append(reason)
    if not refused:
        return chosen
    reason = (
        f"--executor={chosen} needs what jax {jax.__version__} does not take ({'; '.join(refused)})"
    )
    if asked is not Executor.AUTO:
        raise ValueError(f"{reason}; leave the flag out, or use a jax that this was tested with")
    _LOG.warning("%s; operations run one after another, with nothing beside them", reason)
    return Executor.SEQUENTIAL


def cuts(plan: Plan) -> bool:
    """Whether a plan has anything to run at once."""
    return len(plan.cells) > 1


def compiler_options(executor: Executor) -> Mapping[str, bool | int | str]:
    """What XLA is told, for each forward program."""
    return _OPTIONS[executor]


def keeps_lanes(executor: Executor) -> bool:
    """Whether kernels get tokens; see `nanobatch.executor.run`."""
    return executor is Executor.GRAPH


def start_aside(executor: Executor) -> StartAside | None:
    """How operations of the memory lane are started; see `nanobatch.executor.run`."""
    if executor is not Executor.STREAMS:
        return None
    return functools.partial(compat.start_on_stream, stream=0)


def runs_together(executor: Executor) -> bool:
    """Whether kernels that a plan lets run at once are one; see `nanobatch.executor.run`."""
    return executor is Executor.FUSED


def operations(
    executor: Executor, choices: Choices, config: architecture.ModelConfig
) -> operation_lib.Operations:
    """What layers are made of, and how an executor runs it.

    Args:
        executor: Which.
        choices: What was chosen.
        config: The model, or the share of it that one device has.

    Raises:
        ValueError: As of `check_kernels`.
    """
    check_kernels(executor, choices)
    together = None
    if runs_together(executor):
        together = implementations.kernels_together(choices, config)
    return implementations.operations(choices, together=together, start_aside=start_aside(executor))


def check_kernels(executor: Executor, choices: Choices) -> None:
    """Makes sure that operations are made of what an executor can run.

    Raises:
        ValueError: Products or decode attention are no kernels that could run as one.
    """
    if not runs_together(executor):
        return
    for operation in (Operation.GEMM, Operation.DECODE_ATTENTION):
        if choices[operation].maker is not Maker.MOSAIC:
            raise ValueError(
                f"--executor=fused runs products and decode attention in one {Maker.MOSAIC}, and "
                f"{operation} is {choices[operation]}; take a plan that cuts (--plan=halves) and "
                "--kernel_* that allow it, on a Hopper GPU or interpreted, or leave the flag out"
            )


def caps_products(plans: Iterable[Plan]) -> bool:
    """Whether a plan gives products a share of the SMs, which only our kernel keeps to."""
    return any(
        nano.lane is Resource.COMPUTE and nano.num_ctas is not None
        for plan in plans
        for nano in plan.order
    )
