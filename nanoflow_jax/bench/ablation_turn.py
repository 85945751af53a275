"""Measures one workload after another: all modes take turns on the same steps."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from nanoflow_jax.bench import (
    ablation_compare,
    ablation_modes,
    ablation_trace,
    clock,
    measured,
    steady_state,
)
from nanoflow_jax.bench.ablation_device import Stage
from nanoflow_jax.bench.ablation_ground import Ground
from nanoflow_jax.bench.ablation_modes import Mode, Plans, Ways
from nanoflow_jax.bench.ablation_programs import ALONE, Programs
from nanoflow_jax.bench.ablation_scale import Case, Scale, cases
from nanoflow_jax.config import Executor, PlanSection
from nanoflow_jax.engine import executors, inputs, kernel_choice, plan_choice, step_trace
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.results import ablation
from nanoflow_jax.results.ablation import Role

# Launched before the first step that counts, so that the device does not wait for the host.
_LEAD = 2
_CONTROLS = (Role.CONTROL, Role.AGAIN)
_TRACED = (Role.SEQUENTIAL, Role.SPLIT, Role.OVERLAPPED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A case of which it is known how it will run.

    Attributes:
        case: The case.
        load: As the memory keeps it up.
        modes: That are there; the first splits nothing.
        missing: Why others are not, by name.
    """

    case: Case
    load: steady_state.Load
    modes: tuple[Mode, ...]
    missing: Mapping[str, str]

    @property
    def plan(self) -> dict[str, Any]:
        """For a result's manifest."""
        plans = {mode.name: mode.plan.name for mode in self.modes}
        return steady_state.describe(self.load) | {"plans": plans}


def prepare(ground: Ground, case: Case, load: steady_state.Load, scale: Scale) -> Prepared:
    """Finds the modes of a case.

    Args:
        ground: The model and the device.
        case: The case.
        load: What is kept up.
        scale: What else is measured.

    Raises:
        ValueError: The plan does not cut the dense batch of a workload.
    """
    plans = find_plans(ground, load, scale)
    kernels, on_gpu = ground.config.kernels, ground.on_gpu
    if case.is_sweep:
        whole = dataclasses.replace(load, dense_batch=scale.dense_batch)
        cut = find_plans(ground, whole, scale).cut
        executor = executors.choose(Executor.AUTO, [cut], on_gpu=on_gpu)
        plain = ablation_modes.sequential(plans, kernels)
        modes = [plain]
        if executors.cuts(plans.cut):  # an engine runs what is not cut in the plain way
            modes.append(ablation_modes.run_by(executor, plans, kernels, on_gpu=on_gpu))
        ways = Ways(modes=tuple(modes), missing={})
    else:
        if not executors.cuts(plans.cut):
            raise ValueError(
                f"--plan={ground.config.plans.plan} does not cut a dense batch of "
                f"{load.dense_batch} tokens; raise --dense_batch or lower --plan_granule"
            )
        ways = ablation_modes.find(plans, kernels, on_gpu=on_gpu, controls=case.has_controls)
    there, missing = [], dict(ways.missing)
    for mode in ways.modes:
        try:
            ground.operations(mode)
        except ValueError as error:
            missing[mode.name] = str(error)
        else:
            there.append(mode)
    return Prepared(case=case, load=load, modes=tuple(there), missing=missing)


