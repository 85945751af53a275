"""Measures what sharing layers costs a step and saves a server, in turn with doing without."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow_jax.bench import measured, split_ends, split_profile, split_stage
from nanoflow_jax.bench.split_stage import Ask, Crowd, Stage, Timed
from nanoflow_jax.engine import interface
from nanoflow_jax.results import manifest, provenance, split, split_chart
from nanoflow_jax.results.writer import ResultWriter
from nanoflow_jax.split import engine as engine_lib
from nanoflow_jax.split.planning.asked import Request
from nanoflow_jax.split.planning.costs import Model
from nanoflow_jax.split.planning.profiles import DeviceProfile

_SEED = 0
_PROMPT_LEN = 32
_NOT_TOKENS = 3  # ids that tokenizers give to marks
# One request at a time; more rows are for its prompt alone.
_ALONE_KNOBS = {
    "max_requests": 4,
    "dense_batch": 64,
    "buckets": "1:1:0,4:4:0,64:4:4",
    "cache_num_pages": 16,
    "max_context_len": 256,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured.

    Attributes:
        models: Of `split_ends.MODELS`, whose steps are timed; the last one also serves crowds.
        pairs: Of each cut.
        output_len: Tokens of each request.
        requests: At once, of a crowd; half of them are split where layers are shared.
        rounds: Of a crowd.
        slack: Deadlines are so many times what 19 of 20 requests take of a server alone.
        patience_s: Of the gateway that serves crowds, whose deadlines leave room for it.
        rtt_s: Of the link to the clients that share layers by a plan, beside the loopback's.
    """

    models: tuple[str, ...] = split_ends.MODELS
    pairs: int = 10
    output_len: int = 48
    requests: int = 64
    rounds: int = 4
    slack: float = 2.0
    patience_s: float = 0.01
    rtt_s: float = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for.

    Attributes:
        name: Of the result.
        scale: How much is measured.
        root: Where result folders lie.
        command: As it was given.
    """

    name: str
    scale: Scale
    root: Path
    command: Sequence[str]


def cuts_of(num_layers: int) -> tuple[tuple[int, int], ...]:
    """The server's layers that are tried: all, without the first, the last, or both ends'."""
    quarter, half = max(1, num_layers // 4), num_layers // 2
    return (
        (0, num_layers),
        (quarter, num_layers),
        (half, num_layers),
        (0, half),
        (quarter, num_layers - quarter),
    )


def grid_of(num_layers: int) -> tuple[int, ...]:
    """Borders at each quarter of the layers."""
    quarter = max(1, num_layers // 4)
    return tuple(range(quarter, num_layers, quarter))


async def run(options: Options, reports: measured.Reports) -> manifest.Manifest:
    """Measures everything that was asked for.

    Returns:
        The manifest of its folder, ended.

    Raises:
        ValueError: There is no such model, or too many results of today.
        RunError: The server's process failed.
    """
    scale = options.scale
    with measured.open_result(options.root, _planned(options), say=reports.say) as result:
        found = _Bench(result, reports, scale)
        for model in scale.models:
            await found.steps(model)
        await found.crowds(scale.models[-1])
        await found.point(scale.models[-1])
        samples = result.samples()
        result.add_file(manifest.CURVES, split_chart.draw(samples).encode())
        return result.finish()


def _planned(options: Options) -> manifest.Run:
    scale = options.scale
    layers = {name: split_ends.source_of(name).config.num_layers for name in scale.models}
    return manifest.Run(
        kind=split.KIND.name,
        name=options.name,
        device=provenance.processor(),
        command=tuple(options.command),
        seed=_SEED,
        num_samples=None,  # a point may not be found
        model={
            name: dataclasses.asdict(split_ends.source_of(name).config) for name in scale.models
        },
        plan={name: {"grid": grid_of(count)} for name, count in layers.items()},
        setting={
            **dataclasses.asdict(scale),
            "prompt_len": _PROMPT_LEN,
            "link": "loopback; both ends share this machine's cores",
            "dtype": "float32",
            "accounting": "measured: time in steps, and processor time, of the server's process",
        },
    )


def _turns(count: int) -> Iterator[tuple[int, bool]]:
    """Numbers of pairs, and whether the reference goes first: in turn, since machines drift."""
    return ((number, number % 2 == 0) for number in range(count))


class _Bench:
    """Measures into a result folder."""

    def __init__(self, result: ResultWriter, reports: measured.Reports, scale: Scale) -> None:
        self._result, self._reports, self._scale = result, reports, scale
        self._random = np.random.default_rng(_SEED)

    def _note(self, line: str) -> None:
        self._reports.say(line)
        self._result.add_log(line)

    def _prompt(self, vocab_size: int) -> tuple[int, ...]:
        return tuple(self._random.integers(_NOT_TOKENS, vocab_size, _PROMPT_LEN).tolist())

    @contextlib.asynccontextmanager
    async def _stage(self, config: split_ends.EndConfig, **more: Any) -> AsyncIterator[Stage]:
        self._note(f"{config.model}: starting a server and a client")
        async with split_stage.stage(config, **more) as found:
            yield found

    async def steps(self, model: str) -> None:
        """Times steps of each cut beside those of one process."""
        vocab_size = split_ends.source_of(model).config.vocab_size
        async with self._stage(_end(model, _ALONE_KNOBS)) as stage:
            engine = split_stage.single(_end(model, _ALONE_KNOBS))
            for start, stop in cuts_of(stage.num_layers):
                ask = Ask(
                    prompt_ids=self._prompt(vocab_size),
                    output_len=self._scale.output_len,
                    cut=stage.cut(start, stop),
                )
                case = f"{model}, {ask.cut}"
                split_stage.alone(engine, ask, name="warm-up")
                await stage.alone(ask)
                for number, is_first in _turns(self._scale.pairs):
                    await self._pair(case, number, is_first, stage=stage, engine=engine, ask=ask)
            engine.close()

    async def _pair(
        self,
        case: str,
        number: int,
        is_single_first: bool,
        *,
        stage: Stage,
        engine: interface.TokenEngine,
        ask: Ask,
    ) -> None:
        modes = split.STEP_MODES if is_single_first else reversed(split.STEP_MODES)
        for mode in modes:
            if mode == split.SINGLE:
                timed = split_stage.alone(engine, ask, name=f"{case} {number}")
            else:
                timed = await stage.alone(ask)
            self._result.add_sample(_step_sample(case, mode, number, timed, await stage.rtt_s()))

    async def crowds(self, model: str) -> None:
        """Serves a crowd with a server alone, and with half of its requests split."""
        scale = self._scale
        async with self._stage(_crowd_end(model, scale)) as stage:
            whole, shared = (0, stage.num_layers), cuts_of(stage.num_layers)[2]
            cuts = [shared if place % 2 else whole for place in range(scale.requests)]
            asks = self._asks(stage, model, cuts)
            case = f"{model}, {scale.requests // 2} of {scale.requests} {stage.cut(*shared)}"
            await self._rounds(case, stage, asks, await self._deadlines(case, stage, asks))

    def _asks(
        self, stage: Stage, model: str, cuts: Sequence[tuple[int, int]]
    ) -> dict[str, list[Ask]]:
        """The same requests for a server alone and at some cuts, by mode."""
        vocab_size = split_ends.source_of(model).config.vocab_size
        prompts = [self._prompt(vocab_size) for _ in cuts]
        alone = [(0, stage.num_layers)] * len(cuts)
        return {
            mode: [
                Ask(prompt_ids=prompt, output_len=self._scale.output_len, cut=stage.cut(*cut))
                for prompt, cut in zip(prompts, chosen, strict=True)
            ]
            for mode, chosen in ((split.ALL_SERVER, alone), (split.SHARED, cuts))
        }

    async def point(self, model: str) -> None:
        """Plans for slower clients behind a longer link, and runs the plan that saves a third."""
        scale, source = self._scale, split_ends.source_of(model)
        count, grid = scale.requests // 2, grid_of(source.config.num_layers)
        profiles: list[DeviceProfile] = []

        def look(engine: engine_lib.SplitEngine) -> None:
            found = split_profile.measure(
                engine, model, grid=grid, batch=count, prompt_len=_PROMPT_LEN
            )
            profiles.append(found)

        async with self._stage(_crowd_end(model, scale), rtt_s=scale.rtt_s, look=look) as stage:
            asks = self._asks(stage, model, [(0, stage.num_layers)] * count)
            case = f"{model}, {count} planned, round trip {scale.rtt_s * 1e3:g} ms more"
            deadlines = await self._deadlines(case, stage, asks)
            asked = Request(
                prompt_len=_PROMPT_LEN,
                output_len=scale.output_len,
                ttft_s=deadlines[0],
                tpot_s=deadlines[1],
            )
            between = split_profile.link_profile(await stage.client.probe(), batch=count)
            planned = Model(model, source.config)
            found = split_profile.find(planned, profiles[0], between, asked, grid=grid[0])
            if found is None:
                self._note(f"{case}: no client saves a third of the server's time")
                return
            self._note(
                f"{case}: clients {found.slowness:g} times as slow as the server, "
                f"{stage.cut(found.start, found.stop)}; planned: {1 - found.load:.0%} of the "
                f"server's time saved, first token {found.ttft_s * 1e3:.0f} ms, each further "
                f"{found.tpot_s * 1e3:.1f} ms"
            )
            shared = stage.cut(found.start, found.stop)
            asks[split.SHARED] = [
                dataclasses.replace(ask, cut=shared) for ask in asks[split.ALL_SERVER]
            ]
            stage.engine.slowness = found.slowness
            await self._rounds(case, stage, asks, deadlines, predicted_load=found.load)

    async def _deadlines(
        self, case: str, stage: Stage, asks: dict[str, list[Ask]]
    ) -> tuple[float, float]:
        """Of the first token and of each further, from a warm server alone."""
        for _ in range(2):
            warm = await stage.crowd(asks[split.ALL_SERVER])
        first_s, token_s = (
            self._scale.slack * float(np.percentile(times, 95))
            for times in (warm.first_token_s, warm.per_token_s)
        )
        self._note(
            f"{case}: deadlines {first_s * 1e3:.0f} ms for the first token and "
            f"{token_s * 1e3:.1f} ms for each further"
        )
        return first_s, token_s

    async def _rounds(
        self,
        case: str,
        stage: Stage,
        asks: dict[str, list[Ask]],
        deadlines: tuple[float, float],
        *,
        predicted_load: float | None = None,
    ) -> None:
        """Runs both modes in turn."""
        await stage.crowd(asks[split.SHARED])
        for number, is_first in _turns(self._scale.rounds):
            for mode in split.LOAD_MODES if is_first else reversed(split.LOAD_MODES):
                ran = await stage.crowd(asks[mode])
                sample = _load_sample(case, mode, number, asks[mode], ran)
                sample |= {"ttft_s": deadlines[0], "tpot_s": deadlines[1]}
                if mode == split.SHARED:
                    sample["predicted_load"] = predicted_load
                self._result.add_sample(sample | {"rtt_s": await stage.rtt_s()})


def _end(model: str, knobs: dict[str, Any]) -> split_ends.EndConfig:
    grid = grid_of(split_ends.source_of(model).config.num_layers)
    return split_ends.EndConfig(model=model, grid=grid, knobs=knobs)


def _crowd_end(model: str, scale: Scale) -> split_ends.EndConfig:
    return dataclasses.replace(_end(model, crowd_knobs(scale)), patience_s=scale.patience_s)


def crowd_knobs(scale: Scale) -> dict[str, Any]:
    """Of ends that run a crowd: it decodes in one step, or in steps of some of it."""
    count = scale.requests
    sizes = [count * eighths // 8 for eighths in (1, 2, 4, 5, 6, 8)]
    return {
        "max_requests": count,
        "dense_batch": 2 * count,
        "buckets": ",".join([*(f"{n}:{n}:0" for n in sizes), f"{2 * count}:{count}:4"]),
        "cache_num_pages": 4 * count,
        "max_context_len": 256,
    }


def _step_sample(case: str, mode: str, number: int, timed: Timed, rtt_s: float) -> dict[str, Any]:
    return {
        "type": "step",
        "case": case,
        "mode": mode,
        "round": number,
        "step_s": timed.step_s,
        "rtt_s": rtt_s,
        "output_tokens": len(timed.token_ids),
        "tokens_sha256": split_stage.digest([timed.token_ids]),
    }


def _load_sample(
    case: str, mode: str, number: int, asks: Sequence[Ask], ran: Crowd
) -> dict[str, Any]:
    tokens = [one.token_ids for one in ran.done]
    return {
        "type": "load",
        "case": case,
        "mode": mode,
        "round": number,
        "requests": len(asks),
        "split_requests": sum(not ask.cut.is_all_server for ask in asks),
        "asked_tokens": sum(ask.output_len for ask in asks),
        "output_tokens": sum(map(len, tokens)),
        "seconds": ran.seconds,
        "busy_s": ran.busy_s,
        "cpu_s": ran.cpu_s,
        "client_cpu_s": ran.client_cpu_s,
        "steps": ran.steps,
        "first_token_s": ran.first_token_s,
        "per_token_s": ran.per_token_s,
        "predicted_load": None,
        "tokens_sha256": split_stage.digest(tokens),
    }
