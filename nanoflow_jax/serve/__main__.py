"""Serves a model: `python -m nanoflow_jax.serve --flagfile=configs/serve.flags`.

Exit codes: 0 stopped by a signal, 1 the engine ended for good, 2 wrong flags or files.
"""

import sys
from typing import Any

from absl import flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import console
from nanoflow_jax import flags as knob_flags
from nanoflow_jax.batch import fingerprint
from nanoflow_jax.engine import model_source
from nanoflow_jax.serve import log, run


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _define(values: flags.FlagValues) -> None:
    knob_flags.define_sections(config_lib.EngineConfig, values)
    knob_flags.define_sections(config_lib.ServeConfig, values)
    module = knob_flags.main_module()
    common: dict[str, Any] = {"flag_values": values, "module_name": module}
    flags.DEFINE_boolean(
        "access_log", True, "Write a line for each request, without its text.", **common
    )
    flags.DEFINE_boolean("debug", False, "Show where errors came from.", **common)


def _run(values: flags.FlagValues, arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}; flags begin with --")
    engine = knob_flags.engine_config(values)
    section = knob_flags.serve_config(values).server
    source = model_source.open_model(engine.model)
    folder = source.folder.path if source.folder is not None else None
    name = section.model_name or fingerprint.model_name(engine.model)
    log.to_stderr(access=values.access_log)
    return run.serve(section, engine, folder=folder, model_name=name, say=_say)


def main(argv: list[str]) -> int:
    """Runs the program; returns its exit code."""
    return console.run(lambda: _run(flags.FLAGS, argv[1:]), say=_say, debug=flags.FLAGS.debug)


if __name__ == "__main__":
    _define(flags.FLAGS)
    console.start(main)
