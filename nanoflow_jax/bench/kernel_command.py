"""The command `bench kernels`: its flags, and what it says."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from absl import flags

from nanoflow_jax import console
from nanoflow_jax import flags as flags_lib
from nanoflow_jax.bench import clock as clock_lib
from nanoflow_jax.bench import device_check, kernel_bench, measured
from nanoflow_jax.results import folder, kernel_table, kernels
from pallas_kernels import problem_shapes


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    module: Any = {"flag_values": values, "module_name": flags_lib.main_module()}
    flags.DEFINE_list(
        "shapes",
        [],
        f"Whose operations kernels times, of {', '.join(problem_shapes.LAYERS)}; all if empty.",
        **module,
    )
    flags.DEFINE_list(
        "kernels",
        [],
        f"What kernels times, of {', '.join(problem_shapes.KERNELS)}; all if empty.",
        **module,
    )
    flags.DEFINE_boolean(
        "device_check", False, "Only look whether the device is fit to be measured.", **module
    )


def run(
    values: flags.FlagValues,
    *,
    say: Callable[[str], None],
    stream: TextIO,
    command: Sequence[str],
) -> int:
    """Measures, or only checks the device.

    Args:
        values: With the flags of `define`, `results` and `budget_seconds`.
        say: Takes a line of the answer.
        stream: Where progress goes.
        command: As it was given.

    Returns:
        The exit code: failed if the device is not fit, or a kernel of ours failed or was wrong.
    """
    if values.device_check:
        checked = device_check.check(clock_lib.Clock())
        for finding in checked.findings:
            say(finding.line)
        return console.FAILED if checked.unfit else 0
    options = kernel_bench.Options(
        layers=values.shapes,
        kernels=values.kernels,
        budget_s=values.budget_seconds,
        root=Path(values.results),
        command=command,
    )
    with contextlib.ExitStack() as stack:
        bar = measured.Bar(stack, stream, unit="problem")
        found = kernel_bench.run(options, measured.Reports(say=say, progress=bar))
    result = folder.read(options.root / found.folder)
    for line in kernel_table.table(result.samples, kernels.works(found.run), found.ceilings):
        say(line)
    is_wrong = any(kernels.is_our_fault(sample) for sample in result.samples)
    return measured.conclude(result, say=say, on_cpu="interpreted on a CPU", is_wrong=is_wrong)
