"""Compiles a list of programs at once, in parallel, and watches that nothing compiles later."""

import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nanoflow_jax import compat

_LOG = logging.getLogger(__name__)
_CACHE_TROUBLE = "persistent compilation cache entry"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One program to compile.

    Attributes:
        name: Shown in the list of programs.
        function: What to compile.
        arguments: Abstract arrays, with shardings where they matter.
        donated: Positions of arguments that the program may overwrite.
        options: XLA compiler options.
    """

    name: str
    function: Callable[..., Any]
    arguments: Sequence[Any]
    donated: tuple[int, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program and how long it took to make."""

    name: str
    call: Callable[..., Any]
    seconds: float


def compile_one(job: Job) -> Compiled:
    """Compiles a job, most of it outside Python's lock."""
    start = time.monotonic()
    jitted = jax.jit(job.function, donate_argnums=job.donated, keep_unused=True)
    call = jitted.lower(*job.arguments).compile(compiler_options=dict(job.options) or None)
    return Compiled(name=job.name, call=call, seconds=time.monotonic() - start)


def compile_all(
    jobs: Sequence[Job],
    *,
    threads: int,
    progress: Callable[[Compiled, int], None],
) -> dict[str, Compiled]:
    """Compiles every job, several at once.

    Args:
        jobs: What to compile; names are unique.
        threads: Jobs at once; 0 is one per core, at most 8.
        progress: Called as each one is ready, with the number of jobs.
    """
    count = threads or min(8, os.cpu_count() or 1)

    done = {}
    with _cache_trouble_told_once(), concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(compile_one, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                compiled = future.result()
                done[compiled.name] = compiled
                progress(compiled, len(jobs))
        except BaseException:  # Ctrl-C too: what has not begun would only delay the end.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


def refused_options(options: Mapping[str, Any]) -> dict[str, str]:
    """Which compiler options the installed jax does not take, and what it says of each.

    Names and values of XLA's options change from release to release; all of them are known on any
    device.

    Args:
        options: By name, as in `Job`.
    """
    if not options:
        return {}
    nothing = jax.jit(lambda: 0).lower()
    refused = {}
    for name, value in options.items():
        try:
            nothing.compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError as error:
            if "INVALID_ARGUMENT" not in str(error):
                raise
            refused[name] = str(error)
    return refused


def why_no_streams() -> str | None:
    """Why the installed jax cannot start operations on streams of their own; None if it can."""

    def run(x: jax.Array) -> Any:
        return compat.start_on_stream(lambda x: x + x, [x], stream=0)[0]

    try:
        text = jax.jit(run).lower(jax.ShapeDtypeStruct((8,), np.float32)).as_text()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return f"jax.experimental.compute_on cannot be used: {error}"
    if "_xla_stream_annotation" not in text:
        return "jax.experimental.compute_on leaves no name of a stream in a program"
    return None


@contextlib.contextmanager
def _cache_trouble_told_once() -> Iterator[None]:
    """Says once, and what to do, what JAX says of each program that its cache cannot give or take.

    JAX compiles such a program, and never writes over what it could not read.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=f".*{_CACHE_TROUBLE}")
        yield
    trouble = [w for w in caught if _CACHE_TROUBLE in str(w.message)]
    if trouble:
        _LOG.warning(
            "%d programs could not be read from the compilation cache in %s or written to it, and "
            "were compiled anew (%s); delete what is there, or name another folder with "
            "--compile_cache_dir",
            len(trouble),
            jax.config.jax_compilation_cache_dir,  # type: ignore[attr-defined]
            trouble[0].message,
        )
    for other in (w for w in caught if w not in trouble):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


class CompileWatch:
    """Counts compilations inside steps and logs an error for each one.

    Only compilations by the thread that is inside `forbid` count: another engine in the process
    may be warming up.

    Invariant: `num_late` counts the compilations seen so far.

    Args:
        expects_some: Whether steps compile rightly: interpreted kernels do.
    """

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self, *, expects_some: bool = False) -> None:
        self._expects_some = expects_some
        self._thread: int | None = None
        self.num_late = 0
        self._listens = True
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @contextlib.contextmanager
    def forbid(self) -> Iterator[None]:
        """Inside, a compilation is an error."""
        self._thread = None if self._expects_some else threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def close(self) -> None:
        """Stops listening; a second call changes nothing."""
        if self._listens:
            jax.monitoring.unregister_event_duration_listener(self._on_event)
        self._listens = False

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event != self._EVENT or threading.get_ident() != self._thread:
            return
        self.num_late += 1
        _LOG.error(
            "a program was compiled after warm-up (%.2f s): a shape is missing from the list "
            "of buckets; please report this",
            duration_secs,
        )
