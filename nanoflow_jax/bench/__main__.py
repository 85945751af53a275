"""`python -m nanoflow_jax.bench throughput --workload=FILE [--model=DIR ...]`."""

import json
import pathlib
import sys
import time

from absl import app
from absl import flags as absl_flags

from nanoflow_jax import config, flags
from nanoflow_jax.bench import throughput
from nanoflow_jax.engine import build
from nanoflow_jax.workload import file as workload_file

_FLAGS = absl_flags.FLAGS


def _define() -> None:
    flags.define_sections(config.EngineConfig, _FLAGS)
    absl_flags.DEFINE_string("workload", None, "JSON file of request mixes.")
    absl_flags.DEFINE_string("mix", None, "Name of the mix in the file; all of them if empty.")
    absl_flags.DEFINE_integer("repeats", 3, "Runs of each mix.", lower_bound=1)
    absl_flags.DEFINE_string("json", None, "Also write the results here, one JSON row per run.")


def _throughput() -> None:
    if not _FLAGS.workload:
        raise ValueError("--workload=FILE is missing: a JSON file of request mixes")
    mixes = workload_file.load(pathlib.Path(_FLAGS.workload))
    if _FLAGS.mix and _FLAGS.mix not in mixes:
        raise ValueError(f"--mix={_FLAGS.mix} is not among {', '.join(mixes)}")
    names = [_FLAGS.mix] if _FLAGS.mix else list(mixes)
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
    for name in names:
        throughput.run(engine, mixes[name][:2], name="warm-up")
        for repeat in range(_FLAGS.repeats):
            result = throughput.run(engine, mixes[name], name=f"{name}-{repeat}")
            print(f"{name} run {repeat + 1} of {_FLAGS.repeats}\n{throughput.report(result)}")
            rows.append({"mix": name, "output_per_s": result.output_per_s, **vars(result)})
    print(f"peak memory {throughput.peak_memory_bytes() / 2**20:.0f} MiB")
    if _FLAGS.json:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        pathlib.Path(_FLAGS.json).write_text(text, encoding="utf-8")


_BENCHMARKS = {"throughput": _throughput}


def main(argv: list[str]) -> int:
    """Runs the benchmark named on the command line."""
    if len(argv) != 2 or argv[1] not in _BENCHMARKS:
        print(f"error: name one benchmark: {', '.join(_BENCHMARKS)}", file=sys.stderr)
        return 2
    try:
        _BENCHMARKS[argv[1]]()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    _define()
    app.run(main)
