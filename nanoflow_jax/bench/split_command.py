"""The command `bench split`: its flags, and what it says."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from absl import flags

from nanoflow_jax import flags as flags_lib
from nanoflow_jax.bench import measured
from nanoflow_jax.evidence import tables
from nanoflow_jax.results import folder, picture_file, split, split_chart

# Packages that only the extra `split` installs.
_OF_EXTRA = ("grpc", "google_crc32c")


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    module: Any = {"flag_values": values, "module_name": flags_lib.main_module()}
    flags.DEFINE_list(
        "split_models", ["embedded", "S"], "Models of split; the last one serves crowds.", **module
    )
    flags.DEFINE_integer("split_pairs", 10, "Of split, of each cut.", lower_bound=1, **module)
    flags.DEFINE_integer("split_rounds", 4, "Of split's crowds.", lower_bound=1, **module)
    flags.DEFINE_integer(
        "split_requests", 64, "Of split's crowds, an even number.", lower_bound=2, **module
    )
    flags.DEFINE_integer(
        "split_output_len", 48, "Tokens of each request of split.", lower_bound=8, **module
    )
    flags.DEFINE_string(
        "plot", None, "Also draw split's figures here: .svg, .html or .png.", **module
    )
    flags.DEFINE_string(
        "redraw", None, "Measure nothing: draw the --plot of this folder of split.", **module
    )


def run(
    values: flags.FlagValues,
    *,
    say: Callable[[str], None],
    stream: TextIO,
    command: Sequence[str],
) -> int:
    """Measures, or draws what was measured.

    Args:
        values: With the flags of `define`, `results` and `result_name`.
        say: Takes a line of the answer.
        stream: Where progress goes; there is none.
        command: As it was given.

    Returns:
        The exit code: failed if nothing may be claimed of the result.

    Raises:
        ValueError: Flags are wrong, or a package of the extra is not here.
        RunError: The server's process failed.
    """
    del stream
    path = Path(values.redraw) if values.redraw else _measured(values, say, command)
    result = folder.read(path)
    if result.kind is not split.KIND:
        raise ValueError(f"--redraw={path} is of kind {result.kind.name}, not {split.KIND.name}")
    for figure in result.manifest.figures:
        spread = tables.span(figure.low, figure.high, figure.unit)
        say(f"{figure.name}: {tables.quantity(figure.median, figure.unit)} ({spread})")
    if values.plot:
        picture = split_chart.draw(result.samples)
        picture_file.save(picture, values.plot, title="Sharing layers", flag="plot")
    say(f"result: {path}")
    return measured.conclude(result, say=say, on_cpu="both ends share this machine's processor")


def _measured(values: flags.FlagValues, say: Callable[[str], None], command: Sequence[str]) -> Path:
    if values.split_requests % 2:
        raise ValueError(f"--split_requests={values.split_requests} is odd: half of them are split")
    try:
        from nanoflow_jax.bench import split_bench
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_EXTRA:
            raise
        raise ValueError(
            f"split needs the package {error.name}: pip install 'nanoflow_jax[split]', or "
            "pip install -e '.[split]' in a clone"
        ) from None
    options = split_bench.Options(
        name=values.result_name or "split",
        scale=split_bench.Scale(
            models=tuple(values.split_models),
            pairs=values.split_pairs,
            output_len=values.split_output_len,
            requests=values.split_requests,
            rounds=values.split_rounds,
        ),
        root=Path(values.results),
        command=command,
    )
    found = asyncio.run(split_bench.run(options, measured.Reports(say=say)))
    return options.root / found.folder
