"""Converts a model: `python -m nanoflow_jax.convert --model=DIR --output=OUT`.

A folder of Hugging Face safetensors becomes Orbax, and an Orbax folder becomes safetensors again.
Run again after anything that stopped it: it goes on where it was. Exit codes: 0
done, 1 writing failed, 2 wrong flags or folders, 130 interrupted.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from checkpoints import folder, orbax_store, safetensors_store
from checkpoints.errors import WritingError
from nanoflow_jax import console, meter
from nanoflow_jax import flags as knob_flags

_MODEL_HELP = "Folder to read: safetensors becomes Orbax, Orbax becomes safetensors."


def _define(values: flags.FlagValues) -> None:
    common: dict[str, Any] = {"flag_values": values, "module_name": knob_flags.main_module()}
    flags.DEFINE_string("model", None, _MODEL_HELP, **common)
    flags.DEFINE_string("output", None, "Folder to write, new or from a run before.", **common)
    flags.DEFINE_boolean("verify", False, "Read all of it again and compare hashes.", **common)
    flags.DEFINE_boolean("debug", False, "Show where errors came from.", **common)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Shows bytes done; how many there are is known at the first call."""
    made: list[meter.Meter] = []

    def report(done: int, total: int) -> None:
        if not made:
            made.append(meter.Meter(total, unit="B", stream=sys.stderr, first=done))
        made[0].update(done)

    try:
        yield report
    finally:
        for shown in made:
            shown.close()


def _run(values: flags.FlagValues, arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}; flags begin with --")
    for name in ("model", "output"):
        if not getattr(values, name):
            raise ValueError(f"--{name} is missing; give --model=DIR --output=OUT")
    source = folder.ModelFolder.open(values.model)
    output = values.output
    total = sum(spec.nbytes for spec in source.tensors.values())
    ways = "Orbax to safetensors" if source.is_orbax else "safetensors to Orbax"
    size = f"{len(source.tensors)} tensors, {total / 1e9:.3f} GB"
    _say(f"converting {size}, from {ways}, into {output}")
    store = safetensors_store if source.is_orbax else orbax_store
    try:
        with _progress() as report:
            store.convert(source, output, progress=report)
    except WritingError as error:
        raise console.RunError(str(error)) from error
    if values.verify:
        _say("comparing with the hashes taken while copying")
        with _progress() as report:
            if source.is_orbax:
                safetensors_store.verify(source, output, progress=report)
            else:
                orbax_store.verify(output, progress=report)
    _say(f"done: --model={output} runs it")
    return 0


def main(argv: list[str]) -> int:
    """Runs the program; returns its exit code."""
    code = console.run(lambda: _run(flags.FLAGS, argv[1:]), say=_say, debug=flags.FLAGS.debug)
    if code == console.INTERRUPTED:
        _say("run the same command again to go on")
    return code


if __name__ == "__main__":
    _define(flags.FLAGS)
    console.start(main)
