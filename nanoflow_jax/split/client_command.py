"""`client`: generates over the layers that this end runs and those of a gateway."""

import asyncio
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import console, request, start_up
from nanoflow_jax import flags as knob_flags
from nanoflow_jax.engine import model_source
from nanoflow_jax.split import client as client_lib
from nanoflow_jax.split import command_flags, driver, errors, identity, report, settings
from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split import engine as engine_lib
from nanoflow_jax.split.weights import fetch_flags
from nanoflow_jax.tokenizer import tokenizer

_KEY = "NANOFLOW_API_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sections:
    client: settings.ClientSection = dataclasses.field(default_factory=settings.ClientSection)


def define(values: absl_flags.FlagValues) -> None:
    """Defines the command's flags."""
    command_flags.define(values, _Sections)
    fetch_flags.define(values)
    common = knob_flags.of_program(values)
    absl_flags.DEFINE_string("gateway", "127.0.0.1:8100", "HOST:PORT of the gateway.", **common)
    absl_flags.DEFINE_boolean("tls", False, "Speak TLS; --tls_... say how.", **common)
    absl_flags.DEFINE_list(
        "layers",
        [],
        "Layers that run here, as 0:2 or 0:2,6:8; the others run at the gateway. Only these are "
        "loaded. Empty: all run there.",
        **common,
    )
    absl_flags.DEFINE_string("prompt", None, "Continue this text and print it.", **common)
    absl_flags.DEFINE_list("prompt_ids", None, "The same for token ids: 1,2,3.", **common)
    absl_flags.DEFINE_integer("max_tokens", 32, "Most tokens to generate.", **common)
    absl_flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", **common)
    absl_flags.DEFINE_integer("top_k", 0, "Choose among so many likeliest; 0: all.", **common)
    absl_flags.DEFINE_float("top_p", 1.0, "Choose among those that reach this together.", **common)
    absl_flags.DEFINE_integer("seed", 0, "Of what is drawn.", **common)
    absl_flags.DEFINE_boolean("ignore_eos", False, "Go on after an end of text.", **common)


def cut_of(layers: Sequence[tuple[int, int]], num_layers: int) -> cut_lib.Cut:
    """What is left for the server where a client runs some layers.

    Args:
        layers: The client's, ascending.
        num_layers: L.

    Raises:
        ValueError: They leave no single range in the middle.
    """
    start = layers[0][1] if layers and layers[0][0] == 0 else 0
    stop = layers[-1][0] if layers and layers[-1][1] == num_layers else num_layers
    own = [pair for pair in ((0, start), (stop, num_layers)) if pair[0] < pair[1]]
    if list(layers) != own or start >= stop:
        text = ",".join(f"{a}:{b}" for a, b in layers)
        raise ValueError(
            f"--layers={text}: a client runs the first layers, the last of the model's "
            f"{num_layers}, or both, and leaves some to the gateway; for all of them there is "
            "python -m nanoflow_jax.generate"
        )
    return cut_lib.Cut(start=start, stop=stop, num_layers=num_layers)


def run(values: absl_flags.FlagValues, say: Callable[[str], None]) -> int:
    """Generates; returns the exit code.

    Args:
        values: The flags.
        say: Shows lines of the answer.

    Raises:
        ValueError: Flags, model or files cannot be used.
        RunError: The request failed.
    """
    # One loop for all that is asked: gRPC reports errors of another loop's channels in this one.
    with asyncio.Runner() as runner:
        try:
            return _run(values, say, runner)
        except errors.SplitError as error:
            raise console.RunError(str(error)) from error


