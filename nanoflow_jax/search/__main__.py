"""What bounds a model on devices, and its best plan, before anything runs; simulated serving.

`python -m nanoflow_jax.search cost --model=llama-2-70b --device=a100-80g --devices=8
    --input_len=512 --output_len=512 [--plot=FILE.svg]`
`python -m nanoflow_jax.search plan --model=llama-3-8b --device=h200 --input_len=512
    --output_len=512 [--dense_batch=2048] [--time_limit_s=120] [--profile=FILE_OR_FOLDER]
    [--output=FILE.json] [--plot=FILE.svg]`
`python -m nanoflow_jax.search gate ...` with the same flags: from which dense batch on to split
`python -m nanoflow_jax.search paper [--requests=5000]`: what NanoFlow's paper prints, beside what
    is predicted
`python -m nanoflow_jax.search profile --model=llama-3-8b [--quick] [--tokens=128,256,512]
    [--contexts=256,1024] [--output=configs/profiles]`: times operations on this machine
`python -m nanoflow_jax.search check --model=checkpoints/embedded --profile=configs/profiles`:
    steps of an engine here, measured beside what the profile predicts
`python -m nanoflow_jax.search trace --trace=lmsys --requests=50000 --output=FILE.csv [--rate=10]`
`python -m nanoflow_jax.search trace --trace=lmsys --compare=FILE.csv`: beside the trace itself
`python -m nanoflow_jax.search simulate --model=llama-3-8b --trace=sharegpt --rates=5,10,20
    --duration_s=300 [--mode=best | --plan=FILE.json] [--reached=datasheet] [--output=FILE.json]
    [--plot=FILE.png]`
`python -m nanoflow_jax.search draw --input=FILE.json --picture=latency --plot=FILE.png`
`python -m nanoflow_jax.search draw --plan=FILE.json --model=llama-3-8b --plot=FILE.html`

Exit codes: 0 done, 1 failed while it ran, 2 wrong flags or files, 130 interrupted.
"""

import dataclasses
import functools
import pathlib
import sys

from absl import flags as absl_flags

from nanoflow_jax import console
from nanoflow_jax.bench import profile_command
from nanoflow_jax.cost import datasheets, serving
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import architecture, named, presets
from nanoflow_jax.nanobatch import plan_file
from nanoflow_jax.results import picture_file
from nanoflow_jax.results import profile as profile_lib
from nanoflow_jax.search import (
    cost_plot,
    cost_report,
    given_profile,
    interference,
    paper,
    plan_picture,
    plan_question,
    plan_report,
    profile_report,
    profile_steps,
    profiles,
    simulate_command,
)
from nanoflow_jax.workload import trace_check, traces

_FLAGS = absl_flags.FLAGS


