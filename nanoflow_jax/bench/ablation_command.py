"""The command `bench ablation`: its flags, and what it says."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from absl import flags

from nanoflow_jax import flags as flags_lib
from nanoflow_jax.bench import ablation_bench, ablation_scale, measured
from nanoflow_jax.bench.ablation_scale import Scale
from nanoflow_jax.results import ablation, ablation_table, folder


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    module: Any = {"flag_values": values, "module_name": flags_lib.main_module()}
    flags.DEFINE_list(
        "lengths",
        [],
        "Workloads of ablation, PROMPT/OUTPUT in tokens, such as 512/512,512/0; if empty the four "
        "of the paper, shorter ones on a CPU.",
        **module,
    )
    flags.DEFINE_list(
        "sweep",
        None,
        "Dense batches at which ablation compares sequential and overlapped; 16 to 4096 if unset, "
        "smaller ones on a CPU; none if empty.",
        **module,
    )
    flags.DEFINE_integer(
        "rounds", 0, "Of ablation, over all modes. 0: 5, or 2 on a CPU.", lower_bound=0, **module
    )
    flags.DEFINE_integer(
        "steps",
        0,
        "That ablation times in a round. 0: 60, or 4 on a CPU.",
        lower_bound=0,
        **module,
    )


def scale(values: flags.FlagValues, *, on_gpu: bool) -> Scale:
    """How much is measured.

    Args:
        values: With the flags of `define` and of the engine.
        on_gpu: Whether it will run on one.

    Raises:
        ValueError: A flag has another form.
    """
    found = ablation_scale.GPU if on_gpu else ablation_scale.CPU
    changes: dict[str, Any] = {}
    if values.lengths:
        changes["lengths"] = ablation_scale.read_lengths(values.lengths)
    if values.sweep is not None:
        changes["sweep"] = ablation_scale.read_batches(values.sweep)
    if values.rounds:
        changes["rounds"] = values.rounds
        changes["control_rounds"] = min(values.rounds, found.control_rounds)
    if values.steps:
        changes["steps"] = values.steps
    if values.dense_batch:
        changes["dense_batch"] = values.dense_batch
    return dataclasses.replace(found, **changes)


def run(
    values: flags.FlagValues,
    *,
    say: Callable[[str], None],
    stream: TextIO,
    command: Sequence[str],
) -> int:
    """Measures.

    Args:
        values: With the flags of `define`, those of the engine, `results` and `budget_seconds`.
        say: Takes a line of the answer.
        stream: Where progress goes.
        command: As it was given.

    Returns:
        The exit code: failed if nothing may be claimed of the result.
    """
    options = ablation_bench.Options(
        engine=flags_lib.engine_config(values),
        scale=scale(values, on_gpu=measured.is_on_gpu()),
        budget_s=values.budget_seconds,
        root=Path(values.results),
        command=command,
    )
    with contextlib.ExitStack() as stack:
        bar = measured.Bar(stack, stream, unit="round")
        found = ablation_bench.run(options, measured.Reports(say=say, progress=bar))
    result = folder.read(options.root / found.folder)
    made = ablation.KIND.figures(result.evidence)  # also of a run that failed
    for line in ablation_table.table(result.samples, made):
        say(line)
    for line in ablation_table.goals(found.run, result.samples, made):
        say(line)
    return measured.conclude(result, say=say, on_cpu="on a CPU nothing overlaps")
