"""The offline door: `LLM(model=...).generate(prompts, params)`.

from nanoflow_jax.llm import LLM, SamplingParams

llm = LLM(model="path/to/folder", dtype="float32")
for result in llm.generate(["def fib(n):"], SamplingParams(max_tokens=32, temperature=0.0)):
    print(result.text)
"""

import dataclasses
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanoflow_jax import config as config_lib
from nanoflow_jax import generator
from nanoflow_jax.engine import build, interface, model_source
from nanoflow_jax.parallel import peers
from nanoflow_jax.request import Choice, Completion, FinishReason, SamplingParams, TokenLogprobs
from nanoflow_jax.tokenizer import tokenizer, tool_formats
from nanoflow_jax.tokenizer import words as words_lib

__all__ = ["LLM", "Choice", "FinishReason", "Result", "SamplingParams", "TokenLogprobs"]

Prompt = str | Sequence[int]
MakeEngine = Callable[
    [
        config_lib.EngineConfig,
        model_source.ModelSource,
        build.Reports | None,
        peers.Group | None,
    ],
    interface.TokenEngine,
]
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one prompt.

    The first choice's fields can be read directly; with n > 1 the others are in `choices`.

    Attributes:
        prompt_ids: Tokens of the prompt.
        choices: At least one.
        prompt_logprobs: One entry per prompt token, None for the first, where asked for.
    """

    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None

    @property
    def text(self) -> str:
        """Generated text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Generated tokens."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """One entry per generated token, where asked for."""
        return self.choices[0].logprobs

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)


class LLM:
    """A model ready to generate, with its tokenizer and chat template if it has them."""

    def __init__(
        self,
        model: str | os.PathLike[str] = "",
        *,
        dtype: str = "auto",
        reports: build.Reports | None = None,
        **knobs: Any,
    ) -> None:
        """Loads a model and compiles its programs.

        Args:
            model: A folder; empty for the embedded model; `preset:NAME` with
                `random_weights=True`.
            dtype: "auto", "float32" or "bfloat16".
            reports: Called while loading and compiling.
            knobs: Further knobs by flag name, such as `max_requests=8`; see `config`.

        Raises:
            ValueError: The model or a knob cannot be used; the message says what to change.
        """
        config = config_lib.EngineConfig.from_knobs(model=os.fspath(model), dtype=dtype, **knobs)
        self._start(config, reports)

    @classmethod
    def from_config(
        cls,
        config: config_lib.EngineConfig,
        reports: build.Reports | None = None,
        group: peers.Group | None = None,
        make_engine: MakeEngine = build.build_engine,
    ) -> "LLM":
        """The same from a whole configuration, as programs have it.

        Args:
            config: The knobs.
            reports: Called while loading and compiling.
            group: The processes that share the model, if there are several.
            make_engine: Builds the engine from the above and the opened model; see
                `build.build_engine`.
        """
        made = cls.__new__(cls)
        made._start(config, reports, group, make_engine)
        return made

    def _start(
        self,
        config: config_lib.EngineConfig,
        reports: build.Reports | None,
        group: peers.Group | None = None,
        make_engine: MakeEngine = build.build_engine,
    ) -> None:
        self._source = model_source.open_model(config.model)
        self.words = self._load_words(config.model.tool_format)
        self.engine: interface.TokenEngine = make_engine(config, self._source, reports, group)
        self.generator = generator.Generator(self.engine, self.words.tokenizer)
        self._num_requests = 0

    def _load_words(self, tool_format: str) -> words_lib.Words:
        folder = self._source.folder
        words = words_lib.Words.load(
            folder.path if folder is not None else None, tool_format=tool_format
        )
        if words.tokenizer is not None:
            words.tokenizer.check_fits(self._source.config.vocab_size)
        return words

    @property
    def source(self) -> model_source.ModelSource:
        """The model's files."""
        return self._source

    @property
    def tokenizer(self) -> tokenizer.Tokenizer | None:
        """The model's tokenizer, None for a model of random weights without a folder."""
        return self.words.tokenizer

    @property
    def tool_style(self) -> tool_formats.ToolStyle:
        """How the model calls tools."""
        return self.words.tool_style

    @property
    def max_context_len(self) -> int:
        """Most tokens of one request, prompt included."""
        return self.engine.limits.max_context_len

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, a BOS included where the model wants one.

        Raises:
            ValueError: The prompt is text and the model has no tokenizer.
        """
        return self.words.encode(prompt if isinstance(prompt, str) else _plain_ids(prompt))

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of a conversation, by the model's chat template.

        Args:
            messages: Each with a role and a content.
            options: As `ChatTemplate.render`: tools, add_generation_prompt,
                continue_final_message, kwargs, now.

        Raises:
            ValueError: The model has no template, or the template refuses the messages.
        """
        return self.words.encode_chat(messages, **options)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Result]:
        """Continues prompts.

        Args:
            prompts: One prompt or several: text, or token ids.
            params: For all, or one for each; by default 16 tokens at temperature 1.
            progress: Called with the number of finished prompts and of all.

        Returns:
            One result per prompt, in order.

        Raises:
            ValueError: A prompt or its parameters cannot be served; nothing was generated.
            RuntimeError: A request failed while it ran, such as on logits that are not finite.
        """
        listed = _as_list(prompts)
        return self._run([self.encode(p) for p in listed], params, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> list[Result]:
        """Answers one conversation or several; see `encode_chat` and `generate`."""
        one = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        return self._run([self.encode_chat(c, **options) for c in conversations], params, progress)

    @property
    def num_generated(self) -> int:
        """Tokens generated since the start."""
        return self.engine.counters.generated_tokens

    def submit(
        self,
        name: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
    ) -> None:
        """Takes a request in, for callers that run the steps themselves, as a batch job does.

        Args:
            name: Unique among unfinished requests.
            prompt_ids: Token ids.
            params: Its seed must be set.
            priority: Lower runs first.

        Raises:
            ValueError: This request cannot be served; others are not affected.
        """
        self.generator.submit(name, prompt_ids, params, priority=priority)

    def abort(self, name: str) -> None:
        """Drops a request; nothing more is reported of it."""
        self.generator.abort(name)

    def step(self) -> Sequence[Completion]:
        """Runs one step; the requests that it finished."""
        return self.generator.step().completions

    def _run(
        self,
        prompts: list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: Callable[[int, int], None] | None,
    ) -> list[Result]:
        names = dict.fromkeys(self._submit_all(prompts, _per_prompt(params, len(prompts))))
        found: dict[str, Completion] = {}
        try:
            while len(found) < len(names):
                for completion in self.generator.step().completions:
                    if completion.request_id in names:
                        found[completion.request_id] = completion
                if progress is not None:
                    progress(len(found), len(names))
        finally:
            for name in names:
                self.generator.abort(name)
        return [_result(found[name]) for name in names]

    def _submit_all(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[str]:
        names: list[str] = []
        try:
            for prompt, wanted in zip(prompts, params, strict=True):
                name = f"llm-{self._num_requests}"
                self._num_requests += 1
                self.generator.submit(name, prompt, with_seed(wanted))
                names.append(name)
        except ValueError:
            for name in names:
                self.generator.abort(name)
            raise
        return names

    def close(self) -> None:
        """Frees the device's memory and ends the processes of templates and grammars.

        Results that were given stay; nothing more can be generated.
        """
        self.engine.close()
        self.words.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def with_seed(params: SamplingParams) -> SamplingParams:
    """The parameters with a seed; a drawn one where none was given."""
    if params.seed is not None:
        return params
    return dataclasses.replace(params, seed=secrets.randbits(63))


def _plain_ids(ids: Any) -> list[int]:
    """A list, of Python's own integers where the ids are numpy's."""
    if isinstance(ids, np.ndarray):
        found: list[int] = ids.tolist()
        return found
    return [int(entry) if isinstance(entry, np.integer) else entry for entry in ids]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = _plain_ids(prompts)
    if listed and isinstance(listed[0], int):
        return [listed]
    return listed


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(
            f"{len(params)} sampling parameters for {count} prompts; give one for each"
        )
    return list(params)


def _result(completion: Completion) -> Result:
    if completion.error is not None:
        raise RuntimeError(completion.error)
    return Result(
        prompt_ids=completion.prompt_ids,
        choices=completion.choices,
        prompt_logprobs=completion.prompt_logprobs,
    )
