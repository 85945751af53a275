"""Benchmarks of an engine or of a server.

`python -m nanoflow_jax.bench throughput --workload=FILE [--model=DIR ...]`
`python -m nanoflow_jax.bench serving --workload=FILE --url=URL [--concurrency=64 --nostream]`
`python -m nanoflow_jax.bench overhead --workload=FILE --url=URL [--model=DIR ...]`
`python -m nanoflow_jax.bench soak --workload=FILE --url=URL --concurrency=200 [--model=DIR ...]`

The last two also run the workload offline, so they take the knobs that the server was started with.
"""

import json
import pathlib
import sys
import time
from typing import Any

from absl import app
from absl import flags as absl_flags

from nanoflow_jax import config, flags, llm, start_up
from nanoflow_jax.bench import http_client, overhead, serving, soak, throughput
from nanoflow_jax.engine import build
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
    absl_flags.DEFINE_integer("seed", 0, "Of what soak's clients do.")
    absl_flags.DEFINE_string("url", "http://127.0.0.1:8000", "Server to ask.")
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


def _write(rows: list[dict[str, Any]]) -> None:
    if _FLAGS.json:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        pathlib.Path(_FLAGS.json).write_text(text, encoding="utf-8")


def _throughput() -> int:
    mixes = _mixes()
    engine_config = flags.engine_config(_FLAGS)
    start = time.perf_counter()
    engine = build.build_engine(
        engine_config,
        build.open_model(engine_config.model),
        build.Reports(settings=lambda s: print(s, file=sys.stderr)),
    )
    compile_s = sum(engine.compile_seconds.values())
    print(f"start {time.perf_counter() - start:.1f} s, compile {compile_s:.1f} s of processor time")
    rows = []
    for name, mix in mixes.items():
        throughput.run(engine, mix[:2], name="warm-up")
        for repeat in range(_FLAGS.repeats):
            result = throughput.run(engine, mix, name=f"{name}-{repeat}")
            print(f"{name} run {repeat + 1} of {_FLAGS.repeats}\n{throughput.report(result)}")
            rows.append({"mix": name, "output_per_s": result.output_per_s, **vars(result)})
    print(f"peak memory {throughput.peak_memory_bytes() / 2**20:.0f} MiB")
    _write(rows)
    return 0


def _server() -> http_client.Server:
    return http_client.Server(url=_FLAGS.url.rstrip("/"), api_key=_FLAGS.api_key)


def _serving() -> int:
    target = serving.Target(server=_server(), concurrency=_FLAGS.concurrency, stream=_FLAGS.stream)
    rows = []
    for name, mix in _mixes().items():
        serving.run(target, mix[:2])
        for repeat in range(_FLAGS.repeats):
            found = serving.run(target, mix)
            result = found.result
            print(f"{name} run {repeat + 1} of {_FLAGS.repeats}\n{throughput.report(result)}")
            shown = ", ".join(f"{who} {seconds:.1f} s" for who, seconds in found.cpu_s.items())
            print(f"processor time: {shown or 'the server does not tell'}")
            rows.append(
                {
                    "mix": name,
                    "stream": target.stream,
                    "concurrency": target.concurrency,
                    "output_per_s": result.output_per_s,
                    "cpu_s": found.cpu_s,
                    **vars(result),
                }
            )
    _write(rows)
    return 0


def _offline() -> llm.LLM:
    reports = start_up.reports(lambda text: print(text, file=sys.stderr))
    return llm.LLM.from_config(flags.engine_config(_FLAGS), reports)


def _overhead() -> int:
    server = _server()
    with _offline() as model:
        for name, mix in _mixes().items():
            if len(mix) > 1:
                found = overhead.rounds(
                    model, server, mix, concurrency=_FLAGS.concurrency, count=_FLAGS.repeats
                )
                print(f"{name}\n{overhead.report_rounds(found)}")
            first = overhead.first_tokens(model, server, mix[0], pairs=_FLAGS.pairs)
            print(f"{name}\n{overhead.report_first_tokens(first)}")
    return 0


def _soak() -> int:
    mix = [work for mix in _mixes().values() for work in mix]
    with _offline() as model:
        expected = soak.expect(model, mix)
    found = soak.run(
        _server(),
        expected,
        concurrency=_FLAGS.concurrency,
        seconds=_FLAGS.seconds,
        seed=_FLAGS.seed,
    )
    print(soak.report(found))
    _write([vars(found)])
    for complaint in found.complaints:
        print(f"error: {complaint}", file=sys.stderr)
    return 1 if found.complaints else 0


_BENCHMARKS = {
    "throughput": _throughput,
    "serving": _serving,
    "overhead": _overhead,
    "soak": _soak,
}


def main(argv: list[str]) -> int:
    """Runs the benchmark named on the command line."""
    if len(argv) != 2 or argv[1] not in _BENCHMARKS:
        print(f"error: name one benchmark: {', '.join(_BENCHMARKS)}", file=sys.stderr)
        return 2
    try:
        return _BENCHMARKS[argv[1]]()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    _define()
    app.run(main)