def define(values: absl_flags.FlagValues) -> None:
    """Defines the program's flags."""
    absl_flags.DEFINE_string(
        "model",
        None,
        f"A model folder, or one of {', '.join(presets.names())}.",
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "device",
        "h200",
        f"One of {', '.join(datasheets.accelerator_names())}; those of `paper:` are as NanoFlow's "
        "Table 1 prints them. Or a file DEVICE.json that describes another: name, num_sms, "
        "teraflops, memory_gb, memory_gb_per_s, link_gb_per_s.",
        flag_values=values,
    )
    absl_flags.DEFINE_integer(
        "devices", 1, "How many serve the model.", lower_bound=1, flag_values=values
    )
    absl_flags.DEFINE_integer(
        "stages", 1, "Pipeline stages among them.", lower_bound=1, flag_values=values
    )
    absl_flags.DEFINE_float(
        "teraflops",
        None,
        "What products really reach on a device, in TFLOP/s; unset: what its maker promises.",
        lower_bound=0.1,
        flag_values=values,
    )
    absl_flags.DEFINE_float("input_len", 512, "Tokens of a prompt, on average.", flag_values=values)
    absl_flags.DEFINE_float(
        "output_len", 512, "Tokens generated for it, on average.", flag_values=values
    )
    absl_flags.DEFINE_enum(
        "trace",
        None,
        sorted(serving.TRACES),
        "A public trace: its mean lengths in place of these two, or its requests.",
        flag_values=values,
    )
    absl_flags.DEFINE_integer(
        "requests", 1000, "How many to make up.", lower_bound=1, flag_values=values
    )
    absl_flags.DEFINE_float(
        "rate",
        None,
        "Requests that come in a second; unset: all are there at once.",
        lower_bound=1e-9,
        flag_values=values,
    )
    absl_flags.DEFINE_integer("seed", 0, "Of what is made up.", lower_bound=0, flag_values=values)
    absl_flags.DEFINE_string(
        "compare",
        None,
        "A CSV file (or .csv.gz) of the real --trace: lengths made up are told beside its own.",
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "output",
        None,
        "Made-up requests go into this CSV file; a plan, or what was simulated, into a JSON file.",
        flag_values=values,
    )
    absl_flags.DEFINE_float(
        "dense_batch",
        None,
        "Tokens of a step; unset: the most that memory allows, of a plan at most 2,048.",
        lower_bound=1,
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "plot",
        None,
        "Also draw where the workload sits, or a found plan in time, in this SVG file; or what was "
        "simulated, in an SVG, HTML or PNG file.",
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "profile",
        given_profile.DATASHEET,
        "Times of operations, of plan, gate and simulate: a file that search profile wrote, or a "
        "folder of such; datasheet: the least by the device's; paper: what NanoFlow's authors "
        "measured of llama-2-70b on 8 A100s.",
        flag_values=values,
    )
    absl_flags.DEFINE_float(
        "time_limit_s",
        120.0,
        "Time to search for a plan; then the best so far is taken.",
        lower_bound=1.0,
        flag_values=values,
    )
    simulate_command.define(values)
    profile_command.define(values)


def _given(name: str, config: architecture.ModelConfig) -> given_profile.Given | None:
    """The profile that is named, if it fits the rest."""
    given = given_profile.read(
        _FLAGS.profile, name=name, config=config, num_devices=_FLAGS.devices // _FLAGS.stages
    )
    if given is not None and _FLAGS["device"].present:
        given_profile.check_device(given, _FLAGS.device)
    return given


def _cluster(given: given_profile.Given | None = None) -> serving.Cluster:
    accelerator = datasheets.accelerator(_FLAGS.device) if given is None else given.sheet
    if _FLAGS.teraflops is not None:
        accelerator = dataclasses.replace(accelerator, bf16_flops=_FLAGS.teraflops * 1e12)
    return serving.Cluster(
        accelerator=accelerator, num_devices=_FLAGS.devices, num_stages=_FLAGS.stages
    )


def _mix() -> Mix:
    if _FLAGS.trace is not None:
        return serving.TRACES[_FLAGS.trace]
    return Mix(prompt_len=_FLAGS.input_len, output_len=_FLAGS.output_len)


def _cost() -> int:
    name, config = named.read(_FLAGS.model)
    asked = cost_report.Question(
        model_name=name,
        config=config,
        cluster=_cluster(),
        mix=_mix(),
        dense_batch=_FLAGS.dense_batch,
    )
    found = cost_report.answer(asked)
    if _FLAGS.plot:
        _draw(asked, found)
    print(cost_report.text(asked, found))
    return 0


def _draw(asked: cost_report.Question, found: cost_report.Answer) -> None:
    """The workload among others on the same devices."""
    others = {
        **serving.TRACES,
        **{
            f"{ahead}/{out}": Mix(prompt_len=ahead, output_len=out)
            for ahead, out in ((512, 512), (1024, 512), (512, 1024))
        },
    }
    costs = {
        name: serving.serving_cost(found.sizes, asked.cluster, one)
        for name, one in others.items()
        if one != asked.mix
    }
    name = f"asked, {asked.mix}"
    cluster = asked.cluster
    title = f"{asked.model_name} on {cluster.num_devices} x {cluster.accelerator.name}"
    picture = cost_plot.draw({name: found.cost, **costs}, asked=name, title=title)
    _write("plot", picture)


