"""One prompt from the command line: its text is shown while it is made."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from nanoflow_jax import config as config_lib
from nanoflow_jax import generator
from nanoflow_jax import request as request_lib
from nanoflow_jax.console import RunError
from nanoflow_jax.engine import build, model_source, sequence
from nanoflow_jax.parallel import peers
from nanoflow_jax.request import SamplingParams
from nanoflow_jax.tokenizer import tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What a prompt took.

    Attributes:
        prompt_tokens: Of the prompt.
        output_tokens: Generated.
        seconds: From the prompt to the last token.
    """

    prompt_tokens: int
    output_tokens: int
    seconds: float


def run(
    config: config_lib.EngineConfig,
    prompt: str | Sequence[int],
    params: SamplingParams,
    *,
    write: Callable[[str], None],
    reports: build.Reports,
    group: peers.Group | None = None,
) -> Speed:
    """Loads a model and continues one prompt, which is checked before a weight is read.

    Args:
        config: The engine's knobs.
        prompt: Text, or token ids.
        params: Its seed is set.
        write: Takes the text as it comes; token ids with spaces if there is no tokenizer.
        reports: Called while the engine starts.
        group: The processes that share the model, if there are several.

    Raises:
        ValueError: The model, the prompt or the parameters cannot be used.
        RunError: The request failed while it ran.
    """
    # Not llm.LLM: that comes with chat templates, and random weights need none of it.
    source = model_source.open_model(config.model)
    words = None
    if source.folder is not None:
        words = tokenizer.Tokenizer.load(source.folder.path)
        words.check_fits(source.config.vocab_size)
    if isinstance(prompt, str):
        if words is None:
            raise ValueError(
                f"--model={config.model.model} has no tokenizer; give --prompt_ids=1,2,3 "
                "in the place of --prompt"
            )
        prompt = words.encode(prompt)
    generator.check_words(params, words)
    _check(config.model, source, prompt, params)
    batch = config.batch
    if not (batch.max_requests or batch.buckets or batch.batch_invariant):
        # Programs for more requests than there are would only be compiled.
        batch = dataclasses.replace(batch, max_requests=params.n)
        config = dataclasses.replace(config, batch=batch)
    engine = build.build_engine(config, source, reports, group)
    try:
        return _generate(generator.Generator(engine, words), list(prompt), params, write, words)
    finally:
        engine.close()


def _check(
    section: config_lib.ModelSection,
    source: model_source.ModelSource,
    prompt_ids: Sequence[int],
    params: SamplingParams,
) -> None:
    one = dataclasses.replace(params, n=1)
    sequence.make_sequence(
        request_lib.Request(request_id="prompt", prompt_ids=prompt_ids, params=one),
        vocab_size=source.config.vocab_size,
        max_context_len=model_source.context_len(section, source.config),
        eos_ids=source.eos_ids,
    )


def _generate(
    texts: generator.Generator,
    prompt_ids: list[int],
    params: SamplingParams,
    write: Callable[[str], None],
    words: tokenizer.Tokenizer | None,
) -> Speed:
    began = time.monotonic()
    texts.submit("prompt", prompt_ids, params)
    while True:
        result = texts.step()
        # Several choices come mixed: only a single one can be shown before it is whole.
        if params.n == 1:
            for delta in result.deltas:
                write(delta.text if words is not None else _ids(delta.token_ids))
        if result.completions:
            break
    done = result.completions[0]
    if done.error is not None:
        raise RunError(done.error)
    if params.n == 1:
        write("\n")
    else:
        for choice in done.choices:
            text = choice.text if words is not None else _ids(choice.token_ids)
            write(f"--- {choice.index + 1} of {params.n} ---\n{text}\n")
    return Speed(
        prompt_tokens=len(prompt_ids),
        output_tokens=sum(len(choice.token_ids) for choice in done.choices),
        seconds=time.monotonic() - began,
    )


def _ids(token_ids: Sequence[int]) -> str:
    return "".join(f"{token} " for token in token_ids)
