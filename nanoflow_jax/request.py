"""What a user asks of the engine, and what comes back: plain data, no jax.

A request has known tokens (its prompt and what was generated), computed tokens (their keys and
values are cached) and scheduled tokens (handed to a step). There is no prefill or decode phase.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LEN = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
MAX_ALLOWED_TOKEN_IDS = 8192
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LEN = 256
MAX_CHOICES = 128
MAX_GRAMMAR_LEN = 65536
_MAX_INT = 2**31 - 1
NO_TOKEN_LEFT = (
    "no token could be drawn: every token was banned by allowed_token_ids, bad_words, min_tokens "
    "or the grammar"
)
GRAMMAR_TOO_HARD = "the grammar could not be followed any further"
# How errors begin that are of the request's own making, and not of the engine's.
REQUEST_ERRORS = (NO_TOKEN_LEFT, GRAMMAR_TOO_HARD)


class FinishReason(enum.StrEnum):
    """Why a request ended; the values are OpenAI's where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class GrammarKind(enum.StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """What the text of a choice must look like.

    Attributes:
        kind: The language of `text`.
        text: A JSON schema, a regular expression, or a grammar in llguidance's kind of Lark.
    """

    kind: GrammarKind
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, with OpenAI's names and the field's usual additions.

    Order of use: allowed tokens, bans and bias; penalties; temperature; min_p; top_k; top_p.

    Attributes:
        max_tokens: Most tokens to generate; None means up to the end of the context.
        min_tokens: End-of-text and stop tokens are banned until this many were generated, and
            stop strings are looked for only in the text after them.
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this.
        min_p: Keep tokens at least this fraction as likely as the likeliest.
        presence_penalty: Subtracted from the logit of each token already generated.
        frequency_penalty: Subtracted once per time that the token was generated.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in the
            prompt or the output (arXiv 1909.05858).
        logit_bias: Added to the logits of these token ids.
        allowed_token_ids: If given, no other token is ever chosen.
        bad_words: What these words begin with may come, their last token never after it. Each is
            meant as the tokenizer writes it at the beginning of a text and after a space.
        stop: Generation ends at the first of these strings; it is not part of the text.
        stop_token_ids: Generation ends at these tokens; they are not part of the text.
        include_stop: Keep the stop string in the text.
        ignore_eos: End-of-text tokens do not end the request.
        logprobs: Report this many most likely tokens beside each generated one; None is off.
        prompt_logprobs: The same for each prompt token.
        n: Independent choices for one prompt.
        seed: Fixes the result whatever else is in the batch; None draws one.
        skip_special_tokens: Leave special tokens out of the text.
        grammar: Only tokens that keep the text within this grammar are chosen.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    seed: int | None = None
    skip_special_tokens: bool = True
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for message in _complaints(self):
            raise ValueError(message)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def uses_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_int(value) and 0 <= value <= _MAX_INT


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _complaints(p: SamplingParams) -> list[str]:
    """What is wrong with these parameters, as messages for the user."""
    found = []

    def want(ok: bool, name: str, wanted: str) -> None:
        if not ok:
            found.append(f"{name}={getattr(p, name)!r:.80} is not {wanted}")

    def integer(name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(p, name)
        if value is None and optional:
            return
        fits = _is_int(value) and low <= value <= high
        want(fits, name, f"an integer from {low} to {high}")

    def number(name: str, low: float, high: float, *, above_low: bool = False) -> None:
        value = getattr(p, name)
        fits = _is_number(value) and low <= value <= high and not (above_low and value == low)
        bracket = "(" if above_low else "["
        want(fits, name, f"a number in {bracket}{low:g}, {high:g}]")

    integer("max_tokens", 1, _MAX_INT, optional=True)
    integer("min_tokens", 0, _MAX_INT)
    number("temperature", 0.0, 1e6)
    integer("top_k", 0, _MAX_INT)
    number("top_p", 0.0, 1.0, above_low=True)
    number("min_p", 0.0, 1.0)
    number("presence_penalty", -2.0, 2.0)
    number("frequency_penalty", -2.0, 2.0)
    number("repetition_penalty", 0.01, 100.0)  # less would make logits infinite
    integer("logprobs", 0, MAX_LOGPROBS, optional=True)
    integer("prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
    integer("n", 1, MAX_CHOICES)
    integer("seed", -(2**63), 2**64 - 1, optional=True)
    for name in ("include_stop", "ignore_eos", "skip_special_tokens"):
        want(isinstance(getattr(p, name), bool), name, "true or false")
    found.extend(_list_complaints(p))
    if p.grammar is not None and not isinstance(p.grammar, Grammar):
        found.append(f"grammar={p.grammar!r:.80} is not a Grammar")
    elif p.grammar is not None and len(p.grammar.text) > MAX_GRAMMAR_LEN:
        found.append(
            f"grammar has {len(p.grammar.text)} characters; at most {MAX_GRAMMAR_LEN} are taken"
        )
    if not found and p.max_tokens is not None and p.min_tokens > p.max_tokens:
        found.append(f"min_tokens={p.min_tokens} is more than max_tokens={p.max_tokens}")
    return found


def _list_complaints(p: SamplingParams) -> list[str]:
    """Of lists: their length first, so that a long one costs nothing."""
    found = []
    if not isinstance(p.stop, tuple):
        found.append(f"stop={p.stop!r:.80} is not a list of non-empty strings")
    elif len(p.stop) > MAX_STOP_STRINGS or any(
        isinstance(s, str) and len(s) > MAX_STOP_LEN for s in p.stop
    ):
        found.append(
            f"stop has {len(p.stop)} strings; at most {MAX_STOP_STRINGS} of at most "
            f"{MAX_STOP_LEN} characters are taken"
        )
    elif not all(isinstance(s, str) and s for s in p.stop):
        found.append(f"stop={p.stop!r:.80} is not a list of non-empty strings")
    words = p.bad_words
    if isinstance(words, tuple) and (
        len(words) > MAX_BAD_WORDS
        or any(isinstance(w, str) and len(w) > MAX_BAD_WORD_LEN for w in words)
    ):
        found.append(
            f"bad_words has {len(words)} texts; at most {MAX_BAD_WORDS} of at most "
            f"{MAX_BAD_WORD_LEN} characters are taken"
        )
    elif not isinstance(words, tuple) or not all(isinstance(w, str) and w.strip() for w in words):
        found.append(
            f"bad_words={words!r:.80} is not a list of texts that are more than white space"
        )
    ids = p.stop_token_ids
    if isinstance(ids, tuple) and len(ids) > MAX_STOP_TOKEN_IDS:
        found.append(f"stop_token_ids has {len(ids)} ids; at most {MAX_STOP_TOKEN_IDS} are taken")
    elif not (isinstance(ids, tuple) and all(map(_is_id, ids))):
        found.append(f"stop_token_ids={ids!r:.80} is not a list of token ids")
    allowed = p.allowed_token_ids
    if isinstance(allowed, tuple) and len(allowed) > MAX_ALLOWED_TOKEN_IDS:
        found.append(
            f"allowed_token_ids has {len(allowed)} ids; at most {MAX_ALLOWED_TOKEN_IDS} are taken"
        )
    elif allowed is not None and not (
        isinstance(allowed, tuple) and allowed and all(map(_is_id, allowed))
    ):
        found.append("allowed_token_ids is not a non-empty list of token ids")
    bias = p.logit_bias
    if isinstance(bias, Mapping) and len(bias) > MAX_LOGIT_BIAS:
        found.append(f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS} are taken")
    elif not isinstance(bias, Mapping) or not all(
        _is_id(k) and _is_number(v) and -100 <= v <= 100 for k, v in bias.items()
    ):
        found.append("logit_bias is not a map from token ids to numbers in [-100, 100]")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt with one choice to generate, as the engine sees it.

    Attributes:
        request_id: Unique among the requests that the engine holds.
        prompt_ids: Token ids, at least one.
        params: How to sample; `n` is 1 and `seed` is set: the caller has expanded choices.
        priority: Lower runs first; equal ones in order of arrival.
        bad_tokens: The words of `params.bad_words` in tokens: after all but the last of a
            sequence were generated, the last one is not.
    """

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    bad_tokens: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution.

    Attributes:
        token_id: The token that stands there.
        logprob: Its log-probability.
        rank: 1 for the most likely token.
        top: The most likely tokens, best first, as (token id, log-probability).
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestUpdate:
    """What one step added to a request.

    Attributes:
        request_id: Whose it is.
        token_ids: New tokens, in order.
        logprobs: One entry per new token where asked for.
        prompt_logprobs: One entry per newly computed prompt token where asked for; the first
            token of a prompt has none.
        finish_reason: Set on the last update.
        stop_token_id: The token that ended the request, which is not among `token_ids`'s text.
        error: Why the request failed, if it did.
        started_s: With its first token: when its prompt began to run, by the engine's clock.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    started_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One generated continuation.

    Attributes:
        index: Its number among the request's choices.
        text: Without the stop string or token that ended it, unless that was asked for.
        token_ids: Generated tokens, the one that ended it included.
        finish_reason: Why it ended.
        stop_reason: The stop string, or the token id, that ended it.
        logprobs: One entry per token, where asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished request.

    Attributes:
        request_id: As submitted.
        prompt_ids: Tokens of the prompt.
        choices: In order of their index; empty if the request failed.
        prompt_logprobs: One entry per prompt token, None for the first, where asked for.
        error: Why the request failed, if it did.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step added to one choice; streaming front ends read these.

    Attributes:
        request_id: As submitted.
        index: Which choice.
        text: Certain new text, often empty.
        token_ids: New tokens.
        logprobs: One entry per new token, where asked for.
        finish_reason: Set on the choice's last delta.
        stop_reason: As in `Choice`.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredPrompt:
    """Log-probabilities of a whole prompt, known before the request's first token.

    Attributes:
        request_id: As submitted.
        prompt_logprobs: One entry per prompt token, None for the first.
    """

    request_id: str
    prompt_logprobs: tuple[TokenLogprobs | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step gave.

    Attributes:
        scored: Prompts whose log-probabilities are complete with this step.
        deltas: What was added to choices, in order.
        completions: Requests that are finished with this step.
        started_s: When the prompts began to run of requests whose first token came.
    """

    scored: tuple[ScoredPrompt, ...] = ()
    deltas: tuple[Delta, ...]
    completions: tuple[Completion, ...]
    started_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
