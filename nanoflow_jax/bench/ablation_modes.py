"""The ways in which the same steps are run: which there are, and which cannot be had."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from nanoflow_jax import config as config_lib
from nanoflow_jax.config import Executor, KernelUse
from nanoflow_jax.engine import executors
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.results.ablation import Role

_SCHEDULING = "xla_gpu_command_buffer_scheduling_mode"
# XLA leaves graphs out while a trace is made, and with them what it is made to show.
_GRAPHS_IN_TRACES = {"xla_enable_command_buffers_during_profiling": True}
_MERGER = "xla_gpu_dot_merger_threshold_mb"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to run a step.

    Attributes:
        name: Of it, in results.
        role: What it is there for.
        plan: Of the layers.
        executor: Who runs the plan.
        kernels: What operations are made of.
        options: What XLA is told beside what the executor tells it; None takes a setting back.
        caps_products: Whether products are our kernel, which keeps to a share of the SMs.
    """

    name: str
    role: Role
    plan: Plan
    executor: Executor
    kernels: config_lib.KernelsSection
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    caps_products: bool = False

    @property
    def keep_lanes(self) -> bool:
        """Whether kernels get tokens."""
        return executors.keeps_lanes(self.executor)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """All that XLA is told."""
        traced = _GRAPHS_IN_TRACES if self.executor is Executor.GRAPH else {}
        merged = {**executors.compiler_options(self.executor), **traced, **self.options}
        return {name: value for name, value in merged.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ways:
    """What there is to compare.

    Attributes:
        modes: Each with another name.
        missing: Why others are not there, by name.
    """

    modes: tuple[Mode, ...]
    missing: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plans:
    """How layers run.

    Attributes:
        one: In one nano-batch.
        cut: In several, each operation with its share of the SMs.
    """

    one: Plan
    cut: Plan

    @property
    def uncapped(self) -> Plan:
        """The same nano-batches, each operation on all SMs: not legal where two may run at once."""
        order = tuple(dataclasses.replace(nano, num_ctas=None) for nano in self.cut.order)
        return dataclasses.replace(self.cut, order=order)

    @property
    def chained(self) -> Plan:
        """The same nano-batches, of which each waits for all that were issued before it."""
        order = tuple(dataclasses.replace(nano, after=self.cut.keys) for nano in self.cut.order)
        return dataclasses.replace(self.cut, order=order)


def find(plans: Plans, kernels: config_lib.KernelsSection, *, on_gpu: bool, controls: bool) -> Ways:
    """Sequential, split and overlapped modes, and what must show no overlap.

    Args:
        plans: How layers run.
        kernels: What operations are made of, where the mode does not say it.
        on_gpu: Whether they will run on one.
        controls: Whether to add the modes that must not hide anything, and one twice.
    """
    missing: dict[str, str] = {}
    modes = [*_without_overlap(plans, kernels, on_gpu=on_gpu)]
    modes += _overlapped(plans, kernels, missing, on_gpu=on_gpu)
    if controls:
        modes += _controls(plans, kernels, missing, on_gpu=on_gpu)
        last = [mode for mode in modes if mode.role in (Role.OVERLAPPED, Role.SPLIT)][-1]
        modes.append(dataclasses.replace(last, name=f"{last.name} again", role=Role.AGAIN))
    return Ways(modes=tuple(modes), missing=missing)


def sequential(plans: Plans, kernels: config_lib.KernelsSection) -> Mode:
    """The plain forward pass, as an engine runs it by itself."""
    return Mode(
        name="sequential",
        role=Role.SEQUENTIAL,
        plan=plans.one,
        executor=Executor.SEQUENTIAL,
        kernels=kernels,
    )


def run_by(
    executor: Executor, plans: Plans, kernels: config_lib.KernelsSection, *, on_gpu: bool
) -> Mode:
    """The cut plan by one executor, which must be one that runs here."""
    if executor is Executor.SEQUENTIAL:
        return _split(plans, kernels, on_gpu=on_gpu)
    return _overlapped_by(executor, plans, kernels)


def _without_overlap(
    plans: Plans, kernels: config_lib.KernelsSection, *, on_gpu: bool
) -> Iterator[Mode]:
    plain = sequential(plans, kernels)
    yield plain
    ours = dataclasses.replace(kernels, gemm=KernelUse.PALLAS)
    yield dataclasses.replace(plain, name="sequential, our products", kernels=ours)
    yield _split(plans, kernels, on_gpu=on_gpu)


def _split(plans: Plans, kernels: config_lib.KernelsSection, *, on_gpu: bool) -> Mode:
    return Mode(
        name="split only",
        role=Role.SPLIT,
        plan=plans.uncapped,
        executor=Executor.SEQUENTIAL,
        kernels=kernels,
        options={_MERGER: 0} if on_gpu else {},  # XLA would put products together again
    )


def _overlapped_by(
    executor: Executor, plans: Plans, kernels: config_lib.KernelsSection, **more: Any
) -> Mode:
    fields = {
        "name": f"overlapped ({executor})",
        "role": Role.OVERLAPPED,
        "plan": plans.cut,
        "caps_products": executors.caps_products([plans.cut]),
    }
    return Mode(executor=executor, kernels=kernels, **{**fields, **more})


def _overlapped(
    plans: Plans,
    kernels: config_lib.KernelsSection,
    missing: dict[str, str],
    *,
    on_gpu: bool,
) -> Iterator[Mode]:
    for executor in Executor:
        if executor in (Executor.AUTO, Executor.SEQUENTIAL):
            continue
        mode = _overlapped_by(executor, plans, kernels)
        try:
            executors.choose(executor, [plans.cut], on_gpu=on_gpu)
        except ValueError as error:
            missing[mode.name] = str(error)
        else:
            yield mode


def _controls(
    plans: Plans,
    kernels: config_lib.KernelsSection,
    missing: dict[str, str],
    *,
    on_gpu: bool,
) -> Iterator[Mode]:
    """What takes overlap away from CUDA graphs, one thing at a time."""
    order: dict[str, tuple[Plan, dict[str, Any]]] = {
        "control: XLA's default order": (plans.cut, {_SCHEDULING: None}),
        "control: serialised": (plans.cut, {_SCHEDULING: "SERIALIZE"}),
        "control: all SMs for each": (plans.uncapped, {}),
        "control: one lane": (plans.chained, {}),
    }
    for name, (plan, options) in order.items():
        try:
            executors.choose(Executor.GRAPH, [plan], on_gpu=on_gpu)
        except ValueError as error:
            missing[name] = str(error)
            continue
        fields = {"name": name, "role": Role.CONTROL, "plan": plan, "options": options}
        yield _overlapped_by(Executor.GRAPH, plans, kernels, **fields)