def _write(flag: str, content: str) -> None:
    path = str(_FLAGS[flag].value)
    try:
        pathlib.Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--{flag}={path} cannot be written: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Which plan is sought, by which times."""

    name: str
    question: plan_question.Question
    given: given_profile.Given | None

    def profile(self, question: plan_question.Question) -> profiles.Profile:
        if self.given is not None:
            return self.given.measured(question.load)
        return plan_question.profile(question, from_paper=_FLAGS.profile == given_profile.PAPER)

    @functools.cached_property
    def speeds(self) -> interference.Speeds:
        known = plan_question.speeds(self.question)
        return known if self.given is None else self.given.speeds(known)


def _asked() -> _Asked:
    name, config = named.read(_FLAGS.model)
    given = _given(name, config)
    question = plan_question.Question(
        config=config,
        cluster=_cluster(given),
        mix=_mix(),
        dense_batch=_FLAGS.dense_batch,
        most_tokens=None if given is None else given.most_tokens,
    )
    return _Asked(name, question, given)


def _gate() -> int:
    asked = _asked()
    found = plan_question.by_size(
        asked.question, seconds=_FLAGS.time_limit_s, times=asked.profile, speeds=asked.speeds
    )
    if _FLAGS.output:
        _write("output", plan_file.to_json([one.plan for one in found.values()]))
    source = asked.profile(asked.question).source
    print(f"{asked.name}, {asked.question.mix}: predicted by {source}")
    for tokens, one in found.items():
        gain = one.sequential_s / one.period_s
        print(f"{tokens:>7,} tokens a step: {gain:.3f} x by {one.plan.name}")
    gate = plan_question.gate(found)
    print("splitting does not win" if gate is None else f"splitting wins from {gate:,} tokens on")
    return 0


def _plan() -> int:
    asked = _asked()
    question, speeds = asked.question, asked.speeds
    profile = asked.profile(question)
    outcome = plan_question.answer(question, profile, speeds, seconds=_FLAGS.time_limit_s)
    cluster = question.cluster
    where = f"{asked.name} on {cluster.num_devices} x {cluster.accelerator.name}"
    if _FLAGS.output:
        _write("output", plan_file.to_json([outcome.plan]))
    if _FLAGS.plot:
        _write("plot", plan_report.draw(outcome.plan, profile, speeds, title=where))
    print(
        f"{where}, {question.mix}, {question.tokens:,} tokens a step, "
        f"{question.decode_rows:,} decoded"
    )
    print(plan_report.text(outcome, profile, speeds))
    return 0


def _measure() -> int:
    name, config = named.read(_FLAGS.model)
    path = profile_command.run(
        _FLAGS,
        name=name,
        config=config,
        say=print,
        stream=sys.stderr,
        command=("python", "-m", "nanoflow_jax.search", *sys.argv[1:]),
    )
    print(profile_report.text(profile_lib.read(path), path))
    return 0


def _check() -> int:
    name, config = named.read(_FLAGS.model)
    given = _given(name, config)
    if given is None:
        raise ValueError("--profile names the profile to check against measured steps")
    found = profile_command.check(_FLAGS.model, given.file.device, stream=sys.stderr)
    steps = [
        profile_report.Step(requests=str(one.lengths), work=one.work, seconds=one.seconds)
        for one in found
    ]
    predicted = profile_steps.ProfileSteps(given, _cluster(given))
    print(profile_report.beside(predicted, steps, source=given.source))
    return 0


def _trace() -> int:
    if _FLAGS.compare:
        if _FLAGS.trace is None:
            raise ValueError(f"--compare={_FLAGS.compare} needs --trace: which one the file has")
        real = trace_check.read(pathlib.Path(_FLAGS.compare))
        print(trace_check.compare(_FLAGS.trace, real, seed=_FLAGS.seed)[0])
        return 0
    if not _FLAGS.output:
        raise ValueError("--output names the CSV file that the requests go into")
    mix = _mix()
    name = _FLAGS.trace or f"{mix}"
    made = traces.generate(name, _FLAGS.requests, seed=_FLAGS.seed, rate=_FLAGS.rate)
    try:
        with pathlib.Path(_FLAGS.output).open("w", encoding="utf-8") as file:
            traces.write_csv(made, file)
    except OSError as error:
        raise ValueError(f"--output={_FLAGS.output} cannot be written: {error.strerror}") from error
    ahead, out = made.input_lens.mean(), made.output_lens.mean()
    print(
        f"{_FLAGS.requests:,} requests like {name}: {ahead:.1f} tokens in and {out:.1f} out on "
        f"average, over {made.arrivals_s[-1]:,.1f} s"
    )
    return 0


def _simulate() -> int:
    name, config = named.read(_FLAGS.model)
    given = _given(name, config)
    cluster = _cluster(given)
    print(simulate_command.simulate(_FLAGS, name=name, config=config, cluster=cluster, given=given))
    return 0


def _draw_saved() -> int:
    if not (_FLAGS.plan and _FLAGS.plot):
        print(simulate_command.draw(_FLAGS))
        return 0
    tokens = None if _FLAGS.dense_batch is None else int(_FLAGS.dense_batch)
    _, config = named.read(_FLAGS.model)
    picture, title = plan_picture.draw(
        _FLAGS.plan, config, device=_FLAGS.device, mix=_mix(), tokens=tokens
    )
    picture_file.save(picture, _FLAGS.plot, title=title, flag="plot")
    print(f"{_FLAGS.plot} shows {title}; predicted, nothing was measured")
    return 0


def _paper() -> int:
    count = _FLAGS.requests if _FLAGS["requests"].present else paper.REQUESTS
    for line in paper.text(num_requests=count):
        print(line, flush=True)
    return 0


_COMMANDS = {
    "check": _check,
    "cost": _cost,
    "draw": _draw_saved,
    "gate": _gate,
    "paper": _paper,
    "plan": _plan,
    "profile": _measure,
    "simulate": _simulate,
    "trace": _trace,
}


def _run(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in _COMMANDS:
        raise ValueError(
            f"say what to do: one of {', '.join(_COMMANDS)}; got {' '.join(arguments) or 'nothing'}"
        )
    _check_profile(arguments[0])
    _check_plot(arguments[0])
    return _COMMANDS[arguments[0]]()


def _check_profile(command: str) -> None:
    """Refuses a profile that would be left aside."""
    known = {
        given_profile.DATASHEET: _COMMANDS.keys(),
        given_profile.PAPER: {"plan"},
    }
    if command not in known.get(_FLAGS.profile, {"plan", "gate", "simulate", "check"}):
        raise ValueError(
            f"{command} does not go by --profile={_FLAGS.profile}: files are for plan, gate, "
            "simulate and check, paper is for plan"
        )


def _check_plot(command: str) -> None:
    """Refuses a picture that nobody would draw."""
    if _FLAGS.plot and command in ("gate", "paper", "trace", "profile", "check"):
        raise ValueError(
            f"{command} draws nothing: leave --plot out; cost, plan, simulate and draw draw"
        )


def main(argv: list[str]) -> int:
    """Runs the program; returns its exit code."""
    return console.run(
        lambda: _run(argv[1:]), say=lambda text: print(text, file=sys.stderr), debug=False
    )


if __name__ == "__main__":
    define(_FLAGS)
    console.start(main)
