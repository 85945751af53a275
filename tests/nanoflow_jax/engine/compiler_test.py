import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflow_jax.engine import compiler
from nanoflow_jax.engine.compiler import CompileWatch, Job


@pytest.fixture
def watch():
    made = CompileWatch()
    yield made
    made.close()


def _compile_something():
    """A new function each time, which no cache in this process knows."""
    jax.jit(lambda x: x * 3 + 1)(np.zeros(3, np.float32))


def _vector(size):
    return jax.ShapeDtypeStruct((size,), jnp.float32)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_job_is_compiled_and_reported_once(threads):
    jobs = [
        Job(name=f"add {i}", function=lambda x, i=i: x + i, arguments=(_vector(4),))
        for i in range(5)
    ]
    seen = []
    found = compiler.compile_all(
        jobs, threads=threads, options={}, progress=lambda done, total: seen.append((done, total))
    )
    assert set(found) == {f"add {i}" for i in range(5)}
    for i in range(5):
        program = found[f"add {i}"]
        assert program.seconds > 0
        np.testing.assert_array_equal(program.call(np.ones(4, np.float32)), np.full(4, 1 + i))
    assert sorted(done.name for done, _ in seen) == sorted(found)
    assert {total for _, total in seen} == {5}


def test_donated_arguments_are_overwritten_and_others_are_not():
    job = Job(
        name="add", function=lambda x, y: x + y, arguments=(_vector(4), _vector(4)), donated=(0,)
    )
    program = compiler.compile_all([job], threads=1, options={}, progress=lambda *_: None)["add"]
    given, kept = jnp.zeros((4,)), jnp.ones((4,))
    program.call(given, kept)
    assert given.is_deleted()
    assert not kept.is_deleted()


def test_a_job_that_cannot_be_compiled_raises_its_error():
    def wrong(x):
        raise ValueError("no such program")

    job = Job(name="wrong", function=wrong, arguments=(_vector(4),))
    with pytest.raises(ValueError, match="no such program"):
        compiler.compile_all([job], threads=1, options={}, progress=lambda *_: None)


def test_a_compilation_inside_a_step_is_counted_and_logged(watch, caplog):
    with caplog.at_level(logging.ERROR), watch.forbid():
        _compile_something()
    assert watch.num_late == 1
    assert "a program was compiled after warm-up" in caplog.text
    assert "a shape is missing from the list of buckets" in caplog.text


def test_running_a_compiled_program_inside_a_step_is_not_counted(watch):
    jitted = jax.jit(lambda x: x * 3 + 1)
    jitted(jnp.zeros((3,)))
    with watch.forbid():
        jitted(jnp.zeros((3,)))
    assert watch.num_late == 0


def test_compilations_between_steps_are_not_counted(watch):
    _compile_something()
    with watch.forbid():
        pass
    _compile_something()
    assert watch.num_late == 0


def test_compilations_of_another_thread_are_not_counted(watch):
    other = threading.Thread(target=_compile_something)
    with watch.forbid():
        other.start()
        other.join()
    assert watch.num_late == 0


def test_a_step_that_fails_ends_the_watch(watch):
    with pytest.raises(RuntimeError, match="step"), watch.forbid():
        raise RuntimeError("step")
    _compile_something()
    assert watch.num_late == 0


def test_a_closed_watch_counts_nothing():
    watch = CompileWatch()
    watch.close()
    with watch.forbid():
        _compile_something()
    assert watch.num_late == 0


def test_a_watch_may_be_closed_twice_and_others_go_on(watch):
    closed = CompileWatch()
    closed.close()
    closed.close()
    with watch.forbid():
        _compile_something()
    assert watch.num_late == 1
