"""What of a step may run at once on a GPU, from its compiled program: no GPU is needed.

`python -m nanoflow_jax.overlap --model=preset:llama-3-8b --plan=halves [--html=FILE]`

Needs the compiler's wheels: `pip install 'nanoflow_jax[deviceless]' -c constraints/gpu.txt`.
Exit codes: 0 the step runs as its plan wants, 1 it does not or could not be compiled, 2 wrong flags
or files, 130 interrupted.
"""

import pathlib
import sys

from absl import flags as absl_flags

from nanoflow_jax import config, console, flags
from nanoflow_jax.cost import datasheets
from nanoflow_jax.deviceless import compiler, devices
from nanoflow_jax.engine import build, executors, plan_choice
from nanoflow_jax.models import architecture
from nanoflow_jax.nanobatch import operations
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.overlap import analysis, drawing, report, step, timeline
from nanoflow_jax.scheduler.buckets import Bucket

_FLAGS = absl_flags.FLAGS
# As many as the compiler tells of in one graph, and more than a plan has under way at once.
_COMPILED_LAYERS = 3


def _define() -> None:
    flags.define_sections(config.EngineConfig, _FLAGS)
    absl_flags.DEFINE_string("device", "H200", f"One of {', '.join(devices.DEVICES)}.")
    absl_flags.DEFINE_integer("tokens", 2048, "Of the dense batch.", lower_bound=1)
    absl_flags.DEFINE_integer("decode_rows", 256, "Of them.", lower_bound=0)
    absl_flags.DEFINE_integer("prefill_rows", 16, "Chunks of prompts.", lower_bound=0)
    absl_flags.DEFINE_float(
        "decode_context", 1024.0, "Cached tokens of a decode row, for predicted times."
    )
    absl_flags.DEFINE_float(
        "prefix", 512.0, "Cached tokens that a prompt's token sees, for predicted times."
    )
    absl_flags.DEFINE_string("html", None, "Also draw the predicted timeline in this file.")


def _step(section: config.EngineConfig) -> step.Step:
    model = build.open_model(section.model).config
    bucket = Bucket(
        tokens=_FLAGS.tokens, decode_rows=_FLAGS.decode_rows, prefill_rows=_FLAGS.prefill_rows
    )
    device = devices.find_device(_FLAGS.device)
    plans = plan_choice.choose(section.plans, [bucket], model.layer_shape, num_sms=device.num_sms)
    return step.Step(
        model=step.first_layers(model, min(model.num_layers, _COMPILED_LAYERS)),
        bucket=bucket,
        plan=plans[bucket],
        executor=executors.choose(section.plans.executor, plans.values(), on_gpu=True),
        kernels=section.kernels,
        device=_FLAGS.device,
    )


def _prediction(model: architecture.ModelConfig, asked: step.Step) -> timeline.Prediction | str:
    """Predicted times of all layers, or why there are none."""
    sheet = datasheets.datasheet(devices.find_device(asked.device).kind)
    if sheet is None:
        return f"{asked.device} is in no table of datasheets"
    contexts = timeline.Contexts(decode_len=_FLAGS.decode_context, prefix_len=_FLAGS.prefix)
    try:
        return timeline.predict_step(model, asked.plan, asked.bucket, contexts, sheet)
    except ValueError as error:
        return str(error)


def _run(arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}; flags begin with --")
    section = flags.engine_config(_FLAGS)
    model = build.open_model(section.model).config
    asked = _step(section)
    prediction = _prediction(model, asked)
    if _FLAGS.html:
        _draw(asked.plan, model, prediction)
    print(f"compiling {asked.model.num_layers} of {model.num_layers} layers for {asked.device}")
    sys.stdout.flush()
    try:
        program = step.compile_step(asked)
    except (compiler.CompilerMissingError, compiler.CompilerFailedError) as error:
        raise console.RunError(str(error)) from error
    layers = [operations.layer_graph(model.layer_shape)] * asked.model.num_layers
    found = report.check(analysis.Analysis(program, asked.plan, layers), asked)
    print(report.text(found, program, asked, prediction))
    return 0 if all(one.holds for one in found) else console.FAILED


def _draw(
    plan: Plan, model: architecture.ModelConfig, prediction: timeline.Prediction | str
) -> None:
    if isinstance(prediction, str):
        raise ValueError(f"--html: no times can be predicted: {prediction}")
    middle = max(model.num_layers // 2 - 1, 0)
    page = drawing.draw(
        prediction.spans,
        title=f"{plan.name}, {plan.num_tokens} tokens, {_FLAGS.device}: layers {middle} and on",
        first_layer=middle,
        num_layers=3,
    )
    try:
        pathlib.Path(_FLAGS.html).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--html={_FLAGS.html} cannot be written: {error.strerror}") from error


def main(argv: list[str]) -> int:
    """Runs the program; returns its exit code."""
    return console.run(
        lambda: _run(argv[1:]), say=lambda text: print(text, file=sys.stderr), debug=False
    )


if __name__ == "__main__":
    _define()
    console.start(main)
