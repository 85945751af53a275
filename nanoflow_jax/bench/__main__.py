"""Benchmarks of an engine or of a server.

`python -m nanoflow_jax.bench throughput --workload=FILE [--result_name=NAME --model=DIR ...]`
`python -m nanoflow_jax.bench invariance --workload=FILE [--result_name=NAME --model=DIR ...]`
`python -m nanoflow_jax.bench serving --workload=FILE --url=URL [--concurrency=64 --nostream]`
`python -m nanoflow_jax.bench overhead --workload=FILE --url=URL [--model=DIR ...]`
`python -m nanoflow_jax.bench soak --workload=FILE --url=URL --concurrency=200 [--model=DIR ...]`
`python -m nanoflow_jax.bench gpu_check [--repeats=3 --seed=N]`
`python -m nanoflow_jax.bench kernels [--device_check --shapes=llama-3-8b --kernels=gemm,fused]`
`python -m nanoflow_jax.bench ablation [--model=preset:llama-3-8b --random_weights]`
`python -m nanoflow_jax.bench split [--result_name=split --plot=FILE.png]`

overhead and soak run the workload offline too, so they take the knobs that the server was started
with. gpu_check and kernels need a GPU, or jax 0.11 to interpret Mosaic kernels.
Exit codes: 0 done, 1 failed while measuring or found a fault, 2 wrong flags or files, 130
interrupted.
"""

import contextlib
import functools
import json
import pathlib
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from absl import flags as absl_flags

from nanoflow_jax import config, console, flags, llm, start_up
from nanoflow_jax.bench import (
    ablation_command,
    ceilings,
    clock,
    gpu_check,
    http_client,
    invariance,
    kernel_command,
    measured,
    overhead,
    serving,
    soak,
    split_command,
    throughput,
    throughput_result,
)
from nanoflow_jax.engine import build, interface, model_source
from nanoflow_jax.results import provenance
from nanoflow_jax.results.kind import Tokens
from nanoflow_jax.results.writer import ResultWriter
from nanoflow_jax.workload import file as workload_file

_FLAGS = absl_flags.FLAGS


def _define() -> None:
    flags.define_sections(config.EngineConfig, _FLAGS)
    absl_flags.DEFINE_string("workload", None, "JSON file of request mixes.")
    absl_flags.DEFINE_string("mix", None, "Name of the mix in the file; all of them if empty.")
    absl_flags.DEFINE_integer("repeats", 3, "Runs of each mix.", lower_bound=1)
    absl_flags.DEFINE_integer(
        "pairs", 25, "How often overhead asks for a first token on each side.", lower_bound=1
    )
    absl_flags.DEFINE_float("seconds", 60.0, "How long soak begins new requests.", lower_bound=0.0)
    absl_flags.DEFINE_integer(
        "seed",
        0,
        "Of what soak's clients do, and of gpu_check's operands: there a new one if unset.",
    )
    absl_flags.DEFINE_string("url", "http://127.0.0.1:8000", "Server to ask.")
    absl_flags.DEFINE_integer("concurrency", 64, "Clients of the server.", lower_bound=1)
    absl_flags.DEFINE_boolean("stream", True, "Ask the server for tokens as they come.")
    absl_flags.DEFINE_string("api_key", "", "Key of the server.")
    absl_flags.DEFINE_string(
        "result_name", None, "Also write a result folder of this name; throughput and invariance."
    )
    absl_flags.DEFINE_string("results", provenance.RESULTS, "Folder of all results.")
    absl_flags.DEFINE_float(
        "budget_seconds",
        480.0,
        "After which kernels begins no problem and ablation no workload; those that tell most come "
        "first.",
        lower_bound=0.0,
    )
    absl_flags.DEFINE_string("json", None, "Also write the results here, one JSON row per run.")
    kernel_command.define(_FLAGS)
    ablation_command.define(_FLAGS)
    split_command.define(_FLAGS)


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


