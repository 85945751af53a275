"""What NanoFlow's paper prints, beside what is predicted by the simulator as calibrated to it.

Lengths that are all alike are steady steps in closed form; traces are whole runs of the serving
loop. Only the 512/512 column of figure 9 was fitted.

Source: NanoFlow (arXiv 2408.12757v2), figures 7, 9 and 11.
"""

import dataclasses
from collections.abc import Iterator

from nanoflow_jax.cost import datasheets, nanoflow_figures, serving
from nanoflow_jax.cost.nanoflow_figures import CALIBRATED_BY, FIGURE_7, FIGURE_9, FIGURE_11
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.simulator import calibration, loop, measures, served
from nanoflow_jax.simulator.step_time import Mode, Reached, Roofline
from nanoflow_jax.workload import traces

_DEVICE = "paper:a100-80g"
_MODEL = "llama-2-70b"
_FIGURE_11_MIX = Mix(prompt_len=1024, output_len=512)
REQUESTS = 5000  # of a trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the paper ran.

    Attributes:
        model: A preset.
        devices: A100s.
        dense_batch: Tokens of a step.
        mode: How the operations of a layer run.
        reached: By operations.
    """

    model: str = _MODEL
    devices: int = nanoflow_figures.DEVICES
    dense_batch: int = nanoflow_figures.TOKENS
    mode: Mode = Mode.OVERLAPPED
    reached: Reached = dataclasses.field(default_factory=calibration.nanoflow_a100)

    @property
    def cluster(self) -> serving.Cluster:
        return serving.Cluster(
            accelerator=datasheets.accelerator(_DEVICE), num_devices=self.devices
        )

    @property
    def steps(self) -> Roofline:
        config = huggingface.read_config(presets.load(self.model))
        return Roofline(config, self.cluster, self.reached, self.mode)


def steady(setting: Setting, mix: Mix) -> float:
    """Tokens/s a device of the steady state, in closed form."""
    work = calibration.steady_work(mix, setting.dense_batch)
    return setting.dense_batch / setting.devices / setting.steps.predict(work).device_s


def at_once(setting: Setting, name: str, num_requests: int) -> float:
    """Tokens/s a device of a run in which all requests of a trace are there at once.

    Counted as NanoFlow's scripts count: requests that are done, times the mean lengths of the trace
    with what is behind the point left out.
    """
    config = huggingface.read_config(presets.load(setting.model))
    how = served.fill_memory(
        config, setting.cluster, dense_batch=setting.dense_batch, fixed_batch=True
    )
    made = traces.generate(name, num_requests, seed=0)
    run = loop.run(made, how, setting.steps)
    means = (float(made.input_lens.mean()), float(made.output_lens.mean()))
    counted = sum(map(int, means)) / sum(means)
    return measures.steady_tokens_per_s(run) * counted / setting.devices


def text(*, num_requests: int) -> Iterator[str]:
    """Lines for people, as they are worked out.

    Args:
        num_requests: Of each run of a trace.
    """
    known = calibration.nanoflow_a100()
    yield (
        "NanoFlow on A100s: tokens/s of input and output a device, predicted / printed. Nothing "
        "was measured here;"
    )
    yield (
        f"steps by {known.source}, of which four numbers are fitted: {known.other_passes:.1f} "
        "passes over activations a layer"
    )
    yield (
        f"beside its operations, {known.cut_s * 1e6:.0f} us a layer that is cut, "
        f"{100 * known.refilled_fraction:.0f} % of idle SM time used while overlapped, and "
        f"{known.offload_factor:.3f} x with offload"
    )
    yield f"figure 9, {_MODEL} on {nanoflow_figures.DEVICES}"
    for mix, printed in FIGURE_9.items():
        cells = []
        for field in dataclasses.fields(printed):
            said = steady(Setting(mode=Mode(field.name)), mix)
            cells.append(f"{field.name} {_beside(said, getattr(printed, field.name))}")
        fitted = " (fitted)" if mix == CALIBRATED_BY else ""
        yield f"  {f'{mix}{fitted}':<18}" + "; ".join(cells)
    yield f"figure 11, {_FIGURE_11_MIX}, overlapped"
    for model, bar in FIGURE_11.items():
        setting = Setting(model=model, devices=bar.devices, dense_batch=bar.dense_batch)
        yield f"  {model:<18}{_beside(steady(setting, _FIGURE_11_MIX), bar.tokens_per_s)}"
    yield f"figure 7, {_MODEL} on {nanoflow_figures.DEVICES}, traces of {num_requests:,} requests"
    for name, wanted in FIGURE_7.items():
        if name in serving.TRACES:
            found = at_once(Setting(), name, num_requests)
        else:
            ahead, out = map(float, name.split("/"))
            found = steady(Setting(), Mix(prompt_len=ahead, output_len=out))
        # Each step takes so much longer.
        offloaded = found / known.offload_factor
        yield (
            f"  {name:<18}overlapped {_beside(found, wanted)}; "
            f"offloaded {_beside(offloaded, wanted)}"
        )


def _beside(said: float, printed: float) -> str:
    return f"{said:,.0f} / {printed:,.0f} {100 * (said / printed - 1):+.1f} %"
