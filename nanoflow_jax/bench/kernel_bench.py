"""Times kernels on shares of a GPU, problem by problem, into a result folder."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from nanoflow_jax import compat
from nanoflow_jax.bench import clock as clock_lib
from nanoflow_jax.bench import kernel_tasks, kernel_timing, measured
from nanoflow_jax.bench.kernel_ways import Setting
from nanoflow_jax.engine import kernel_choice
from nanoflow_jax.results import kernel_curves, kernels, manifest, provenance
from nanoflow_jax.results.writer import ResultWriter
from pallas_kernels import problem_shapes

# Modules of pallas_kernels whose files a result depends on.
_MODULES = (
    "decode_attention",
    "gemm",
    "grouped_gemm",
    "prefill_attention",
    "problem_shapes",
    "side_by_side",
)
_INTERPRETED_SMS, _INTERPRETED_ROUNDS = 2, 2
# For the ceilings at the end, and what is written then.
_END_S = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for.

    Attributes:
        layers: Names in problem_shapes.LAYERS; all if empty.
        kernels: Names in problem_shapes.KERNELS; all if empty.
        budget_s: After which no problem is begun, and rounds are left out.
        root: Where result folders lie.
        command: As it was given.
    """

    layers: Sequence[str] = ()
    kernels: Sequence[str] = ()
    budget_s: float
    root: Path
    command: Sequence[str]


def select(
    layers: Sequence[str], kernel_names: Sequence[str], *, on_gpu: bool
) -> tuple[problem_shapes.Problem, ...]:
    """Problems of such layers and kernels; tiny ones without a GPU.

    Raises:
        ValueError: A name is not known, or nothing is left.
    """
    for flag, given, known in (
        ("shapes", layers, tuple(problem_shapes.LAYERS)),
        ("kernels", kernel_names, problem_shapes.KERNELS),
    ):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"--{flag}: {', '.join(unknown)} not among {', '.join(known)}")
    problems = problem_shapes.problems() if on_gpu else problem_shapes.tiny_problems()
    found = tuple(
        problem
        for problem in problems
        if (not layers or not on_gpu or problem.layer in layers)
        and (not kernel_names or problem.shape.KERNEL in kernel_names)
    )
    if not found:
        raise ValueError(
            f"--shapes={','.join(layers)} have no problem of --kernels={','.join(kernel_names)}"
        )
    return found


def run(options: Options, reports: measured.Reports) -> manifest.Manifest:
    """Times everything asked for that fits into the budget.

    A run that was killed is gone on with, if it was to do the same by the same code.

    Returns:
        The manifest of its folder, ended.

    Raises:
        ValueError: A name is not known, or the kernels cannot run here.
    """
    begin = reports.clock()
    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    problems = select(options.layers, options.kernels, on_gpu=on_gpu)
    setting = _setting(device)
    clock = clock_lib.Clock()
    planned = _planned(options, problems, device, setting=setting, clock=clock)
    with measured.begin(options.root, planned, reports, clock) as run:
        turn = _Turn(run.result, setting, clock, reports, end=begin + options.budget_s - _END_S)
        for name in turn.all(problems):
            run.note(f"not measured, for want of time: {name}")
        drawn = kernel_curves.draw(kernels.by_mode(run.result.samples()))
        run.result.add_file(manifest.CURVES, drawn.encode())
        return run.finish()


def _setting(device: Any) -> Setting:
    if device.platform == "gpu":
        return Setting(on_gpu=True, num_sms=device.core_count, interpret=None)
    kernel_choice.check_interpreter(kernel_choice.machine_of(device))
    interpret = compat.interpret_gpu_params(out_of_bounds_reads="uninitialized")
    return Setting(on_gpu=False, num_sms=_INTERPRETED_SMS, interpret=interpret)


def _effort(setting: Setting) -> kernel_timing.Effort:
    if setting.on_gpu:
        return kernel_timing.Effort()
    return kernel_timing.Effort(rounds=_INTERPRETED_ROUNDS, interpreted=True)


def _planned(
    options: Options,
    problems: Sequence[problem_shapes.Problem],
    device: Any,
    *,
    setting: Setting,
    clock: clock_lib.Clock,
) -> manifest.Run:
    effort = _effort(setting)
    gpu = manifest.Device(platform="gpu", name=device.device_kind)
    return manifest.Run(
        kind="kernels",
        name="kernels",
        device=gpu if setting.on_gpu else provenance.processor(),
        command=tuple(options.command),
        setting={
            "layers": list(options.layers),
            "kernels": list(options.kernels),
            "problems": kernels.setting_of(problems),
            "num_sms": setting.num_sms,
            "rounds": effort.rounds,
            "sample_s": effort.sample_s,
            "method": clock.method,
            "why_not_cupti": clock.why,
        },
        kernels=_MODULES,
    )


class _Turn:
    """One problem after another.

    Invariant: what was measured of a problem is in the folder before the next one begins.
    """

    def __init__(
        self,
        result: ResultWriter,
        setting: Setting,
        clock: clock_lib.Clock,
        reports: measured.Reports,
        *,
        end: float,
    ) -> None:
        self._result, self._setting, self._clock = result, setting, clock
        self._reports, self._end = reports, end
        self._longest_s = 0.0
        self._done: dict[str, set[tuple[str, int]]] = {}
        for sample in result.samples():
            self._done.setdefault(sample.case, set()).add((sample.mode, sample.round))

    def all(self, problems: Sequence[problem_shapes.Problem]) -> list[str]:
        """Measures what there is time for; names of the rest."""
        left_out = []
        for number, problem in enumerate(problems):
            now = self._reports.clock()
            if number and now + self._longest_s > self._end:
                left_out.append(problem.name)
                continue
            note = self._one(problem)
            self._longest_s = max(self._longest_s, self._reports.clock() - now)
            self._reports.progress(number + 1, len(problems), f"{problem.name}: {note}")
        return left_out

    def _one(self, problem: problem_shapes.Problem) -> str:
        faults = counted = 0
        for sample in self._samples(problem):
            self._result.add_sample(sample)
            counted += "seconds" in sample
            if sample.get("fault") and not sample.get("is_missing"):
                faults += 1
                self._reports.say(f"FAILED: {problem.name}, {sample['mode']}: {sample['fault']}")
        return f"{counted} samples" + (f", {faults} failed" if faults else "")

    def _samples(self, problem: problem_shapes.Problem) -> Iterator[dict[str, Any]]:
        effort = _effort(self._setting)
        done = self._done.get(problem.name, set())
        task = kernel_tasks.build(problem.shape, self._setting)
        wanted = {(mode, n) for mode in kernel_timing.modes(task) for n in range(effort.rounds)}
        if wanted <= done:
            return
        try:
            yield from kernel_timing.measure(
                task,
                problem.name,
                clock=self._clock,
                effort=effort,
                done=done,
                is_late=lambda: self._reports.clock() > self._end,
            )
        except RuntimeError as error:  # of the device: too little memory for the operands, say
            said = str(error).splitlines()[0]
            labels = {"case": problem.name, "mode": kernels.ALL, "way": kernels.ALL}
            if (kernels.ALL, 0) not in done:
                yield labels | {"fault": f"failed: {said}"}
