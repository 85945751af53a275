"""What the steps of an engine are made of: plans, what runs them, and kernels."""

import dataclasses
from collections.abc import Sequence

from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import executors, invariance, kernel_choice, plan_choice
from nanoflow_jax.engine import ways as ways_lib
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.scheduler.buckets import Bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was chosen.

    Attributes:
        plans: Of all buckets.
        by_columns: Products whose weight the plans want split by columns.
        executor: That runs those that cut.
        kernels: What operations are made of.
        ways: How each bucket runs.
    """

    plans: dict[Bucket, Plan]
    by_columns: frozenset[str]
    executor: config_lib.Executor
    kernels: kernel_choice.Choices
    ways: dict[Bucket, ways_lib.Way]


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
    served = dataclasses.replace(served, by_columns=by_columns)
    kernels = kernel_choice.choose(
        config.kernels,
        machine,
        served,
        caps_products=executors.caps_products(plans.values()),
    )
    ways = ways_lib.choose(config, executor, plans, machine=machine, served=served, on_gpu=on_gpu)
    return Chosen(plans=plans, by_columns=by_columns, executor=executor, kernels=kernels, ways=ways)


def check_swap(running: Chosen, wanted: Chosen) -> None:
    """Makes sure that other plans run with the weights as they were loaded.

    Raises:
        ValueError: They want them otherwise.
    """
    if wanted.by_columns != running.by_columns:
        names = [", ".join(sorted(one.by_columns)) or "none" for one in (wanted, running)]
        raise ValueError(
            "weights split by columns are those of {}, and of {} since the start; start again with "
            "these plans".format(*names)
        )
