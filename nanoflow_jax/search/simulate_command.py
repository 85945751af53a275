"""`simulate` and `draw`: a serving loop in simulated time, and pictures of what came of it."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

from absl import flags as absl_flags

from nanoflow_jax.cost import serving
from nanoflow_jax.cost.nanoflow_figures import FIGURE_8
from nanoflow_jax.models import architecture
from nanoflow_jax.results import picture_file
from nanoflow_jax.search import (
    given_plans,
    given_profile,
    interference,
    plan_steps,
    profile_steps,
)
from nanoflow_jax.simulator import calibration, loop, measures, pictures, result_file, served
from nanoflow_jax.simulator.result_file import OneRate, Simulation
from nanoflow_jax.simulator.step_time import Mode, Reached, Roofline, StepTimes
from nanoflow_jax.workload import traces

_USUAL_TOKENS = 2048  # of a dense batch
_PICTURES = ("latency", "resources", "throughput")


def define(values: absl_flags.FlagValues) -> None:
    """Defines the flags of both."""
    absl_flags.DEFINE_list("rates", [], "Rates to simulate one after another.", flag_values=values)
    absl_flags.DEFINE_float(
        "duration_s",
        None,
        "Simulated arrivals go on for so long, in place of --requests; needs a rate.",
        lower_bound=1e-9,
        flag_values=values,
    )
    absl_flags.DEFINE_float(
        "warm_up_s",
        0.0,
        "Simulated requests that come earlier are served but not timed.",
        lower_bound=0,
        flag_values=values,
    )
    absl_flags.DEFINE_enum_class(
        "mode", Mode.BEST, Mode, "How the operations of a layer run.", flag_values=values
    )
    absl_flags.DEFINE_enum(
        "reached",
        "datasheet",
        sorted(calibration.REACHED),
        "What operations reach of a datasheet.",
        flag_values=values,
    )
    absl_flags.DEFINE_integer(
        "data_parallel",
        1,
        "Copies of the model, on --devices each.",
        lower_bound=1,
        flag_values=values,
    )
    absl_flags.DEFINE_integer(
        "page_size", 16, "Tokens in one page.", lower_bound=1, flag_values=values
    )
    absl_flags.DEFINE_boolean(
        "fixed_batch",
        False,
        "Run every step as a full dense batch, as NanoFlow does, rather than by the smallest of "
        "the default buckets.",
        flag_values=values,
    )
    absl_flags.DEFINE_float(
        "host_ms", 2.0, "Of the host for each step.", lower_bound=0, flag_values=values
    )
    absl_flags.DEFINE_boolean(
        "async_scheduling", True, "Plan a step while the last one runs.", flag_values=values
    )
    absl_flags.DEFINE_integer(
        "max_tokens",
        None,
        "What requests ask for at most; they end where the trace has it, which the scheduler does "
        "not know. Unset: it knows.",
        lower_bound=1,
        flag_values=values,
    )
    absl_flags.DEFINE_float(
        "objective_ms",
        200.0,
        "Wanted of the mean normalised latency.",
        lower_bound=1e-9,
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "plan",
        None,
        "A file of plans: its pipeline is drawn; or steps are simulated as these plans run them, "
        "beside the same without plans.",
        flag_values=values,
    )
    absl_flags.DEFINE_list("input", [], "Saved simulations to draw.", flag_values=values)
    absl_flags.DEFINE_enum(
        "picture", "resources", _PICTURES, "What to draw of a simulation.", flag_values=values
    )


def simulate(
    flags: absl_flags.FlagValues,
    *,
    name: str,
    config: architecture.ModelConfig,
    cluster: serving.Cluster,
    given: given_profile.Given | None = None,
) -> str:
    """Runs simulations and writes what came of them.

    Args:
        flags: With those of `define`.
        name: Of the model.
        config: Its shape.
        cluster: Where it runs.
        given: A profile to go by, in place of what operations reach of a datasheet.

    Returns:
        Lines for people.

    Raises:
        ValueError: Flags that do not go together.
    """
    reached = calibration.REACHED[flags.reached]()
    if flags.plan:
        if given is not None:
            raise ValueError(
                f"--plan={flags.plan} and --profile={given.path} cannot both be given: plans are "
                "simulated by what operations reach of a datasheet; leave one out"
            )
        return _simulate_plans(flags, name=name, config=config, cluster=cluster, reached=reached)
    setting = _served(flags, config, cluster, tokens=int(flags.dense_batch or _USUAL_TOKENS))
    asked = _Asked(name, config, cluster, reached, setting)
    if given is not None:
        found = _run(flags, asked, _by_profile(flags, given, cluster), how=Mode.SEQUENTIAL.value)
        found = dataclasses.replace(found, source=given.source)
    else:
        times = Roofline(config, cluster, reached, flags.mode)
        found = _run(flags, asked, times, how=flags.mode.value)
    _keep(flags, found)
    return "\n".join(_text(found, flags.objective_ms / 1e3))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What is simulated."""

    name: str
    config: architecture.ModelConfig
    cluster: serving.Cluster
    reached: Reached
    setting: loop.Served


