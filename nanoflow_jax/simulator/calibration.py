"""What operations reach on some devices, as measured by somebody; the rest is fitted to one mix.

Source: NanoFlow (arXiv 2408.12757v2): operations by Table 2 (LLaMA-2-70B on 8 A100s, 2048 tokens),
the rest by the 512/512 column of figure 9, which gives three throughputs and so three numbers. No
other printed throughput is used, so that all others can be predicted.
"""

import dataclasses

from nanoflow_jax.cost import datasheets, iteration, nanoflow_figures, serving
from nanoflow_jax.cost.nanoflow_figures import CALIBRATED_BY, FIGURE_9, Throughputs
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import architecture, huggingface, presets
from nanoflow_jax.simulator import step_time
from nanoflow_jax.simulator.step_time import Mode, Reached, Roofline, StepWork

# The text on figure 7: 1857 tokens/s a GPU are optimal, 260 TFLOP/s of 312.
_BEST_PRODUCT = 260 / 312


def nanoflow_a100() -> Reached:
    """What NanoFlow's kernels reach on A100s."""
    # Prefill attention is mostly launches; what is beyond its bound is taken as time of each layer.
    table = dict(nanoflow_figures.TABLE_2)
    prefill = table.pop("prefill_attention")
    start = Reached(
        source="NanoFlow (arXiv 2408.12757v2), Table 2, and the 512/512 column of figure 9",
        fractions={name: bound / taken for name, (bound, taken) in table.items()},
        layer_s=(prefill.measured - prefill.bound) * 1e-3 / nanoflow_figures.LAYERS,
        product_fraction=_BEST_PRODUCT,
    )
    cluster = serving.Cluster(
        accelerator=datasheets.accelerator("paper:a100-80g"), num_devices=nanoflow_figures.DEVICES
    )
    return fit(
        start,
        huggingface.read_config(presets.load("llama-2-70b")),
        cluster,
        steady_work(CALIBRATED_BY, nanoflow_figures.TOKENS),
        FIGURE_9[CALIBRATED_BY],
    )


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
    """What is left of three throughputs once operations are known.

    What a sequential step takes beside its operations is work between them; a split step over a
    sequential one, what cutting costs; and of an overlapped one, how much is hidden.

    Args:
        start: What operations reach.
        config: The model that was measured.
        cluster: The devices.
        work: A step.
        measured: Throughputs of such steps.

    Raises:
        ValueError: Operations alone take longer than the sequential step, or no overlap explains
            the overlapped one.
    """
    devices = cluster.num_devices
    whole, split, overlapped = (
        work.tokens / devices / rate
        for rate in (measured.sequential, measured.split, measured.overlapped)
    )
    known = sum(Roofline(config, cluster, start, Mode.SEQUENTIAL).operations_s(work).values())
    one_pass = dataclasses.replace(start, other_passes=1.0)
    one = Roofline(config, cluster, one_pass, Mode.SEQUENTIAL).operations_s(work)
    passes = (whole - known) / one[step_time.OTHER]
    if passes < 0:
        raise ValueError(
            f"operations alone take {known:.3f} s and the whole step {whole:.3f} s; what they "
            "reach of the datasheet is too low"
        )
    longest = max(
        Roofline(config, cluster, dataclasses.replace(start, other_passes=passes), Mode.SEQUENTIAL)
        .lanes_s(work)
        .values()
    )
    hidden = (whole - overlapped * whole / split) / (whole - longest)
    return dataclasses.replace(
        start, other_passes=passes, split_factor=split / whole, hidden_fraction=hidden
    )


REACHED = {"datasheet": lambda: step_time.DATASHEET, "nanoflow-a100": nanoflow_a100}