def granule(section: PlanSection, scale: Scale) -> int:
    """Tokens of which nano-batches are multiples: a half of the dense batch has one."""
    return max(1, min(section.plan_granule, scale.dense_batch // 2))


def find_plans(ground: Ground, load: steady_state.Load, scale: Scale) -> Plans:
    """The plan that splits nothing, and the one that is asked for, by default halves."""
    asked, bucket = ground.config.plans, load.bucket
    section = dataclasses.replace(
        asked,
        plan="halves" if asked.plan == "one" else asked.plan,
        plan_granule=granule(asked, scale),
    )
    num_sms = kernel_choice.num_ctas(ground.machine)
    shape = ground.source.config.layer_shape
    # A file has plans for some of them only, and one that fits none is refused.
    others = () if section.plan == "halves" else (case.load.bucket for case in cases(scale))
    buckets = sorted({bucket, *others})
    cut = plan_choice.choose(section, buckets, shape, num_sms=num_sms)[bucket]
    one = builders.one(shape, num_tokens=bucket.tokens, num_sms=num_sms)
    return Plans(one=one, cut=cut)


class Turn:
    """One case after another.

    Invariant: a round is in the folder, whole, before the next one begins, unless the process was
    killed while it was written; what is there is not written again.
    """

    def __init__(
        self,
        run: measured.Measured,
        stage: Stage,
        scale: Scale,
        reports: measured.Reports,
        *,
        end: float,
    ) -> None:
        """Looks what is there from before.

        Args:
            run: The folder.
            stage: The device.
            scale: What is measured.
            reports: Whom to tell.
            end: By the clock of the reports; after it nothing is begun that can be left out.
        """
        self._run, self._stage, self._scale = run, stage, scale
        self._reports, self._end = reports, end
        self._longest_s = 0.0
        self._done = self._total = 0
        self._steps: set[tuple[str, str, int, int]] = set()
        self._told: set[tuple[str, str]] = set()
        self._traced: set[tuple[str, str]] = set()
        for sample in run.result.samples():
            if isinstance(sample, ablation.Step):
                self._steps.add((sample.case, sample.mode, sample.round, sample.step))
            else:
                is_traced = isinstance(sample, ablation.Traced)
                told = self._traced if is_traced else self._told
                told.add((sample.case, sample.mode))

    def all(self, prepared: Sequence[Prepared]) -> list[str]:
        """Measures what there is time for; names of the rest."""
        self._total = sum(len(self._units(one)) for one in prepared)
        left_out = []
        for number, one in enumerate(prepared):
            now = self._reports.clock()
            if number and now + self._longest_s > self._end:
                left_out.append(one.case.name)
                continue
            self._one(one)
            self._longest_s = max(self._longest_s, self._reports.clock() - now)
        return left_out

    def _one(self, prepared: Prepared) -> None:
        case = prepared.case.name
        for mode, reason in prepared.missing.items():
            self._miss(case, mode, reason)
        units = self._units(prepared)
        left = [unit for unit in units if not self._has(case, *unit)]
        compared = all((case, mode.name) in self._told for mode in prepared.modes)
        self._done += len(units) - len(left)
        if not left and compared and not self._untraced(prepared):
            return
        prepared, programs = self._compile(prepared)
        there = {*self._units(prepared)}
        self._done += len([unit for unit in left if unit not in there])
        left = [unit for unit in left if unit in there]
        steps = self._steps_of(prepared)
        self._compare(prepared, programs, steps[: self._scale.judged_steps])
        for number, (mode, round_number) in enumerate(left):
            if round_number and self._reports.clock() > self._end:
                self._run.note(
                    f"{case}: {len(left) - number} rounds not measured, for want of time"
                )
                return
            for sample in self._round(prepared, programs, steps, mode, round_number):
                if (case, mode, round_number, sample["step"]) not in self._steps:
                    self._add(sample)
            self._done += 1
            self._reports.progress(self._done, self._total, f"{case}: {mode}")
        self._trace(prepared, programs, steps[: self._scale.traced_steps])

    def _is_traced(self, case: Case) -> bool:
        return case.has_controls and self._scale.traced_steps > 0

    def _untraced(self, prepared: Prepared) -> list[str]:
        """Modes of which it is to be found, and is not known, how long each operation takes."""
        case = prepared.case
        if not self._is_traced(case):
            return []
        names = [one.name for one in prepared.modes if one.role in _TRACED]
        return [name for name in names if (case.name, name) not in self._traced]

    def _trace(
        self, prepared: Prepared, programs: Programs, steps: Sequence[steady_state.Step]
    ) -> None:
        """Times operations, each mode in a run of its own; what cannot be had is noted."""
        case = prepared.case.name
        for mode in self._untraced(prepared):
            if self._reports.clock() > self._end:
                self._run.note(f"{case}: operations of {mode} not timed, for want of time")
                continue
            try:
                found = ablation_trace.operation_seconds(self._stage, programs, mode, steps)
            except ablation_trace.TraceError as error:
                self._run.note(f"{case}: operations of {mode} not timed: {error}")
                continue
            if not found:
                self._run.note(f"{case}: no operation of {mode} has its name in a trace")
                continue
            fields = {"case": case, "mode": mode, "steps": len(steps), "operation_s": found}
            self._add({"type": "traced", **fields})

    def _miss(self, case: str, mode: str, reason: str) -> None:
        if (case, mode) not in self._told:
            self._add({"type": "missing", "case": case, "mode": mode, "reason": reason})
            self._told.add((case, mode))

    def _units(self, prepared: Prepared) -> list[tuple[str, int]]:
        """Modes and rounds in the order of time, to and fro."""
        scale, rounds = self._scale, {}
        for mode in prepared.modes:
            is_short = prepared.case.is_sweep or mode.role in _CONTROLS
            rounds[mode.name] = scale.control_rounds if is_short else scale.rounds
        if prepared.load.decode_rows and not prepared.case.is_sweep:
            rounds[ALONE] = scale.rounds
        return [
            (mode, number)
            for number in range(max(rounds.values()))
            for mode in clock.abba([*rounds], number)
            if number < rounds[mode]
        ]

    def _has(self, case: str, mode: str, number: int) -> bool:
        return all((case, mode, number, i) in self._steps for i in range(self._scale.steps))

    def _compile(self, prepared: Prepared) -> tuple[Prepared, Programs]:
        """The case without the modes that do not compile, and the programs of the others."""
        begin, load = self._reports.clock(), prepared.load
        try:
            programs = self._compile_modes(prepared)
        except jax.errors.JaxRuntimeError as error:
            self._run.note(f"{prepared.case.name}: one by one, as not all compiled")
            prepared = self._that_compile(prepared, error)
            programs = self._compile_modes(prepared)
        spent = self._reports.clock() - begin
        self._run.note(
            f"{prepared.case.name}: requests of {load.lengths}, {load.dense_batch} tokens a step, "
            f"compiled in {spent:.1f} s"
        )
        return prepared, programs

    def _compile_modes(self, prepared: Prepared) -> Programs:
        with step_trace.programs_that_traces_know(self._is_traced(prepared.case)):
            return self._stage.workshop.compile(
                prepared.modes, prepared.load, has_alone=not prepared.case.is_sweep
            )

    def _that_compile(self, prepared: Prepared, first_error: Exception) -> Prepared:
        """The case with the modes that compile.

        Raises:
            JaxRuntimeError: Not even the mode that splits nothing does.
        """
        plain, *others = prepared.modes
        there = [plain]
        for mode in others:
            alone = dataclasses.replace(prepared, modes=(plain, mode))
            try:
                self._compile_modes(alone)
            except jax.errors.JaxRuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                self._run.note(f"FAILED: {prepared.case.name}: {mode.name}: {reason}")
                self._miss(prepared.case.name, mode.name, f"does not compile: {reason}")
            else:
                there.append(mode)
        if len(there) == len(prepared.modes):
            raise first_error
        return dataclasses.replace(prepared, modes=tuple(there))

    def _steps_of(self, prepared: Prepared) -> list[steady_state.Step]:
        stage, load = self._stage, prepared.load
        writers: dict[Any, inputs.InputBuilder] = {}
        of: dict[str, inputs.InputBuilder] = {}
        for mode in prepared.modes:
            alike = mode.plan, mode.kernels, mode.caps_products
            if alike not in writers:
                writers[alike] = stage.workshop.builder(mode, load)
            of[mode.name] = writers[alike]
        simulation = steady_state.Simulation(
            load,
            num_pages=stage.num_pages,
            page_size=stage.ground.page_size,
            vocab_size=stage.ground.source.config.vocab_size,
        )
        simulation.warm_up()
        return simulation.record(_LEAD + self._scale.steps, of)

    def _compare(
        self, prepared: Prepared, programs: Programs, steps: Sequence[steady_state.Step]
    ) -> None:
        ground, case = self._stage.ground, prepared.case.name
        limit = ablation_compare.rounding(
            ground.dtype.name, num_layers=ground.source.config.num_layers
        )
        left = [mode for mode in prepared.modes if (case, mode.name) not in self._told]
        if not left:
            return
        reference = self._stage.judge(programs, prepared.modes[0].name, steps)
        for mode in left:
            found = self._stage.judge(programs, mode.name, steps, wanted=reference)
            fields = ablation_compare.compare(found, reference, limit)
            self._add({"type": "comparison", "case": case, "mode": mode.name, **fields})

    def _round(
        self,
        prepared: Prepared,
        programs: Programs,
        steps: Sequence[steady_state.Step],
        mode: str,
        number: int,
    ) -> Iterator[dict[str, Any]]:
        roles = {one.name: one.role for one in prepared.modes}
        if mode == ALONE:
            seconds = self._stage.run_alone(programs, prepared.modes[0].name, steps)
            ran = [(one, "") for one in seconds]
        else:
            found = self._stage.run(programs, mode, steps)
            ran = [(one.seconds, ablation_compare.hash_of(one.tokens)) for one in found]
        pairs = zip(steps[_LEAD:], ran[_LEAD:], strict=True)
        for i, (step, (seconds_of_step, tokens_sha256)) in enumerate(pairs):
            yield {
                "type": "step",
                "case": prepared.case.name,
                "mode": mode,
                "role": roles.get(mode, Role.ALONE),
                "round": number,
                "step": i,
                "seconds": seconds_of_step,
                "tokens": step.tokens,
                "decode_rows": step.decode_rows,
                "context_tokens": step.context_tokens,
                "sampled_rows": step.sampled_rows,
                "tokens_sha256": tokens_sha256,
            }

    def _add(self, sample: dict[str, Any]) -> None:
        self._run.result.add_sample(sample)