def _simulate_plans(
    flags: absl_flags.FlagValues,
    *,
    name: str,
    config: architecture.ModelConfig,
    cluster: serving.Cluster,
    reached: Reached,
) -> str:
    """The loop as plans run it, and beside it as it runs without them."""
    if flags["mode"].present:
        raise ValueError(
            f"--mode={flags.mode.value} and --plan cannot both be given: a plan says how the "
            "operations of a layer run; leave one out"
        )
    device = cluster.accelerator
    plans = given_plans.read(
        flags.plan, given_plans.shape(config, num_devices=cluster.group_size), device
    )
    largest = given_plans.choose(flags.plan, plans, flags.dense_batch)
    setting = _served(flags, config, cluster, tokens=largest.num_tokens)
    sizes = {bucket.tokens for bucket in setting.buckets}
    fitting = {tokens: plan for tokens, plan in plans.items() if tokens in sizes}
    speeds = interference.of_device(device.name)
    asked = _Asked(name, config, cluster, reached, setting)
    plain = _run(
        flags, asked, Roofline(config, cluster, reached, Mode.SEQUENTIAL), how="sequential"
    )
    steps = plan_steps.PlanSteps(config, cluster, reached, plans=fitting, speeds=speeds)
    found = _run(flags, asked, steps, how=f"plan {largest.name}")
    found = dataclasses.replace(
        found, source=f"{found.source}; speeds on shares of a device: {speeds.source}"
    )
    _keep(flags, found)
    lines = [*_text(found, flags.objective_ms / 1e3), "", *_text(plain, flags.objective_ms / 1e3)]
    for with_plan, without in zip(found.runs, plain.runs, strict=True):
        gain = with_plan.summary.steady_tokens_per_s / without.summary.steady_tokens_per_s
        lines.append(f"{_rate(with_plan)}: {gain:.3f} x the throughput without plans")
    return "\n".join(lines)


def _run(flags: absl_flags.FlagValues, asked: _Asked, times: StepTimes, *, how: str) -> Simulation:
    """Simulates each rate."""
    setting, cluster, reached = asked.setting, asked.cluster, asked.reached
    requests = flags.trace or f"{flags.input_len:g}/{flags.output_len:g}"
    runs = []
    for rate in _rates(flags):
        run = loop.run(_requests(flags, requests, rate), setting, times)
        shown = measures.timeline(
            run, num_pages=setting.num_pages, num_replicas=setting.num_replicas
        )
        summary = measures.summarise(run, warm_up_s=flags.warm_up_s)
        runs.append(OneRate(rate=rate, summary=summary, timeline=shown))
    devices = cluster.num_devices * setting.num_replicas
    optimal = cluster.flops / (2 * serving.sizes(asked.config).active_parameters)
    return Simulation(
        name=requests,
        title=f"{asked.name} on {devices} x {cluster.accelerator.name}, {requests}, {how}",
        settings=_settings(flags),
        source=reached.source,
        num_devices=devices,
        optimal_tokens_per_s=optimal * setting.num_replicas * reached.product_fraction,
        runs=tuple(runs),
    )


def _keep(flags: absl_flags.FlagValues, found: Simulation) -> None:
    """Saves and draws it, where that is asked for."""
    if flags.output:
        try:
            result_file.write(found, pathlib.Path(flags.output))
        except OSError as error:
            message = f"--output={flags.output} cannot be written: {error.strerror}"
            raise ValueError(message) from error
    if flags.plot:
        _plot(flags, [found])


def _by_profile(
    flags: absl_flags.FlagValues, given: given_profile.Given, cluster: serving.Cluster
) -> profile_steps.ProfileSteps:
    asked = {"mode": flags.mode is not Mode.SEQUENTIAL, "reached": True}
    for name, is_other in asked.items():
        if flags[name].present and is_other:
            raise ValueError(
                f"--{name} and --profile={given.path} cannot both be given: steps of a profile are "
                "one operation after another, as measured; leave one out"
            )
    return profile_steps.ProfileSteps(given, cluster)


def _settings(flags: absl_flags.FlagValues) -> dict[str, object]:
    names = (
        *("model", "device", "devices", "teraflops", "input_len", "output_len", "trace"),
        *("requests", "duration_s", "warm_up_s", "seed", "reached", "data_parallel", "page_size"),
        *("profile", "dense_batch", "fixed_batch", "host_ms", "async_scheduling", "max_tokens"),
        "plan",
    )
    mode = None if flags.plan else flags.mode.value
    return {"mode": mode, **{name: flags[name].value for name in names}}