@contextlib.contextmanager
def _result(
    model: model_source.ModelSource, mixes: Iterable[str], **more: Any
) -> Iterator[ResultWriter | None]:
    """The result folder of --result_name, None without one; `more` is what `Asked` takes."""
    if not _FLAGS.result_name:
        yield None
        return
    asked = throughput_result.Asked(
        name=_FLAGS.result_name,
        workload=pathlib.Path(_FLAGS.workload),
        mixes=tuple(mixes),
        repeats=_FLAGS.repeats,
        engine=flags.engine_config(_FLAGS),
        command=("python", "-m", "nanoflow_jax.bench", *sys.argv[1:]),
        **more,
    )
    planned = throughput_result.planned(asked, model)
    with ResultWriter(pathlib.Path(_FLAGS.results), planned) as result:
        if not result.origin.is_clean:
            print(
                "note: this is no clean checkout of a commit: `python -m nanoflow_jax.evidence "
                "verify` will refuse the result",
                file=sys.stderr,
            )
        yield result


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _throughput() -> int:
    mixes = _mixes()
    engine_config = flags.engine_config(_FLAGS)
    model = model_source.open_model(engine_config.model)
    with _rows() as write, _result(model, mixes) as result:
        say = _saying(result)

        def chosen(settings: build.Settings) -> None:
            if result is not None:
                planned = throughput_result.plan(settings)
                result.set_plan(planned, kernels=throughput_result.kernels(settings))

        _measure_ceilings(result, "before")
        start = time.perf_counter()
        reports = start_up.reports(_tell, also_settings=chosen)
        engine = build.build_engine(engine_config, model, reports)
        compile_s = sum(engine.compile_seconds.values())
        started_s = time.perf_counter() - start
        say(f"start {started_s:.1f} s, compile {compile_s:.1f} s, all programs added up")
        for name, mix in mixes.items():
            throughput.run(engine, mix[:2], name="warm-up")
            for repeat in range(_FLAGS.repeats):
                run = throughput.run(engine, mix, name=f"{name}-{repeat}")
                say(f"{name} run {repeat + 1} of {_FLAGS.repeats}\n{throughput.report(run)}")
                write({"mix": name, **throughput.row(run)})
                if result is not None:
                    result.add_sample(throughput_result.sample(name, repeat, mix, run))
        say(f"peak memory {throughput.peak_memory_bytes() / 2**20:.0f} MiB")
        engine.close()  # ceilings need its memory
        _measure_ceilings(result, "after")
        return 0 if result is None else _finish(result)


def _saying(result: ResultWriter | None) -> Callable[[str], None]:
    """Shows a line, which a result keeps too."""

    def say(text: str) -> None:
        print(text, flush=True)
        if result is not None:
            result.add_log(text)

    return say


def _measure_ceilings(result: ResultWriter | None, when: str) -> None:
    if result is not None and measured.is_on_gpu():
        result.set_ceilings(**{when: ceilings.measure(clock.Clock())})


def _invariance() -> int:
    mixes = _mixes()
    engine_config = flags.engine_config(_FLAGS)
    model = model_source.open_model(engine_config.model)
    configs = invariance.configs(engine_config)
    asked = {"kind": "invariance", "num_modes": len(configs)}
    with _rows() as write, _result(model, mixes, **asked) as result:
        say = _saying(result)
        _measure_ceilings(result, "before")
        engines: dict[str, interface.TokenEngine] = {}
        plans: dict[str, build.Settings] = {}
        for mode, one in configs.items():
            chosen = functools.partial(plans.__setitem__, mode)
            reports = start_up.reports(_tell, also_settings=chosen)
            engines[mode] = build.build_engine(one, model, reports)
        if result is not None:
            kernels = [
                name for found in plans.values() for name in throughput_result.kernels(found)
            ]
            planned = {mode: throughput_result.plan(found) for mode, found in plans.items()}
            result.set_plan(planned, kernels=kernels)
        hashes = {}
        for name, mix in mixes.items():
            runs = []
            for run in invariance.rounds(engines, mix, name=name, count=_FLAGS.repeats):
                runs.append(run)
                write({"mix": name, "mode": run.mode, **throughput.row(run.result)})
                if result is not None:
                    sample = throughput_result.sample(name, run.round, mix, run.result)
                    result.add_sample({**sample, "mode": run.mode})
            hashes[name] = invariance.hashes(engines[invariance.INVARIANT], mix)
            say(f"{name}\n{invariance.report(runs)}")
        for engine in engines.values():
            engine.close()
        _measure_ceilings(result, "after")
        for name in invariance.differing(hashes):
            _tell(f"error: {name}: requests gave other bits alone than among the others")
        if result is not None:
            result.set_tokens(Tokens(hashes=hashes))
            return _finish(result)
        return console.FAILED if invariance.differing(hashes) else 0


def _finish(result: ResultWriter) -> int:
    """Ends a result folder and says what it comes to; the exit code."""
    found = result.finish()
    for figure in found.figures:
        digits = 3 if figure.unit == "x" else 1
        print(
            f"{figure.name}: median {figure.median:.{digits}f} {figure.unit}, "
            f"{figure.low:.{digits}f} to "
            f"{figure.high:.{digits}f} in {figure.count} runs"
        )
    print(f"result: {result.path}")
    if found.message:
        print(f"error: nothing may be claimed of it: {found.message}", file=sys.stderr)
    return console.FAILED if found.message else 0


@contextlib.contextmanager
def _server() -> Iterator[http_client.Server]:
    """The server of --url; says what to do if it cannot be reached."""
    server = http_client.Server(url=_FLAGS.url.rstrip("/"), api_key=_FLAGS.api_key)
    try:
        yield server
    except OSError as error:
        raise console.RunError(
            f"{server.url} did not answer ({error}); start the server, or give its --url"
        ) from error


