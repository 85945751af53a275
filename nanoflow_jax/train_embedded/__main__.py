"""Trains the embedded model and writes its folder; a killed run goes on where it was saved.

Exit codes: 0 done, 1 failed while training, 2 wrong flags or sources, 130 interrupted.
"""

import pathlib
import sys

from absl import flags, logging

from nanoflow_jax import console
from nanoflow_jax import flags as knob_flags
from nanoflow_jax.train_embedded import pipeline, settings

_WORK_DIR = flags.DEFINE_string("work_dir", None, "Folder for checkpoints.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Model folder to write.", required=True)
knob_flags.define_sections(settings.Settings, flags.FLAGS)


def main(argv: list[str]) -> int:
    """Runs the program; returns its exit code."""
    logging.set_verbosity(logging.WARNING)
    return console.run(
        lambda: _run(pathlib.Path(_WORK_DIR.value), pathlib.Path(_OUTPUT.value), argv[1:]),
        say=lambda text: print(text, file=sys.stderr, flush=True),
        debug=False,
    )


def _run(work_dir: pathlib.Path, output: pathlib.Path, arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}; flags begin with --")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is no folder; give the name of a new one")
    chosen = settings.from_flags({name: flags.FLAGS[name].value for name in flags.FLAGS})
    prepared = pipeline.prepare(chosen, work_dir)
    print(f"{prepared.facts.num_tokens} tokens in {len(prepared.train_rows)} rows", flush=True)
    try:
        trainer = pipeline.train(chosen, prepared, work_dir, report=_print_progress)
        validation = pipeline.finish(chosen, prepared, trainer, output)
    except OSError as error:
        raise console.RunError(
            f"{error}; make room or check permissions, then run the same command again: it goes "
            "on where it was saved"
        ) from error
    print(
        f"validation: code {validation.code_nats:.4f} nats/token "
        f"({validation.code_bits_per_byte:.4f} bits/byte), chat {validation.chat_nats:.4f}"
    )
    return 0


def _print_progress(p: pipeline.Progress) -> None:
    print(
        f"step {p.step}/{p.num_steps}  loss {p.loss:.4f}  {p.tokens_per_s:.0f} tokens/s  "
        f"{p.eta_s / 60:.1f} min left",
        flush=True,
    )


if __name__ == "__main__":
    console.start(main)