def _served(
    flags: absl_flags.FlagValues,
    config: architecture.ModelConfig,
    cluster: serving.Cluster,
    *,
    tokens: int,
) -> loop.Served:
    found = served.fill_memory(
        config,
        cluster,
        dense_batch=tokens,
        page_size=flags.page_size,
        fixed_batch=flags.fixed_batch,
    )
    return dataclasses.replace(
        found,
        num_replicas=flags.data_parallel,
        host_s=flags.host_ms / 1e3,
        run_ahead=flags.async_scheduling,
        max_tokens=flags.max_tokens,
    )


def _rates(flags: absl_flags.FlagValues) -> list[float | None]:
    if not flags.rates:
        return [flags.rate]
    if flags.rate is not None:
        raise ValueError("--rate and --rates cannot both be given; leave one out")
    try:
        rates = sorted({float(text) for text in flags.rates})
    except ValueError:
        raise ValueError(f"--rates={','.join(flags.rates)} are not all numbers") from None
    return list(rates)


def _requests(flags: absl_flags.FlagValues, name: str, rate: float | None) -> traces.Requests:
    count = flags.requests
    if flags.duration_s is not None:
        if rate is None:
            raise ValueError("--duration_s needs --rate or --rates: without, all come at once")
        count = max(round(rate * flags.duration_s), 1)
    return traces.generate(name, count, seed=flags.seed, rate=rate)


def _text(found: Simulation, objective_s: float) -> Iterator[str]:
    devices, top = found.num_devices, found.optimal_tokens_per_s
    by_profile = found.settings.get("profile", given_profile.DATASHEET) != given_profile.DATASHEET
    how = "simulated" if by_profile else "nothing was measured"
    yield f"{found.title}; {how}: steps by {found.source}"
    yield (
        "    rate  tokens/s a device  of optimal  TTFT mean / p99 s  TPOT mean / p99 ms  "
        "normalised mean / p50 / p90 / p99 ms"
    )
    for one in found.runs:
        s = one.summary
        tpot = "-" if s.tpot_s is None else f"{1e3 * s.tpot_s.mean:.0f} / {1e3 * s.tpot_s.p99:.0f}"
        each = s.normalised_s
        spread = " / ".join(f"{1e3 * v:.0f}" for v in (each.mean, each.p50, each.p90, each.p99))
        yield (
            f"{_rate(one):>8} {s.steady_tokens_per_s / devices:>18,.0f} "
            f"{100 * s.steady_tokens_per_s / top:>9.1f} % "
            f"{f'{s.ttft_s.mean:.2f} / {s.ttft_s.p99:.2f}':>18} {tpot:>19} {spread:>37}"
        )
    latencies = {r.rate: r.summary.normalised_s.mean for r in found.runs if r.rate is not None}
    if len(latencies) > 1:
        highest = measures.highest_rate(latencies, objective_s=objective_s)
        held = "at none or all of these rates" if highest is None else f"up to {highest:.2f}/s"
        yield f"{1e3 * objective_s:g} ms a token are held {held}"
    for one in found.runs:
        s = one.summary
        yield (
            f"{s.num_requests:,} requests, {s.tokens:,} tokens in {s.duration_s:,.1f} s and "
            f"{s.num_steps:,} steps; {s.num_preemptions} preemptions, {s.surplus_tokens} surplus "
            "tokens"
        )


def _rate(one: OneRate) -> str:
    return "at once" if one.rate is None else f"{one.rate:g}"


def draw(flags: absl_flags.FlagValues) -> str:
    """Draws saved simulations.

    Raises:
        ValueError: No such file, or nothing in it to draw so.
    """
    if not flags.input or not flags.plot:
        raise ValueError(
            "--input names files that simulate wrote, or --plan one of plans; and --plot a picture"
        )
    found = []
    for path in flags.input:
        try:
            found.append(result_file.read(pathlib.Path(path)))
        except OSError as error:
            raise ValueError(f"--input={path} cannot be read: {error.strerror}") from error
    _plot(flags, found)
    return f"{flags.plot} shows {flags.picture} of {', '.join(one.title for one in found)}"


def _plot(flags: absl_flags.FlagValues, found: list[Simulation]) -> None:
    if flags.picture != "throughput" and len(found) > 1:
        raise ValueError(f"--picture={flags.picture} shows one simulation; give one --input")
    match flags.picture:
        case "throughput":
            picture = pictures.throughput(found)
        case "latency":
            picture = pictures.latency(
                found[0], objective_s=flags.objective_ms / 1e3, printed=_printed(found[0])
            )
        case _:
            busiest = found[0].runs[-1]
            rate = "" if busiest.rate is None else f", {busiest.rate:g} requests/s"
            picture = pictures.resources(busiest, title=found[0].title + rate)
    picture_file.save(picture, flags.plot, title=found[0].title, flag="plot")


def _printed(found: Simulation) -> Mapping[float, float]:
    """What NanoFlow's figure 8 has of the same model, devices and trace: seconds by rate."""
    names = ("model", "devices", "reached", "data_parallel")
    if [found.settings[name] for name in names] != ["llama-2-70b", 8, "nanoflow-a100", 1]:
        return {}
    return FIGURE_8.get(str(found.settings["trace"]), {})
