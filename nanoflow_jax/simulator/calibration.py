"""What operations reach on some devices, as measured by somebody; the rest is fitted to one mix.

Source: NanoFlow (arXiv 2408.12757v2). Operations are those of Table 2 (LLaMA-2-70B on 8 A100s, 2048
tokens); its four products are explained by one number, how fast an SM computes a tile of 128 rows
and columns, within 3 %. What operations take of the SMs while they overlap products is Table 3 at
the shares of figure 6. Four numbers are left and come from the four throughputs of the 512/512
column of figure 9. No other printed throughput is used, so that all others can be predicted; but
the form of the model was chosen with them in sight (docs/simulator.md).
"""

import dataclasses

from nanoflow_jax.cost import datasheets, iteration, nanoflow_figures, serving, tiles
from nanoflow_jax.cost.nanoflow_figures import CALIBRATED_BY, FIGURE_9, TABLE_2, Throughputs
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import architecture, huggingface, presets
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.simulator import step_time
from nanoflow_jax.simulator.step_time import Mode, Reached, Roofline, StepWork

# The text on figure 7: 1857 tokens/s a GPU are optimal, 260 TFLOP/s of 312.
_BEST_PRODUCT = 260 / 312
_NUM_SMS = 108  # of an A100, by its datasheet
_TILE = 128
# Share of the SMs over speed (Table 3). Decode attention has 0.4 of them in figure 6 and 0.8 of its
# speed. Of four passes of collectives, two have 0.2 of the SMs and 0.5 of their speed, and two have
# 0.1 and 0.3.
_SHARES = {
    Resource.MEMORY: 0.4 / 0.8,
    Resource.NETWORK: (0.2 / 0.5 + 0.1 / 0.3) / 2,
}


def nanoflow_a100() -> Reached:
    """What NanoFlow's kernels reach on A100s."""
    config = huggingface.read_config(presets.load("llama-2-70b"))
    table = {name: TABLE_2[name] for name in ("decode_attention", "collectives")}
    # Prefill attention is mostly launches, as the paper says of it.
    prefill = TABLE_2["prefill_attention"]
    start = Reached(
        source="NanoFlow (arXiv 2408.12757v2), Tables 2 and 3, and the 512/512 column of figure 9",
        fractions={name: bound / taken for name, (bound, taken) in table.items()},
        grid=_grid(config),
        chunk_launch_s=(prefill.measured - prefill.bound) * 1e-3 / nanoflow_figures.LAYERS,
        shares=_SHARES,
        product_fraction=_BEST_PRODUCT,
    )
    cluster = serving.Cluster(
        accelerator=datasheets.accelerator("paper:a100-80g"), num_devices=nanoflow_figures.DEVICES
    )
    work = steady_work(CALIBRATED_BY, nanoflow_figures.TOKENS)
    return fit(start, config, cluster, work, FIGURE_9[CALIBRATED_BY])


def _grid(config: architecture.ModelConfig) -> tiles.Grid:
    """How fast an SM computes, so that the four products take together what Table 2 has."""
    unit = tiles.Grid(num_sms=_NUM_SMS, side=_TILE, sm_flops=1.0)
    products = tiles.products(config, nanoflow_figures.DEVICES)
    flops = sum(
        unit.time(one, nanoflow_figures.TOKENS, memory_bytes_per_s=float("inf")).seconds
        for one in products
    )
    taken_s = sum(TABLE_2[one.name].measured for one in products) * 1e-3
    return dataclasses.replace(unit, sm_flops=flops / taken_s)


def steady_work(mix: Mix, tokens: int) -> StepWork:
    """A step of the steady state of requests that are all alike."""
    step = iteration.steady_step(mix, tokens)
    return StepWork(
        tokens=tokens,
        decode_rows=round(step.decode_rows),
        decode_context=step.decode_rows * step.decode_context,
        chunk_pairs=(step.tokens - step.decode_rows) * step.prompt_context,
    )


def fit(
    start: Reached,
    config: architecture.ModelConfig,
    cluster: serving.Cluster,
    work: StepWork,
    measured: Throughputs,
) -> Reached:
    """What is left of four throughputs once operations are known.

    What a sequential step takes beside its operations is work between them; a split step beside
    smaller products, what cutting costs; an overlapped one tells how much of the SMs' idle time is
    used, and one that offloads, what that costs.

    Args:
        start: What operations reach.
        config: The model that was measured.
        cluster: The devices.
        work: A step.
        measured: Throughputs of such steps.

    Raises:
        ValueError: Operations alone take longer than the sequential step, no number explains one
            of the others, or nothing is idle.
    """
    whole, split, overlapped, offloaded = (
        work.tokens / cluster.num_devices / rate
        for rate in (measured.sequential, measured.split, measured.overlapped, measured.offloaded)
    )

    def steps(reached: Reached, mode: Mode) -> float:
        return Roofline(config, cluster, reached, mode).predict(work).device_s

    known = steps(start, Mode.SEQUENTIAL)
    a_pass = steps(dataclasses.replace(start, other_passes=1.0), Mode.SEQUENTIAL) - known
    if known > whole:
        raise ValueError(
            f"operations alone take {known:.3f} s and the whole step {whole:.3f} s; what they "
            "reach of the datasheet is too low"
        )
    found = dataclasses.replace(start, other_passes=(whole - known) / a_pass)
    cut_s = (split - steps(found, Mode.SPLIT)) / config.num_layers
    found = dataclasses.replace(found, cut_s=cut_s)
    unused, used = (
        steps(dataclasses.replace(found, refilled_fraction=one), Mode.OVERLAPPED)
        for one in (0.0, 1.0)
    )
    if unused == used:
        raise ValueError("overlap uses nothing of a grid that leaves nothing idle; give a grid")
    return dataclasses.replace(
        found,
        refilled_fraction=(unused - overlapped) / (unused - used),
        offload_factor=offloaded / overlapped,
    )


REACHED = {"datasheet": lambda: step_time.DATASHEET, "nanoflow-a100": nanoflow_a100}
