"""What the steps of an engine are made of: plans, what runs them, and kernels."""

import dataclasses
from collections.abc import Sequence

from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import executors, invariance, kernel_choice, plan_choice
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.scheduler.buckets import Bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was chosen.

    Attributes:
        plans: Of all buckets.
        by_columns: Products whose weight the plans want split by columns.
        executor: That runs them.
        kernels: What operations are made of.
    """

    plans: dict[Bucket, Plan]
    by_columns: frozenset[str]
    executor: config_lib.Executor
    kernels: kernel_choice.Choices


def choose(
    config: config_lib.EngineConfig,
    buckets: Sequence[Bucket],
    shape: LayerShape,
    machine: kernel_choice.Machine,
    served: kernel_choice.Served,
    *,
    on_gpu: bool,
) -> Chosen:
    """What steps are made of, from the knobs, the device and the model.

    Args:
        config: The knobs.
        buckets: All of the engine.
        shape: Of the model's layers on its devices.
        machine: One of them.
        served: What it will run; how weights are split is found here.
        on_gpu: Whether the device is one.

    Raises:
        ValueError: Knobs, plans, device and model do not fit each other.
    """
    plans = plan_choice.choose(
        config.plans, buckets, shape, num_sms=kernel_choice.num_ctas(machine)
    )
    if config.batch.batch_invariant:
        invariance.check_plans(plans)
    by_columns = plan_choice.by_columns(plans.values())
    executor = executors.choose(
        config.plans.executor,
        plans.values(),
        on_gpu=on_gpu,
        interprets=config.kernels.gemm == config_lib.KernelUse.INTERPRET,
    )
    kernels = kernel_choice.choose(
        config.kernels,
        machine,
        dataclasses.replace(served, by_columns=by_columns),
        caps_products=executors.caps_products(plans.values()),
    )
    return Chosen(plans=plans, by_columns=by_columns, executor=executor, kernels=kernels)


def check_swap(running: Chosen, wanted: Chosen) -> None:
    """Makes sure that other plans need no more than what was loaded and chosen at the start.

    Any executor runs a plan that splits nothing, and our products keep to any share of the SMs.

    Raises:
        ValueError: They need more.
    """
    needs: list[tuple[object, object]] = []
    if wanted.executor not in (running.executor, config_lib.Executor.SEQUENTIAL):
        needs.append((f"--executor={wanted.executor}", running.executor))
    if wanted.by_columns != running.by_columns:
        names = (", ".join(sorted(one.by_columns)) or "none" for one in (wanted, running))
        needs.append((f"weights split by columns: {next(names)}", next(names)))
    for operation, choice in wanted.kernels.by_operation.items():
        had = running.kernels[operation].maker
        if choice.maker not in (had, kernel_choice.Maker.PLAIN):
            needs.append((f"{operation} made of {choice.maker}", had))
    if needs:
        said = "; ".join(f"{need}, and the engine was started with {had}" for need, had in needs)
        raise ValueError(f"the plans need {said}; start it again with these plans")
