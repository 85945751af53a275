"""How the layers of each bucket run: who runs its plan, what of, and what XLA is told of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nanoflow_jax import config as config_lib
from nanoflow_jax.config import Executor
from nanoflow_jax.engine import collective_caps, executors, invariance, kernel_choice
from nanoflow_jax.models import operations as operation_lib
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.scheduler.buckets import Bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How layers run in one bucket.

    Attributes:
        executor: Who runs the plan.
        operations: What they are made of.
        options: What XLA is told beside what the executor tells it.
    """

    executor: Executor
    operations: operation_lib.Operations
    options: Mapping[str, Any]

    @property
    def compiler_options(self) -> dict[str, Any]:
        """All that XLA is told."""
        return {**executors.compiler_options(self.executor), **self.options}


def choose(
    config: config_lib.EngineConfig,
    executor: config_lib.Executor,
    plans: Mapping[Bucket, Plan],
    *,
    machine: kernel_choice.Machine,
    served: kernel_choice.Served,
    on_gpu: bool,
) -> dict[Bucket, Way]:
    """How each bucket runs; only those whose plan caps products have ours for that.

    Args:
        config: The knobs.
        executor: Who runs plans that cut.
        plans: Of all buckets.
        machine: Where they will run.
        served: What operations are made for.
        on_gpu: Whether the machine has one.

    Raises:
        ValueError: The executor cannot run what was chosen.
    """
    is_invariant = config.batch.batch_invariant
    common = invariance.compiler_options(plans.values()) if is_invariant else {}
    is_capped = collective_caps.can_cap(plans.values(), on_gpu=on_gpu)
    ways = {}
    for bucket, its_executor in by_bucket(executor, plans).items():
        plan = plans[bucket]
        choices = kernel_choice.choose(
            config.kernels, machine, served, caps_products=executors.caps_products([plan])
        )
        ways[bucket] = Way(
            executor=its_executor,
            operations=executors.operations(its_executor, choices, served.config),
            options={**common, **(collective_caps.compiler_options(plan) if is_capped else {})},
        )
    return ways


def by_bucket(executor: Executor, plans: Mapping[Bucket, Plan]) -> dict[Bucket, Executor]:
    """Who runs the plan of each bucket, from who runs those that cut.

    What is not cut has nothing to run at once, and is to be no slower than if nothing were cut;
    where nothing is, whoever was asked for runs it.
    """
    if not any(map(executors.cuts, plans.values())):
        return dict.fromkeys(plans, executor)
    return {
        bucket: executor if executors.cuts(plan) else Executor.SEQUENTIAL
        for bucket, plan in plans.items()
    }