def _run(values: absl_flags.FlagValues, say: Callable[[str], None], runner: asyncio.Runner) -> int:
    config = knob_flags.engine_config(values)
    sections: _Sections = knob_flags.composed(_Sections, values)
    host, port = config_lib.host_and_port("gateway", values.gateway, example="127.0.0.1:8100")
    where = command_flags.endpoint(
        values, host, port, token=os.environ.get(_KEY, ""), uses_tls=values.tls
    )
    layers = command_flags.ranges(values.layers)
    fetched = fetch_flags.with_fetched(config, values, where, layers, sections.client)
    config = runner.run(fetched)
    source = model_source.open_model(config.model)
    cut = cut_of(layers, source.config.num_layers)
    words = _words(source)
    prompt_ids = _prompt(values, words)
    params = request.SamplingParams(
        max_tokens=values.max_tokens,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
        ignore_eos=values.ignore_eos,
    )
    ours = identity.of(
        config.model,
        source,
        _dtype(config.model, source),
        layers=layers,
        progress=command_flags.hash_meter(),
    )
    engine = None
    if layers:
        trial = client_lib.SplitClient(where, ours, held_layers=layers, knobs=sections.client)
        runner.run(_check(trial, prompt_ids, params, cut))
        engine = engine_lib.build_split_engine(
            _sized(config), source, layers=layers, reports=start_up.reports(command_flags.tell)
        )
    made = client_lib.SplitClient(
        where,
        ours,
        engine=engine,
        held_layers=layers,
        knobs=sections.client,
    )
    try:
        done = runner.run(_generate(made, prompt_ids, params, cut))
    finally:
        if engine is not None:
            engine.close()
    say(words.decode(done.token_ids) if words is not None else _ids(done.token_ids))
    command_flags.tell(_summary(done.report, len(done.token_ids)))
    return 0


async def _check(
    client: client_lib.SplitClient,
    prompt_ids: Sequence[int],
    params: request.SamplingParams,
    cut: cut_lib.Cut,
) -> None:
    async with client:
        await client.check(prompt_ids, params, cut)


async def _generate(
    client: client_lib.SplitClient,
    prompt_ids: Sequence[int],
    params: request.SamplingParams,
    cut: cut_lib.Cut,
) -> driver.Generation:
    async with client:
        return await client.generate(prompt_ids, params, cut)


def _words(source: model_source.ModelSource) -> tokenizer.Tokenizer | None:
    if source.folder is None or source.folder.text_file("tokenizer.json") is None:
        return None
    return tokenizer.Tokenizer.load(source.folder.path)


def _prompt(values: absl_flags.FlagValues, words: tokenizer.Tokenizer | None) -> list[int]:
    if (values.prompt is None) == (values.prompt_ids is None):
        raise ValueError('give one of --prompt="..." and --prompt_ids=1,2,3')
    if values.prompt is not None:
        if words is None:
            raise ValueError("the model has no tokenizer; give --prompt_ids in place of --prompt")
        return words.encode(values.prompt)
    if not all(text.strip().isdecimal() for text in values.prompt_ids):
        raise ValueError(f"--prompt_ids={','.join(values.prompt_ids)} are no token ids: 1,2,3")
    return [int(text) for text in values.prompt_ids]


def _sized(config: config_lib.EngineConfig) -> config_lib.EngineConfig:
    """Programs for more pieces than one request has would only be compiled."""
    if config.batch.max_requests or config.batch.buckets:
        return config
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, max_requests=2))


def _dtype(section: config_lib.ModelSection, source: model_source.ModelSource) -> np.dtype[Any]:
    platform = jax.devices()[0].platform
    return model_source.run_dtype(section.dtype, source.stored_dtype, platform)


def _summary(made: report.Report, num_tokens: int) -> str:
    """What a request did, in lines."""
    times = [
        f"{name} {value * 1e3:.1f} ms"
        for name, value in (
            ("time to first token", made.ttft_s),
            ("time per further token", made.tpot_s),
            ("round trip", made.rtt_p50_s),
        )
        if value is not None
    ]
    return (
        f"{made.cut}; {num_tokens} tokens: {', '.join(times)}\n"
        f"sent {made.up_bytes} bytes in {made.num_steps} steps, received {made.down_bytes}; "
        f"{made.server_s * 1e3:.1f} ms at the server; hidden states as {made.codec}"
        + (f"; taken up again {made.num_resumes} times" if made.num_resumes else "")
        + (f"; told anew {made.num_replays} times" if made.num_replays else "")
    )


def _ids(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))
