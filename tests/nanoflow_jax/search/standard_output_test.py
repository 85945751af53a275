import ctypes

import pytest
from scipy import optimize

from nanoflow_jax.search import periodic, standard_output

_C_LIBRARY = ctypes.CDLL(None)


def test_a_line_that_c_code_prints_is_left_out_and_others_are_kept_in_order(capfd):
    with standard_output.without("noise"):
        for line in (b"first", b"noise", b"noise and more", b"last"):
            _C_LIBRARY.puts(line)
    _C_LIBRARY.puts(b"noise")
    _C_LIBRARY.fflush(None)
    assert capfd.readouterr().out == "first\nnoise and more\nlast\nnoise\n"


def test_what_was_printed_before_an_error_is_kept(capfd):
    def fail():
        _C_LIBRARY.puts(b"why")
        raise RuntimeError

    with pytest.raises(RuntimeError), standard_output.without("noise"):
        fail()
    assert capfd.readouterr().out == "why\n"


def test_the_solver_prints_nothing_of_its_own_but_what_may_be_wrong(capfd, monkeypatch):
    solve = optimize.milp

    def talk(*args, **kwargs):
        _C_LIBRARY.puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
        _C_LIBRARY.puts(b"WARNING: something is wrong")
        return solve(*args, **kwargs)

    monkeypatch.setattr(optimize, "milp", talk)
    tasks = [periodic.Task(name="one", seconds=1.0, lane="a")]
    periodic.best_schedule(tasks, [periodic.Wait(first="one", second="one", distance=1)])
    assert capfd.readouterr().out == "WARNING: something is wrong\n"
