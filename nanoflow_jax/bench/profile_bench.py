"""Times operations of a model for its profile, one after another; what was measured is kept."""

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import msgspec

from nanoflow_jax.bench import clock as clock_lib
from nanoflow_jax.bench import kernel_timing, measured, profile_points, profile_tasks
from nanoflow_jax.bench.kernel_ways import Setting, Task
from nanoflow_jax.bench.profile_points import Item, Machine, Scale
from nanoflow_jax.bench.profile_record import Record
from nanoflow_jax.config import Dtype
from nanoflow_jax.engine import build, model_source
from nanoflow_jax.models import architecture
from nanoflow_jax.results import manifest, profile, provenance

_MODULES = ("decode_attention", "gemm", "grouped_gemm", "prefill_attention", "side_by_side")
# Of a program and all that it reads, on a GPU and on a CPU; no more than a guess.
_COMPILE_S = {True: 4.0, False: 1.5}

# Samples of a task: as `kernel_timing.measure`.
Measure = Callable[..., Iterator[dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for.

    Attributes:
        name: Of the model, for the file.
        config: The model.
        scale: How much; None for what suits the device.
        quick: Less of it.
        tokens: In place of the scale's; none keep those.
        contexts: Likewise.
        root: Of all profiles.
        budget_s: After which nothing more is begun.
        command: As it was given.
    """

    name: str
    config: architecture.ModelConfig
    quick: bool = False
    tokens: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    root: Path
    budget_s: float
    command: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """A device and how it is measured.

    Attributes:
        device: Of this process.
        kind: For the file.
        machine: What operations are planned for.
        tasks: What they are made of.
        clock: To measure with.
        measure: Times a task.
    """

    device: Any
    kind: manifest.Device
    machine: Machine
    tasks: profile_tasks.Tasks
    clock: Any
    measure: Measure = kernel_timing.measure


def here(config: architecture.ModelConfig) -> Bench:
    """The first device of this process, and a clock for it."""
    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    defaults = build.defaults_of(device)
    dtype = model_source.run_dtype(Dtype.AUTO, "bfloat16", device.platform)
    num_sms = device.core_count if on_gpu else None
    setting = None
    if on_gpu:
        setting = Setting(on_gpu=True, num_sms=device.core_count, interpret=None)
    return Bench(
        device=device,
        kind=kind_of_device(),
        machine=Machine(
            num_sms=num_sms, memory_bytes=_memory_bytes(device), item_bytes=dtype.itemsize
        ),
        tasks=profile_tasks.Tasks(
            profile_tasks.Ground(
                device=device,
                config=config,
                dtype=dtype,
                page_size=defaults.page_size,
                tile_len=defaults.tile_len,
                page_major=on_gpu,
                setting=setting,
            )
        ),
        clock=clock_lib.Clock(),
    )


def kind_of_device() -> manifest.Device:
    """The first device of this process, as files name it."""
    device = jax.devices()[0]
    if device.platform == "gpu":
        return manifest.Device(platform="gpu", name=device.device_kind)
    return provenance.processor()


def _memory_bytes(device: Any) -> int:
    known = (device.memory_stats() or {}) if device.platform == "gpu" else {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(known.get("bytes_limit", host))


def scale_of(options: Options, *, on_gpu: bool) -> Scale:
    """How much is measured.

    Raises:
        ValueError: A number makes no sense.
    """
    scales = {
        (True, False): profile_points.GPU,
        (True, True): profile_points.QUICK_GPU,
        (False, False): profile_points.CPU,
        (False, True): profile_points.QUICK_CPU,
    }
    found = scales[on_gpu, options.quick]
    if options.tokens:
        found = dataclasses.replace(found, tokens=options.tokens)
    if options.contexts:
        found = dataclasses.replace(found, contexts=options.contexts)
    return found


def run(options: Options, bench: Bench, reports: measured.Reports) -> Path:
    """Times everything asked for, or what there is time for, into the file of the profile.

    What was measured before this process was killed, or ran out of time, is not measured again.

    Returns:
        The file.

    Raises:
        ValueError: The file cannot be written, or what was begun was begun by other code.
    """
    end = reports.clock() + options.budget_s
    scale = scale_of(options, on_gpu=bench.tasks.ground.setting is not None)
    planned = profile_points.plan(options.config, bench.machine, scale)
    path = profile.path_of(options.root, bench.kind, options.name)
    points, seconds = profile_points.seconds_of(
        planned.items, bench.machine, scale, compile_s=_COMPILE_S[bench.machine.num_sms is not None]
    )
    reports.say(
        f"{options.name} on {bench.kind.name}: {points:,} points of {len(planned.items):,} "
        f"programs, {scale.effort.rounds} samples each, about {seconds / 60:.0f} min; into {path}"
    )
    for note in planned.notes:
        reports.say(note)
    header = _header(options, bench, scale, planned.items)
    with Record(path, header) as record:
        if record.found:
            reports.say(f"{record.found:,} samples were measured before; going on with the rest")
        late = _Turn(bench, scale, record, reports, end=end).all(planned.items)
        notes = [*planned.notes, *record.faults]
        if late:
            notes.append(f"not measured, for want of time: {', '.join(late)}")
            reports.say(
                f"{len(late)} programs were left out, for want of time; the same command "
                "goes on with them"
            )
        profile.write(_profile(options, bench, header, record, planned.items, notes), path)
        if not late:
            record.end()
    return path


def _header(options: Options, bench: Bench, scale: Scale, items: Sequence[Item]) -> dict[str, Any]:
    """What must be the same for samples to be of one profile."""
    uses_kernels = bench.machine.num_sms is not None
    origin = provenance.collect(_MODULES if uses_kernels else ())
    return {
        "schema": profile.SCHEMA,
        "model": options.name,
        "sizes": profile.sizes_of(options.config),
        "device": msgspec.structs.asdict(bench.kind),
        "dtype": bench.tasks.ground.dtype.name,
        "method": bench.clock.method,
        "rounds": scale.effort.rounds,
        "items": [item.name for item in items],
        "versions": origin.versions,
        "commit": origin.commit,
        "kernel_sources": origin.kernel_sources,
    }


class _Turn:
    """One program after another.

    Invariant: what was measured of one is in the record before the next one begins.
    """

    def __init__(
        self,
        bench: Bench,
        scale: Scale,
        record: Record,
        reports: measured.Reports,
        *,
        end: float,
    ) -> None:
        self._bench, self._scale, self._record = bench, scale, record
        self._reports, self._end = reports, end

    def all(self, items: Sequence[Item]) -> list[str]:
        """Measures what there is time for; names of the rest."""
        left_out = []
        for number, item in enumerate(items):
            if number and self._reports.clock() > self._end and not self._is_done(item):
                left_out.append(item.name)
                continue
            self._one(item)
            self._reports.progress(number + 1, len(items), item.name)
        return left_out

    def _caps(self, item: Item) -> tuple[int, ...]:
        machine = self._bench.machine
        return machine.caps(self._scale.share_step) if item.by_kernel else ()

    def _is_done(self, item: Item) -> bool:
        return item.name in self._record.ended

    def _one(self, item: Item) -> None:
        if self._is_done(item):
            return
        try:
            task = self._bench.tasks.build(item, self._caps(item))
            for sample in self._samples(item, task):
                self._record.add(sample)
        except RuntimeError as error:  # of the device: too little memory for the operands, say
            said = str(error).splitlines()[0]
            self._record.add({"case": item.name, "mode": "all", "fault": f"failed: {said}"})
        self._record.end_of(item.name)

    def _samples(self, item: Item, task: Task) -> Iterator[dict[str, Any]]:
        yield from self._bench.measure(
            task,
            item.name,
            clock=self._bench.clock,
            effort=self._scale.effort,
            done=self._record.done(item.name),
        )


def _profile(
    options: Options,
    bench: Bench,
    header: Mapping[str, Any],
    record: Record,
    items: Sequence[Item],
    notes: Sequence[str],
) -> profile.Profile:
    points: list[profile.Point] = []
    pairs: list[profile.Pair] = []
    for item in items:
        for (num_ctas, split), seconds in record.seconds(item.name).items():
            if item.beside is None:
                points.append(_point(item, num_ctas, seconds, bench.machine))
            elif split is not None:
                pairs.append(_pair(item, split, seconds))
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return profile.Profile(
        model=options.name,
        sizes=header["sizes"],
        device=bench.kind,
        num_sms=bench.machine.num_sms,
        memory_bytes=bench.machine.memory_bytes,
        dtype=header["dtype"],
        method=header["method"],
        date=today.isoformat(),
        load=round(os.getloadavg()[0], 1),
        command=tuple(options.command),
        versions=header["versions"],
        commit=header["commit"],
        kernel_sources=header["kernel_sources"],
        notes=tuple(notes),
        points=tuple(points),
        pairs=tuple(pairs),
    )


def _point(
    item: Item, num_ctas: int | None, seconds: Sequence[float], machine: Machine
) -> profile.Point:
    return profile.Point(
        operation=item.operation,
        tokens=item.tokens,
        context=item.context,
        num_ctas=None if num_ctas == machine.num_sms else num_ctas,
        tile=item.tile_name,
        seconds=tuple(seconds),
    )


def _pair(item: Item, split: int, seconds: Sequence[float]) -> profile.Pair:
    assert item.beside is not None
    return profile.Pair(
        product=item.operation,
        tokens=item.tokens,
        other="decode_attention",
        other_tokens=item.beside,
        context=item.context,
        num_ctas=split,
        seconds=tuple(seconds),
    )
