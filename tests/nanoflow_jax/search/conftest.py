import pytest
from absl import flags as absl_flags

from nanoflow_jax.search import __main__ as program


@pytest.fixture
def ask(monkeypatch, capsys):
    """Runs the program; gives its exit code, what it printed, and what it complained of."""

    def run(*arguments):
        values = absl_flags.FlagValues()
        program.define(values)
        monkeypatch.setattr(program, "_FLAGS", values)
        code = program.main(list(values(["search", *arguments])))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run
