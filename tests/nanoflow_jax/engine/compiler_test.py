import logging
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nanoflow_jax import compat
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
        jobs, threads=threads, progress=lambda done, total: seen.append((done, total))
    )
    assert set(found) == {f"add {i}" for i in range(5)}
    for i in range(5):
        program = found[f"add {i}"]
        assert program.seconds > 0
        np.testing.assert_array_equal(program.call(np.ones(4, np.float32)), np.full(4, 1 + i))
    assert sorted(done.name for done, _ in seen) == sorted(found)
    assert {total for _, total in seen} == {5}


@pytest.fixture
def cache_in():
    """Sets where JAX keeps compiled programs, also those that compile at once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    def use(folder, *, least_s=0.0):
        for name, value in zip(names, (folder, least_s), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    yield lambda folder: use(str(folder))
    use(before[names[0]], least_s=before[names[1]])


def _compile_twice():
    jobs = [
        Job(name=str(i), function=lambda x, i=i: x * 7 - i, arguments=(_vector(5),))
        for i in range(2)
    ]
    found = compiler.compile_all(jobs, threads=2, progress=lambda *_: None)
    for i in range(2):
        np.testing.assert_array_equal(found[str(i)].call(np.ones(5, np.float32)), np.full(5, 7 - i))


def test_f11_damaged_programs_in_the_cache_are_compiled_anew_with_one_warning(
    cache_in, tmp_path, caplog
):
    cache_in(tmp_path)
    _compile_twice()
    assert caplog.text == ""
    entries = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(entries) >= 2
    for path in entries:
        path.write_bytes(b"rubbish")
    _compile_twice()
    (record,) = caplog.records
    assert "2 programs could not be read from the compilation cache in" in record.message
    assert str(tmp_path) in record.message
    assert "Error reading persistent compilation cache entry" in record.message
    assert "delete what is there, or name another folder with --compile_cache_dir" in record.message


def test_f11_a_cache_that_cannot_be_written_is_one_warning(cache_in, caplog):
    cache_in("/proc/self")  # there, and closed even to root
    _compile_twice()
    (record,) = caplog.records
    assert "or written to it" in record.message
    assert "Error writing persistent compilation cache entry" in record.message


def test_other_warnings_of_a_compilation_are_passed_on():
    def warn(x):
        warnings.warn("something else", DeprecationWarning, stacklevel=1)
        return x

    job = Job(name="warn", function=warn, arguments=(_vector(4),))
    with pytest.warns(DeprecationWarning, match="something else"):
        compiler.compile_all([job], threads=1, progress=lambda *_: None)


def test_donated_arguments_are_overwritten_and_others_are_not():
    job = Job(
        name="add", function=lambda x, y: x + y, arguments=(_vector(4), _vector(4)), donated=(0,)
    )
    program = compiler.compile_all([job], threads=1, progress=lambda *_: None)["add"]
    given, kept = jnp.zeros((4,)), jnp.ones((4,))
    program.call(given, kept)
    assert given.is_deleted()
    assert not kept.is_deleted()


def test_a_job_that_cannot_be_compiled_raises_its_error():
    def wrong(x):
        raise ValueError("no such program")

    job = Job(name="wrong", function=wrong, arguments=(_vector(4),))
    with pytest.raises(ValueError, match="no such program"):
        compiler.compile_all([job], threads=1, progress=lambda *_: None)


def test_an_interrupt_begins_no_further_job():
    begun = []

    def program(x, i):
        begun.append(i)
        return x + i

    def interrupt(done, total):
        raise KeyboardInterrupt

    jobs = [
        Job(name=str(i), function=lambda x, i=i: program(x, i), arguments=(_vector(4),))
        for i in range(50)
    ]
    with pytest.raises(KeyboardInterrupt):
        compiler.compile_all(jobs, threads=1, progress=interrupt)
    assert 0 < len(begun) < 50


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


def test_a_watch_that_expects_compilations_counts_none(caplog):
    watch = CompileWatch(expects_some=True)
    with watch.forbid():
        _compile_something()
    watch.close()
    assert watch.num_late == 0
    assert "compiled after warm-up" not in caplog.text


def test_each_job_is_compiled_with_its_own_options():
    good = Job(name="good", function=lambda x: x + 1, arguments=(_vector(4),))
    bad = Job(
        name="bad",
        function=lambda x: x + 2,
        arguments=(_vector(4),),
        options={"no_such_option": True},
    )
    compiler.compile_all([good], threads=1, progress=lambda *_: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compiler.compile_all([good, bad], threads=1, progress=lambda *_: None)


def test_options_that_jax_does_not_take_are_found():
    refused = compiler.refused_options(
        {
            "xla_gpu_no_such_option": True,
            "xla_gpu_command_buffer_scheduling_mode": "SOMEHOW",
            "xla_gpu_graph_min_graph_size": 1,
        }
    )
    assert refused.keys() == {"xla_gpu_no_such_option", "xla_gpu_command_buffer_scheduling_mode"}
    assert "SOMEHOW" in refused["xla_gpu_command_buffer_scheduling_mode"]


def test_without_options_none_is_refused_and_nothing_is_lowered(monkeypatch):
    monkeypatch.setattr(compiler.jax, "jit", None)
    assert compiler.refused_options({}) == {}


def test_this_jax_can_name_a_stream_and_one_that_cannot_says_why(monkeypatch):
    assert compiler.why_no_streams() is None
    monkeypatch.setattr(compat, "start_on_stream", lambda f, reads, stream: (f(*reads), reads))
    assert "leaves no name of a stream" in compiler.why_no_streams()
    monkeypatch.setattr(compat, "start_on_stream", lambda f, reads: None)
    assert "compute_on cannot be used: " in compiler.why_no_streams()
