"""Runs the same steps sequentially, split and overlapped, in turn, into a result folder."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from nanoflow_jax import config as config_lib
from nanoflow_jax.bench import (
    ablation_scale,
    ablation_turn,
    clock,
    measured,
    steady_state,
    throughput_result,
)
from nanoflow_jax.bench.ablation_device import Stage
from nanoflow_jax.bench.ablation_ground import Ground
from nanoflow_jax.bench.ablation_scale import Case, Scale
from nanoflow_jax.bench.ablation_turn import Prepared
from nanoflow_jax.engine import build, model_source
from nanoflow_jax.models import architecture, transformer
from nanoflow_jax.results import ablation, ablation_chart, manifest

# For the ceilings at the end, and what is written then.
_END_S = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for.

    Attributes:
        engine: The knobs.
        scale: How much is measured.
        budget_s: After which no workload is begun, and rounds are left out.
        root: Where result folders lie.
        command: As it was given.
    """

    engine: config_lib.EngineConfig
    scale: Scale
    budget_s: float
    root: Path
    command: Sequence[str]


def run(options: Options, reports: measured.Reports) -> manifest.Manifest:
    """Measures everything asked for that fits into the budget.

    A run that was killed is gone on with, if it was to do the same by the same code.

    Returns:
        The manifest of its folder, ended.

    Raises:
        ValueError: The knobs do not fit the model, the memory or each other.
    """
    end = reports.clock() + options.budget_s - _END_S
    ground = Ground(
        config=options.engine,
        source=model_source.open_model(options.engine.model),
        device=jax.devices()[0],
    )
    build.use_compile_cache(options.engine.compile.cache_dir)
    scale, cases = options.scale, [*ablation_scale.cases(options.scale)]
    expected = [ablation_turn.prepare(ground, case, case.load, scale) for case in cases]
    with measured.begin(
        options.root, _planned(options, ground, expected), reports, clock.Clock()
    ) as found:
        stage = Stage(
            ground, most_pages=max(case.load.num_pages(ground.page_size) for case in cases)
        )
        prepared = [one for case in cases if (one := _try_fit(stage, case, scale, found))]
        turn = ablation_turn.Turn(found, stage, scale, reports, end=end)
        left_out = turn.all(prepared)
        stage.close()  # ceilings need its memory
        for name in left_out:
            found.note(f"not measured, for want of time: {name}")
        result = found.result
        result.set_plan({one.case.name: one.plan for one in prepared})
        samples = result.samples()
        result.set_tokens(ablation.tokens(samples))
        result.add_file(manifest.CURVES, ablation_chart.draw(ablation.timed(samples)).encode())
        return found.finish()


def _try_fit(stage: Stage, case: Case, scale: Scale, found: measured.Measured) -> Prepared | None:
    """The case as the memory keeps it up; None of a sweep's batch that it does not."""
    ground = stage.ground
    granule = 2 * ablation_turn.granule(ground.config.plans, scale)
    load = steady_state.fit(
        case.load, num_pages=stage.num_pages, page_size=ground.page_size, granule=granule
    )
    if case.is_sweep and load != case.load:
        found.note(f"not measured, for want of memory: {case.name}")
        return None
    return ablation_turn.prepare(ground, case, load, scale)


def _planned(options: Options, ground: Ground, expected: Sequence[Prepared]) -> manifest.Run:
    scale, section = options.scale, options.engine
    used = {
        module
        for one in expected
        for mode in one.modes
        for module in throughput_result.modules(ground.choices(mode))
    }
    return manifest.Run(
        kind="ablation",
        name="ablation",
        device=throughput_result.device(section.parallel),
        command=tuple(options.command),
        seed=section.model.weight_seed if section.model.random_weights else None,
        model=dataclasses.asdict(ground.source.config),
        setting={
            "dtype": ground.dtype.name,
            "lengths": [str(one) for one in scale.lengths],
            "sweep": list(scale.sweep),
            "sweep_lengths": str(scale.sweep_lengths),
            "dense_batch": scale.dense_batch,
            "rounds": scale.rounds,
            "control_rounds": scale.control_rounds,
            "steps": scale.steps,
            "knobs": throughput_result.chosen_knobs(section),
            **parameters(ground.source.config),
        },
        kernels=tuple(sorted(used)),
    )


def parameters(config: architecture.ModelConfig) -> dict[str, int]:
    """Parameters that a token meets: all, those of products in layers, and those of the head.

    Of experts it meets some only. The paper counts the embedding too, which is read and not
    multiplied with.
    """
    total = in_layers = 0
    for spec in transformer.parameter_specs(config):
        size = math.prod(spec.shape)
        if config.moe is not None and spec.axes.startswith("E") and len(spec.shape) > 2:
            size = size * config.moe.num_active // config.moe.num_experts
        total += size
        is_product = len(spec.shape) > 1 and "bias" not in spec.name
        if is_product and spec.name.startswith("layers."):
            in_layers += size
    return {
        "active_parameters": total,
        "layer_parameters": in_layers,
        "head_parameters": config.vocab_size * config.hidden_size,
    }
