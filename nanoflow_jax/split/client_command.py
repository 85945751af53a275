"""`client`: generates over the layers that this end runs and those of a gateway."""

import asyncio
import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import flags as absl_flags

from nanoflow_jax import console, request
from nanoflow_jax import flags as knob_flags
from nanoflow_jax.engine import model_source
from nanoflow_jax.split import client as client_lib
from nanoflow_jax.split import client_ends, command_flags, errors, planned_command, report
from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split.weights import fetch_flags
from nanoflow_jax.tokenizer import tokenizer


def define(values: absl_flags.FlagValues) -> None:
    """Defines the command's flags."""
    client_ends.define(
        values,
        layers_help="Layers that run here, as 0:2 or 0:2,6:8; the others run at the gateway. Only "
        "these are loaded. Empty: all run there. With --profiles: layers that may run here; "
        "empty: all.",
    )
    planned_command.define(values)
    fetch_flags.define(values)
    common = knob_flags.of_program(values)
    absl_flags.DEFINE_string("prompt", None, "Continue this text and print it.", **common)
    absl_flags.DEFINE_list("prompt_ids", None, "The same for token ids: 1,2,3.", **common)
    absl_flags.DEFINE_string(
        "prompts_file", None, "The same for each line of a file; -: of standard input.", **common
    )
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
    sections: client_ends.Sections = knob_flags.composed(client_ends.Sections, values)
    where = client_ends.endpoint(values)
    planned_command.check(values)
    layers = command_flags.ranges(values.layers)
    fetched = fetch_flags.with_fetched(config, values, where, layers, sections.client)
    config = runner.run(fetched)
    source = model_source.open_model(config.model)
    if not values.profiles:
        cut = cut_of(layers, source.config.num_layers)
    words = _words(source)
    prompts = _prompts(values, words)
    params = request.SamplingParams(
        max_tokens=values.max_tokens,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
        ignore_eos=values.ignore_eos,
    )

    def show(token_ids: Sequence[int]) -> None:
        say(words.decode(token_ids) if words is not None else _ids(token_ids))

    ours = config, source
    if values.profiles:
        return planned_command.run(
            values,
            where,
            ours,
            layers,
            knobs=sections.client,
            asked=(prompts, params),
            show=show,
            runner=runner,
        )
    engine = None
    if layers:
        trial = client_ends.make_client(where, ours, sections.client, layers=layers)
        runner.run(_check(trial, prompts, params, cut))
        engine = client_ends.build_engine(config, source, layers)
    made = client_ends.make_client(where, ours, sections.client, engine=engine, layers=layers)
    try:
        runner.run(_generate(made, prompts, params, cut, show=show))
    finally:
        if engine is not None:
            engine.close()
    return 0


async def _check(
    client: client_lib.SplitClient,
    prompts: Sequence[Sequence[int]],
    params: request.SamplingParams,
    cut: cut_lib.Cut,
) -> None:
    """Asks for the longest, before anything is loaded for it."""
    async with client:
        await client.check(max(prompts, key=len), params, cut)


async def _generate(
    client: client_lib.SplitClient,
    prompts: Sequence[Sequence[int]],
    params: request.SamplingParams,
    cut: cut_lib.Cut,
    *,
    show: Callable[[Sequence[int]], None],
) -> None:
    async with client:
        for prompt_ids in prompts:
            done = await client.generate(prompt_ids, params, cut)
            show(done.token_ids)
            command_flags.tell(_summary(done.report, len(done.token_ids)))


def _words(source: model_source.ModelSource) -> tokenizer.Tokenizer | None:
    if source.folder is None or source.folder.text_file("tokenizer.json") is None:
        return None
    return tokenizer.Tokenizer.load(source.folder.path)


def _prompts(values: absl_flags.FlagValues, words: tokenizer.Tokenizer | None) -> list[list[int]]:
    given = [values.prompt, values.prompt_ids, values.prompts_file]
    if sum(one is not None for one in given) != 1:
        raise ValueError('give one of --prompt="...", --prompt_ids=1,2,3 and --prompts_file=FILE')
    if values.prompt_ids is not None:
        if not all(text.strip().isdecimal() for text in values.prompt_ids):
            raise ValueError(f"--prompt_ids={','.join(values.prompt_ids)} are no token ids: 1,2,3")
        return [[int(text) for text in values.prompt_ids]]
    if words is None:
        raise ValueError("the model has no tokenizer; give --prompt_ids in place of a text")
    texts = [values.prompt] if values.prompt is not None else _lines(values.prompts_file)
    return [words.encode(text) for text in texts]


def _lines(path: str) -> list[str]:
    """The lines of a file, or of standard input, that are not empty."""
    try:
        text = sys.stdin.read() if path == "-" else pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts_file={path} cannot be read: {error}") from error
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise ValueError(f"--prompts_file={path} has no line; each is a prompt")
    return found


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
