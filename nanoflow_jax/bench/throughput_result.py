"""The result folder of a throughput benchmark: what it sets out to do, and its samples."""

import dataclasses
import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax

from nanoflow_jax import config as config_lib
from nanoflow_jax.bench import throughput
from nanoflow_jax.engine import build, kernel_choice, model_source
from nanoflow_jax.results import manifest, provenance
from nanoflow_jax.workload import file as workload_file

# Not known before the memory is: it may differ from day to day with the same work done.
_NOT_PLANNED = ("device", "model_bytes", "cache_bytes", "num_pages", "max_requests_reason")
# Ends of the names of kernels' modules.
_MODULES = {kernel_choice.Maker.MOSAIC: "", kernel_choice.Maker.TRITON: "_triton"}
_PLACES = ("model", "cache_dir", "dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for.

    Attributes:
        name: Of the result.
        workload: The file of request mixes.
        mixes: Names of those that are run.
        repeats: Runs of each.
        engine: Its knobs.
        command: The command line.
        kind: Of the result.
        num_modes: Engines that run each mix.
    """

    name: str
    workload: Path
    mixes: Collection[str]
    repeats: int
    engine: config_lib.EngineConfig
    command: Sequence[str]
    kind: str = "throughput"
    num_modes: int = 1


def planned(asked: Asked, model: model_source.ModelSource) -> manifest.Run:
    """What the benchmark sets out to do, for its manifest."""
    return manifest.Run(
        kind=asked.kind,
        name=asked.name,
        device=device(asked.engine.parallel),
        command=tuple(asked.command),
        seed=asked.engine.model.weight_seed if asked.engine.model.random_weights else None,
        num_samples=len(asked.mixes) * asked.repeats * asked.num_modes,
        model=dataclasses.asdict(model.config),
        setting={
            "workload_sha256": hashlib.sha256(asked.workload.read_bytes()).hexdigest(),
            "mixes": list(asked.mixes),
            "repeats": asked.repeats,
            "knobs": chosen_knobs(asked.engine),
        },
    )


def plan(settings: build.Settings) -> dict[str, Any]:
    """What the engine chose that its speed depends on."""
    chosen = {name: value for name, value in vars(settings).items() if name not in _NOT_PLANNED}
    makers = {str(name): str(one.maker) for name, one in settings.kernels.by_operation.items()}
    return {
        **chosen,
        "kernels": makers,
        "num_ctas": settings.kernels.num_ctas,
        "interpreted": settings.kernels.any_interpreted,
    }


def kernels(settings: build.Settings) -> list[str]:
    """Modules of pallas_kernels that the engine uses."""
    return modules(settings.kernels)


def modules(choices: kernel_choice.Choices) -> list[str]:
    """Modules of pallas_kernels that are chosen: named as the operation, and by the maker."""
    chosen = choices.by_operation.items()
    return [f"{name}{_MODULES[one.maker]}" for name, one in chosen if one.maker in _MODULES]


def sample(
    case: str,
    number: int,
    mix: Sequence[workload_file.WorkRequest],
    result: throughput.Throughput,
) -> dict[str, Any]:
    """A run of a mix as a sample of kind `throughput`."""
    asked = sum(work.output_len for work in mix)
    return {"case": case, "round": number, "asked_tokens": asked, **vars(result)}


def device(section: config_lib.ParallelSection) -> manifest.Device:
    """The devices that the engine runs on."""
    found = jax.devices()[0]
    if found.platform == "cpu":
        return provenance.processor()
    count = section.tensor_parallel * section.data_parallel
    return manifest.Device(platform="gpu", name=found.device_kind, count=count)


def chosen_knobs(engine: config_lib.EngineConfig) -> dict[str, Any]:
    """Knobs that are not at their defaults, by flag; places of files are none that matter."""
    chosen: dict[str, Any] = {}
    for section in dataclasses.fields(engine):
        knobs = getattr(engine, section.name)
        for field in dataclasses.fields(knobs):
            value = getattr(knobs, field.name)
            if value != field.default and field.name not in _PLACES:
                chosen[f"{knobs.PREFIX}{field.name}"] = value
    return chosen
