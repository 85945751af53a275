"""The commands `search profile` and `search check`: flags, and what is measured for them."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from absl import flags as absl_flags

from nanoflow_jax.bench import measured, profile_bench, profile_check
from nanoflow_jax.bench.profile_bench import Bench, Options
from nanoflow_jax.models import architecture
from nanoflow_jax.results import manifest, profile

AUTO = "auto"


def define(values: absl_flags.FlagValues) -> None:
    """Defines the flags of this command."""
    absl_flags.DEFINE_list(
        "tokens",
        [],
        "What profile times operations over; empty: some usual sizes.",
        flag_values=values,
    )
    absl_flags.DEFINE_list(
        "contexts",
        [],
        "Cached tokens that rows see which profile times attention with.",
        flag_values=values,
    )
    absl_flags.DEFINE_boolean("quick", False, "Profile fewer sizes.", flag_values=values)
    absl_flags.DEFINE_float(
        "budget_seconds",
        540.0,
        "After which profile begins nothing more; the same command goes on with the rest.",
        lower_bound=0.0,
        flag_values=values,
    )


def run(
    values: absl_flags.FlagValues,
    *,
    name: str,
    config: architecture.ModelConfig,
    say: Callable[[str], None],
    stream: TextIO,
    command: Sequence[str],
    bench: Callable[[architecture.ModelConfig], Bench] = profile_bench.here,
) -> Path:
    """Measures the operations of a model on this machine.

    Args:
        values: With the flags of `define`, `device`, `devices` and `output`.
        name: Of the model.
        config: Its shape.
        say: Takes a line.
        stream: Where progress goes.
        command: As it was given.
        bench: Finds the device and what times it.

    Returns:
        The file.

    Raises:
        ValueError: Flags make no sense here, or the file cannot be written.
    """
    if values["device"].present and values.device != AUTO:
        raise ValueError(
            f"--device={values.device}: profile measures the device of this machine; leave it out, "
            "or say auto"
        )
    if values.devices != 1 or values.stages != 1:
        raise ValueError(
            "profile measures layers on one device, not what several say to each other; leave "
            "--devices and --stages out"
        )
    options = Options(
        name=Path(name).name,
        config=config,
        quick=values.quick,
        tokens=_numbers("tokens", values.tokens),
        contexts=_numbers("contexts", values.contexts),
        root=Path(values.output or profile.FOLDER),
        budget_s=values.budget_seconds,
        command=command,
    )
    with contextlib.ExitStack() as stack:
        bar = measured.Bar(stack, stream, unit="program")
        return profile_bench.run(options, bench(config), measured.Reports(say=say, progress=bar))


def check(
    model: str, device: manifest.Device, *, stream: TextIO, count: int = 40
) -> list[profile_check.Steps]:
    """Measures steps of an engine on the device of a profile.

    Args:
        model: What --model says.
        device: Of the profile.
        stream: Where progress goes.
        count: Steps of each batch.

    Raises:
        ValueError: This machine has another device.
    """
    here = profile_bench.kind_of_device()
    if here != device:
        raise ValueError(
            f"the profile was measured on {device.name} x{device.count} and this is {here.name} "
            f"x{here.count}; check it there, or measure this one with search profile"
        )
    with contextlib.ExitStack() as stack:
        return profile_check.measure(
            profile_check.engine_config(model),
            profile_check.USUAL,
            count=count,
            progress=measured.Bar(stack, stream, unit="load"),
        )


def _numbers(flag: str, texts: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(text) for text in texts}))
    except ValueError:
        raise ValueError(f"--{flag}={','.join(texts)} are not all whole numbers") from None