def _serving() -> int:
    mixes = _mixes()
    with _rows() as write, _server() as server:
        target = serving.Target(server=server, concurrency=_FLAGS.concurrency, stream=_FLAGS.stream)
        for name, mix in mixes.items():
            serving.run(target, mix[:2])
            for repeat in range(_FLAGS.repeats):
                found = serving.run(target, mix)
                result = found.result
                print(f"{name} run {repeat + 1} of {_FLAGS.repeats}\n{throughput.report(result)}")
                print(f"processor time: {serving.cpu_text(found.cpu_s)}")
                row = {"stream": target.stream, "concurrency": target.concurrency}
                write({"mix": name, **row, "cpu_s": found.cpu_s, **throughput.row(result)})
    return 0


def _offline() -> llm.LLM:
    with _server() as server:
        server.stats()  # better missed now than after loading
    reports = start_up.reports(_tell)
    return llm.LLM.from_config(flags.engine_config(_FLAGS), reports)


def _overhead() -> int:
    mixes = _mixes()
    with _rows() as write, _offline() as model, _server() as server:
        for name, mix in mixes.items():
            for row in _overhead_of(model, server, name, mix):
                write({"mix": name, **row})
    return 0


def _overhead_of(
    model: llm.LLM, server: http_client.Server, name: str, mix: overhead.Mix
) -> Iterator[dict[str, Any]]:
    if len(mix) > 1:
        rounds = overhead.rounds(
            model, server, mix, concurrency=_FLAGS.concurrency, count=_FLAGS.repeats
        )
        print(f"{name}\n{overhead.report_rounds(rounds)}")
        for done in rounds:
            for way, run in done.items():
                yield {"way": way, "cpu_s": run.cpu_s, **throughput.row(run.result)}
    pairs = overhead.first_tokens(model, server, mix[0], pairs=_FLAGS.pairs)
    print(f"{name}\n{overhead.report_first_tokens(pairs)}")
    yield from map(vars, pairs)


def _soak() -> int:
    mix = [work for mix in _mixes().values() for work in mix]
    with _rows() as write:
        with _offline() as model:
            expected = soak.expect(model, mix)
        with _server() as server:
            found = soak.run(
                server,
                expected,
                concurrency=_FLAGS.concurrency,
                seconds=_FLAGS.seconds,
                seed=_FLAGS.seed,
            )
        write(vars(found))
    print(soak.report(found))
    for complaint in found.complaints:
        print(f"error: {complaint}", file=sys.stderr)
    return console.FAILED if found.complaints else 0


def _gpu_check() -> int:
    seed = _FLAGS.seed if _FLAGS["seed"].present else secrets.randbelow(2**31)
    device = jax.devices()[0]
    print(f"device: {device.device_kind}; jax {jax.__version__}; --seed={seed}")
    failed = unchecked = 0
    with _rows() as write:
        for found in gpu_check.run(seed=seed, repeats=_FLAGS.repeats):
            verdict = {True: "ok", False: "FAILED", None: "not checked"}[found.ok]
            print(
                f"{verdict}: {found.name}; {found.check}: {found.detail} ({found.seconds:.1f} s)",
                flush=True,
            )
            write({"device": device.device_kind, "seed": seed, **vars(found)})
            failed += found.ok is False
            unchecked += found.ok is None
    print(f"{failed or 'no'} checks failed, {unchecked} could not be made here")
    return console.FAILED if failed else 0


def _measured(program: Any) -> int:
    """Runs a benchmark that has a module of its own for its flags and answers."""

    def say(line: str) -> None:
        print(line, flush=True)

    command = ("python", "-m", "nanoflow_jax.bench", *sys.argv[1:])
    return program.run(_FLAGS, say=say, stream=sys.stderr, command=command)


_BENCHMARKS = {
    "throughput": _throughput,
    "invariance": _invariance,
    "serving": _serving,
    "overhead": _overhead,
    "soak": _soak,
    "gpu_check": _gpu_check,
    "kernels": lambda: _measured(kernel_command),
    "ablation": lambda: _measured(ablation_command),
    "split": lambda: _measured(split_command),
}


def _run(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in _BENCHMARKS:
        raise ValueError(f"name one benchmark: {', '.join(_BENCHMARKS)}")
    return _BENCHMARKS[arguments[0]]()


def main(argv: list[str]) -> int:
    """Runs the benchmark named on the command line; returns the exit code."""
    return console.run(
        lambda: _run(argv[1:]), say=lambda text: print(text, file=sys.stderr), debug=False
    )


if __name__ == "__main__":
    _define()
    console.start(main)
