"""What of a step may run at once on a GPU, from its compiled program: no GPU is needed.

`python -m nanoflow_jax.overlap --model=llama-3-8b --plan=halves [--device=h200]
[--tensor_parallel=8] [--tokens=2048] [--prompt_len=512] [--output_len=512] [--html=FILE]`

The batch is what requests of one kind make in the long run; the defaults are those of the paper's
512/512 at its dense batch of 2048 tokens (arXiv 2408.12757, figures 7 and 9).
Needs the compiler's wheels: `pip install 'nanoflow_jax[deviceless]' -c constraints/gpu.txt`.
Exit codes: 0 the step runs as its plan wants, 1 it does not or could not be compiled, 2 wrong flags
or files, 130 interrupted.
"""

import dataclasses
import pathlib
import sys

from absl import flags as absl_flags

from nanoflow_jax import config, console, flags
from nanoflow_jax.cost import datasheets, steady_state, timeline
from nanoflow_jax.deviceless import compiler, devices
from nanoflow_jax.engine import executors, model_source
from nanoflow_jax.models import architecture, presets
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.overlap import (
    analysis,
    asked_plan,
    report,
    step,
    workload,
)
from nanoflow_jax.results import gantt, svg
from nanoflow_jax.scheduler.buckets import Bucket

_FLAGS = absl_flags.FLAGS
# As many as the compiler tells of in one graph, and more than a plan has under way at once.
_COMPILED_LAYERS = 3


def _define() -> None:
    flags.define_sections(config.EngineConfig, _FLAGS)
    absl_flags.DEFINE_string("device", "H200", f"One of {', '.join(devices.DEVICES)}.")
    absl_flags.DEFINE_integer("tokens", 2048, "Of the dense batch.", lower_bound=1)
    absl_flags.DEFINE_integer("prompt_len", 512, "Tokens of a request's prompt.", lower_bound=1)
    absl_flags.DEFINE_integer("output_len", 512, "Tokens that follow it.", lower_bound=0)
    absl_flags.DEFINE_integer(
        "decode_rows",
        None,
        "Requests with one token to do; as many as such requests make in the long run if not set.",
        lower_bound=0,
    )
    absl_flags.DEFINE_string("html", None, "Also draw the predicted timeline in this file.")


def _model(section: config.ModelSection) -> architecture.ModelConfig:
    """The shape of a folder or a preset: weights are not looked at."""
    preset = presets.try_find(section.model)
    is_folder = pathlib.Path(section.model).is_dir()
    name = section.model if preset is None or is_folder else presets.PREFIX + preset
    return model_source.open_model(
        dataclasses.replace(section, model=name, random_weights=True)
    ).config


def _workload() -> workload.Workload:
    return workload.Workload(
        mix=steady_state.Mix(prompt_len=_FLAGS.prompt_len, output_len=_FLAGS.output_len),
        num_tokens=_FLAGS.tokens,
        decode_rows=_FLAGS.decode_rows,
    )


def _step(
    section: config.EngineConfig, model: architecture.ModelConfig, bucket: Bucket
) -> step.Step:
    device, num_devices = devices.find_device(_FLAGS.device), section.parallel.tensor_parallel
    shape = dataclasses.replace(model.layer_shape, num_devices=num_devices)
    plan = asked_plan.find(section.plans, bucket, shape, num_sms=device.num_sms)
    return step.Step(
        model=step.first_layers(model, min(model.num_layers, _COMPILED_LAYERS)),
        bucket=bucket,
        plan=plan,
        executor=executors.choose(section.plans.executor, [plan], on_gpu=True),
        kernels=section.kernels,
        device=_FLAGS.device,
        num_devices=num_devices,
        split_experts=section.parallel.expert_parallel,
    )


def _prediction(
    model: architecture.ModelConfig, asked: step.Step, contexts: timeline.Contexts
) -> timeline.Prediction | str:
    """Predicted times of all layers, or why there are none."""
    sheet = datasheets.datasheet(devices.find_device(asked.device).kind)
    if sheet is None:
        return f"{asked.device} is in no table of datasheets"
    try:
        return timeline.predict_step(model, asked.plan, asked.bucket, contexts, sheet)
    except ValueError as error:
        return str(error)


def _run(arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}; flags begin with --")
    section = flags.engine_config(_FLAGS)
    model = _model(section.model)
    work = _workload()
    asked = _step(section, model, work.bucket)
    prediction = _prediction(model, asked, work.contexts)
    if _FLAGS.html:
        _draw(asked.plan, model, prediction)
    device = devices.find_device(asked.device)
    print(work.describe(model, device, num_devices=asked.num_devices))
    several = "" if asked.num_devices == 1 else f"{asked.num_devices} x "
    layers = f"{asked.model.num_layers} of {model.num_layers} layers"
    print(f"compiling {layers} for {several}{asked.device}")
    sys.stdout.flush()
    try:
        program = step.compile_step(asked)
    except (compiler.CompilerMissingError, compiler.CompilerFailedError) as error:
        raise console.RunError(str(error)) from error
    found = report.check(analysis.of_step(program, asked), asked, prediction)
    print(report.text(found, program, asked, prediction))
    return 0 if all(one.holds for one in found) else console.FAILED


def _draw(
    plan: Plan, model: architecture.ModelConfig, prediction: timeline.Prediction | str
) -> None:
    if isinstance(prediction, str):
        raise ValueError(f"--html: no times can be predicted: {prediction}")
    middle = max(model.num_layers // 2 - 1, 0)
    title = f"{plan.name}, {plan.num_tokens} tokens, {_FLAGS.device}: layers {middle} and on"
    picture = gantt.draw(
        prediction.spans, title=title, first_layer=middle, num_layers=3, num_sms=plan.num_sms
    )
    page = svg.document(picture, title=title)
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
