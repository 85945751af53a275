"""Trains the embedded model and writes its folder; a killed run goes on where it was saved."""

import pathlib
import sys

from absl import app, flags, logging

from nanoflow_jax import flags as knob_flags
from nanoflow_jax.train_embedded import pipeline, settings

_WORK_DIR = flags.DEFINE_string("work_dir", None, "Folder for checkpoints.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Model folder to write.", required=True)
knob_flags.define_sections(settings.Settings, flags.FLAGS)


def main(argv: list[str]) -> int:
    """Runs the program; returns its exit code."""
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        print(f"error: unknown argument {argv[1]}; options begin with --", file=sys.stderr)
        return 2
    try:
        _run(pathlib.Path(_WORK_DIR.value), pathlib.Path(_OUTPUT.value))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(work_dir: pathlib.Path, output: pathlib.Path) -> None:
    chosen = settings.from_flags({name: flags.FLAGS[name].value for name in flags.FLAGS})
    prepared = pipeline.prepare(chosen, work_dir)
    print(f"{prepared.facts.num_tokens} tokens in {len(prepared.train_rows)} rows", flush=True)
    trainer = pipeline.train(chosen, prepared, work_dir, report=_print_progress)
    validation = pipeline.finish(chosen, prepared, trainer, output)
    print(
        f"validation: code {validation.code_nats:.4f} nats/token "
        f"({validation.code_bits_per_byte:.4f} bits/byte), chat {validation.chat_nats:.4f}"
    )


def _print_progress(p: pipeline.Progress) -> None:
    print(
        f"step {p.step}/{p.num_steps}  loss {p.loss:.4f}  {p.tokens_per_s:.0f} tokens/s  "
        f"{p.eta_s / 60:.1f} min left",
        flush=True,
    )


if __name__ == "__main__":
    app.run(main)
