"""How many SMs NCCL may use for the collectives of a plan, which XLA is told per program."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from nanoflow_jax.engine import compiler
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import Plan

_LOG = logging.getLogger(__name__)
# Its help: "the maximum number of channels(SMs) NCCL will use for collective operations".
_OPTION = "xla_gpu_nccl_collective_max_nchannels"


def most_channels(plan: Plan) -> int | None:
    """The largest cap of a plan's collectives; None if it has none, or one that is not capped."""
    caps = [
        nano.num_ctas
        for nano in plan.order
        if plan.graph.by_name[nano.operation].resource is Resource.NETWORK
    ]
    known = [cap for cap in caps if cap is not None]
    return max(known) if known and len(known) == len(caps) else None


def compiler_options(plan: Plan) -> Mapping[str, Any]:
    """What XLA is told for the forward program of a plan; an option that jax may not take."""
    most = most_channels(plan)
    return {} if most is None else {_OPTION: most}


def can_cap(
    plans: Iterable[Plan],
    *,
    on_gpu: bool,
    refused_options: Callable[[Mapping[str, Any]], Mapping[str, str]] = compiler.refused_options,
) -> bool:
    """Whether collectives can be held to the caps of plans; a warning says why not.

    Args:
        plans: Of all buckets.
        on_gpu: Whether they run on one: on a CPU nothing is capped, and nobody is told.
        refused_options: Asks the installed jax; see `compiler.refused_options`.
    """
    wanted = [options for plan in plans if (options := compiler_options(plan))]
    if not wanted or not on_gpu:
        return False
    refused = refused_options(wanted[0])
    for reason in refused.values():
        _LOG.warning(
            "jax %s cannot hold collectives to the SMs that a plan gives them (%s); NCCL takes "
            "what it likes",
            jax.__version__,
            reason,
        )
    return not refused
