"""Steps of an engine under constant load, measured: what a profile's prediction is held against."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import jax

from nanoflow_jax import config as config_lib
from nanoflow_jax.bench import ablation_modes, steady_state
from nanoflow_jax.bench.ablation_device import Stage
from nanoflow_jax.bench.ablation_ground import Ground
from nanoflow_jax.bench.ablation_modes import Plans
from nanoflow_jax.bench.steady_state import Lengths, Load
from nanoflow_jax.engine import build, model_source
from nanoflow_jax.models import presets
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.simulator.step_time import StepWork

# Launched before those that count, so that the device does not wait for the host.
_LEAD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """What some steps in a row ran over, on average, and how long each took.

    Attributes:
        lengths: Of the requests.
        work: Of a step.
        seconds: Of each step.
    """

    lengths: Lengths
    work: StepWork
    seconds: tuple[float, ...]


def engine_config(model: str) -> config_lib.EngineConfig:
    """Knobs of an engine for a folder, or for a preset with random weights."""
    short = presets.try_find(model)
    if short is None:
        return config_lib.EngineConfig.from_knobs(model=model)
    return config_lib.EngineConfig.from_knobs(model=presets.PREFIX + short, random_weights=True)


def measure(
    config: config_lib.EngineConfig,
    loads: Sequence[Load],
    *,
    count: int,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> list[Steps]:
    """Runs the programs that an engine runs, one step launched before the last is read.

    Args:
        config: The knobs.
        loads: What to keep up, one after another.
        count: Steps of each.
        progress: Takes what is done, all there is, and what it was.

    Raises:
        ValueError: The knobs do not fit the model or the memory.
    """
    ground = Ground(
        config=config, source=model_source.open_model(config.model), device=jax.devices()[0]
    )
    build.use_compile_cache(config.compile.cache_dir)
    stage = Stage(ground, most_pages=max(load.num_pages(ground.page_size) for load in loads))
    try:
        found = []
        for load in loads:
            found.append(_steps(ground, stage, load, count))
            progress(len(found), len(loads), f"{load.lengths} at {load.dense_batch} tokens")
        return found
    finally:
        stage.close()


def _steps(ground: Ground, stage: Stage, load: Load, count: int) -> Steps:
    one = builders.one(ground.source.config.layer_shape, num_tokens=load.dense_batch)
    mode = ablation_modes.sequential(Plans(one=one, cut=one), ground.config.kernels)
    programs = stage.workshop.compile([mode], load, has_alone=False)
    simulated = steady_state.Simulation(
        load,
        num_pages=stage.num_pages,
        page_size=ground.page_size,
        vocab_size=ground.source.config.vocab_size,
    )
    simulated.warm_up()
    steps = simulated.record(count + _LEAD, {mode.name: stage.workshop.builder(mode, load)})
    stage.run(programs, mode.name, steps)  # what runs for the first time takes longer
    ran = stage.run(programs, mode.name, steps)[_LEAD:]
    counted = steps[_LEAD:]
    rows = round(statistics.fmean(step.decode_rows for step in counted))
    tokens = round(statistics.fmean(step.tokens for step in counted))
    work = StepWork(
        tokens=tokens,
        decode_rows=rows,
        decode_context=statistics.fmean(step.context_tokens for step in counted),
        # Tokens of a prompt see half of it, and themselves.
        chunk_pairs=max(tokens - rows, 0) * (load.lengths.prompt + 1) / 2,
    )
    return Steps(
        lengths=load.lengths,
        work=work,
        seconds=tuple(one.seconds for one in ran),
    )


USUAL: tuple[Load, ...] = tuple(
    Load(lengths=Lengths(prompt=prompt, output=output), dense_batch=tokens)
    for prompt, output, tokens in (
        (64, 64, 64),
        (64, 64, 128),
        (64, 64, 256),
        (256, 64, 256),
        (64, 64, 512),
        (128, 0, 512),
    )
)
