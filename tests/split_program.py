"""The program of split sessions in this process, and a gateway of the toy model beside it."""

import contextlib
import dataclasses
import pathlib
import subprocess
import sys
import types

import batch_runs
import split_choices
import split_model
from absl import flags as absl_flags

from nanoflow_jax.engine import model_source
from nanoflow_jax.split import __main__ as program
from nanoflow_jax.split import client_ends, identity


def run(capsys, *arguments):
    """Runs the program; its exit code, what it printed, and what it complained of."""
    values = absl_flags.FlagValues()
    chosen = program.command(["split", *arguments])
    if chosen is not None:
        chosen.define(values)
    code = program.main(list(values(["split", *arguments])), chosen, values)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def use_toy_model(monkeypatch):
    """Lets client programs open the toy model, and run its layers."""
    source = types.SimpleNamespace(
        config=split_choices.model().config, folder=None, stored_dtype="float32"
    )
    monkeypatch.setattr(model_source, "open_model", lambda section: source)
    monkeypatch.setattr(identity, "of", lambda *_, **__: split_model.IDENTITY)
    monkeypatch.setattr(client_ends, "build_engine", _engine)


def _engine(config, source, layers, *, grid=()):
    engine = split_model.ToyEngine(held=layers)
    engine.close = lambda: None
    return engine


@dataclasses.dataclass(frozen=True)
class Gateway:
    """Addresses of a gateway of the toy model, over a quick link and over a slow one."""

    quick: str
    slow: str


@contextlib.contextmanager
def toy_gateway():
    """A gateway in a process of its own: event loops of one process are not to share gRPC."""
    process = subprocess.Popen(
        [sys.executable, pathlib.Path(__file__).with_name("split_gateway.py")],
        env=batch_runs.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            ports = process.stdout.readline().split()
            yield Gateway(*(f"127.0.0.1:{port}" for port in ports))
        finally:
            process.kill()
