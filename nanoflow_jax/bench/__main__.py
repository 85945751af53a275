"""Benchmarks of an engine or of a server.

`python -m nanoflow_jax.bench throughput --workload=FILE [--model=DIR ...]`
`python -m nanoflow_jax.bench serving --workload=FILE --url=URL [--concurrency=64 --nostream]`

Exit codes: 0 done, 1 failed while measuring, 2 wrong flags or files, 130 interrupted.
"""

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags as absl_flags

from nanoflow_jax import config, console, flags
from nanoflow_jax.bench import serving, throughput
from nanoflow_jax.engine import build
from nanoflow_jax.workload import file as workload_file

_FLAGS = absl_flags.FLAGS


def _define() -> None:
    flags.define_sections(config.EngineConfig, _FLAGS)
    absl_flags.DEFINE_string("workload", None, "JSON file of request mixes.")
    absl_flags.DEFINE_string("mix", None, "Name of the mix in the file; all of them if empty.")
    absl_flags.DEFINE_integer("repeats", 3, "Runs of each mix.", lower_bound=1)
    absl_flags.DEFINE_string("url", "http://127.0.0.1:8000", "Server to ask, for serving.")
    absl_flags.DEFINE_integer("concurrency", 64, "Clients of the server.", lower_bound=1)
    absl_flags.DEFINE_boolean("stream", True, "Ask the server for tokens as they come.")
    absl_flags.DEFINE_string("api_key", "", "Key of the server.")
    absl_flags.DEFINE_string("json", None, "Also write the results here, one JSON row per run.")


def _mixes() -> dict[str, tuple[workload_file.WorkRequest, ...]]:
    if not _FLAGS.workload:
        raise ValueError("--workload=FILE is missing: a JSON file of request mixes")
    mixes = workload_file.load(pathlib.Path(_FLAGS.workload))
    if _FLAGS.mix and _FLAGS.mix not in mixes:
        raise ValueError(f"--mix={_FLAGS.mix} is not among {', '.join(mixes)}")
    return {_FLAGS.mix: mixes[_FLAGS.mix]} if _FLAGS.mix else mixes


@contextlib.contextmanager
def _rows() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Takes a row for each run, once the file of --json is known to be one that can be written."""
    if not _FLAGS.json:
        yield lambda row: None
        return
    try:
        file = open(_FLAGS.json, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"--json={_FLAGS.json} cannot be written: {error.strerror}") from error
    with file:
        yield lambda row: print(json.dumps(row), file=file)


def _throughput() -> None:
    mixes = _mixes()
    engine_config = flags.engine_config(_FLAGS)
    with _rows() as write:
        start = time.perf_counter()
        engine = build.build_engine(
            engine_config,
            build.open_model(engine_config.model),
            build.Reports(settings=lambda s: print(s, file=sys.stderr)),
        )
        compile_s = sum(engine.compile_seconds.values())
        started_s = time.perf_counter() - start
        print(f"start {started_s:.1f} s, compile {compile_s:.1f} s of processor time")
        for name, mix in mixes.items():
            throughput.run(engine, mix[:2], name="warm-up")
            for repeat in range(_FLAGS.repeats):
                result = throughput.run(engine, mix, name=f"{name}-{repeat}")
                print(f"{name} run {repeat + 1} of {_FLAGS.repeats}\n{throughput.report(result)}")
                write({"mix": name, "output_per_s": result.output_per_s, **vars(result)})
        print(f"peak memory {throughput.peak_memory_bytes() / 2**20:.0f} MiB")


def _serving() -> None:
    target = serving.Target(
        url=_FLAGS.url.rstrip("/"),
        concurrency=_FLAGS.concurrency,
        stream=_FLAGS.stream,
        api_key=_FLAGS.api_key,
    )
    mixes = _mixes()
    with _rows() as write:
        for name, mix in mixes.items():
            _ask(target, mix[:2])
            for repeat in range(_FLAGS.repeats):
                found = _ask(target, mix)
                result = found.result
                print(f"{name} run {repeat + 1} of {_FLAGS.repeats}\n{throughput.report(result)}")
                shown = ", ".join(f"{who} {seconds:.1f} s" for who, seconds in found.cpu_s.items())
                print(f"processor time: {shown or 'the server does not tell'}")
                write(
                    {
                        "mix": name,
                        "stream": target.stream,
                        "concurrency": target.concurrency,
                        "output_per_s": result.output_per_s,
                        "cpu_s": found.cpu_s,
                        **vars(result),
                    }
                )


def _ask(target: serving.Target, mix: Sequence[workload_file.WorkRequest]) -> serving.Serving:
    try:
        return serving.run(target, mix)
    except OSError as error:
        raise console.RunError(
            f"{target.url} did not answer ({error}); start the server, or give its --url"
        ) from error


_BENCHMARKS = {"throughput": _throughput, "serving": _serving}


def _run(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in _BENCHMARKS:
        raise ValueError(f"name one benchmark: {', '.join(_BENCHMARKS)}")
    _BENCHMARKS[arguments[0]]()
    return 0


def main(argv: list[str]) -> int:
    """Runs the benchmark named on the command line; returns the exit code."""
    return console.run(
        lambda: _run(argv[1:]), say=lambda text: print(text, file=sys.stderr), debug=False
    )


if __name__ == "__main__":
    _define()
    console.start(main)
