"""Prompts in, finished texts out, over one engine: choices, detokenising, stop strings.

A batch job and a server feed requests while earlier ones run; `llm` is the closed form of it.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import interface
from nanoflow_jax.tokenizer import bad_words, detokenizer, stop, tokenizer


class _TextChoice:
    """One choice while it is generated."""

    def __init__(
        self,
        index: int,
        params: request_lib.SamplingParams,
        words: tokenizer.Tokenizer | None,
        prompt_ids: Sequence[int],
    ) -> None:
        self.index = index
        self._params = params
        self._detokenizer = None
        if words is not None:
            self._detokenizer = detokenizer.continuing(
                words, prompt_ids, skip_special_tokens=params.skip_special_tokens
            )
        self._stop = stop.StopMatcher(params.stop, params.include_stop)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[request_lib.TokenLogprobs] = []
        self.choice: request_lib.Choice | None = None

    def take(self, update: request_lib.RequestUpdate) -> request_lib.Delta:
        """Adds an update; `choice` is set once it is finished."""
        reason = update.finish_reason
        stop_reason: str | int | None = None
        text = ""
        for token in update.token_ids:
            hidden = token == update.stop_token_id and not self._params.include_stop
            if self._detokenizer is not None and not hidden:
                text += self._detokenizer.push(token)
        if self._detokenizer is not None and reason is not None:
            text += self._detokenizer.finish()
        is_early = self.num_tokens + len(update.token_ids) <= self._params.min_tokens
        shown, hit = (text, None) if is_early else self._stop.push(text)
        if hit is not None:
            reason, stop_reason = request_lib.FinishReason.STOP, hit
        elif reason is not None:
            shown += self._stop.finish()
            if update.stop_token_id in self._params.stop_token_ids:
                stop_reason = update.stop_token_id
        self._text.append(shown)
        self._token_ids.extend(update.token_ids)
        self._logprobs.extend(update.logprobs)
        if reason is not None:
            self.choice = self._finished(reason, stop_reason)
        return request_lib.Delta(
            request_id=update.request_id,
            index=self.index,
            text=shown,
            token_ids=update.token_ids,
            logprobs=update.logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def _finished(
        self, reason: request_lib.FinishReason, stop_reason: str | int | None
    ) -> request_lib.Choice:
        wants_logprobs = self._params.logprobs is not None
        return request_lib.Choice(
            index=self.index,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=tuple(self._logprobs) if wants_logprobs else None,
        )

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)


@dataclasses.dataclass(eq=False, kw_only=True)
class _Pending:
    """A submitted request until all of its choices are finished."""

    prompt_ids: tuple[int, ...]
    choices: list[_TextChoice]
    wants_prompt_logprobs: bool
    prompt_logprobs: list[request_lib.TokenLogprobs | None] = dataclasses.field(
        default_factory=lambda: [None]
    )

    @property
    def is_scored(self) -> bool:
        """Whether every prompt token has its log-probability."""
        return len(self.prompt_logprobs) == len(self.prompt_ids)


class Generator:
    """Runs requests with several choices each and gives back text.

    Invariant: every unfinished choice of a pending request is one request of the engine, named
    `request_id/index`.
    """

    def __init__(self, engine: interface.TokenEngine, words: tokenizer.Tokenizer | None) -> None:
        """Wraps an engine.

        Args:
            engine: Nobody else may add requests to it.
            words: None where the model has no tokenizer: texts are empty then.
        """
        self._engine = engine
        self._words = words
        self._pending: dict[str, _Pending] = {}
        self._owners: dict[str, tuple[str, int]] = {}

    @property
    def num_pending(self) -> int:
        """Requests submitted and not finished."""
        return len(self._pending)

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        *,
        priority: int = 0,
    ) -> None:
        """Takes a request in.

        Args:
            request_id: Unique among pending requests.
            prompt_ids: Token ids.
            params: Its seed must be set.
            priority: Lower runs first.

        Raises:
            ValueError: This request cannot be served; others are not affected.
        """
        if request_id in self._pending:
            raise ValueError(f"request id {request_id!r} is already in use")
        if params.seed is None:
            raise ValueError("the request has no seed; set one, or draw one")
        check_words(params, self._words)
        bad: tuple[tuple[int, ...], ...] = ()
        if self._words is not None:
            bad = bad_words.token_sequences(params.bad_words, self._words)
        added: list[str] = []
        try:
            for index in range(params.n):
                name = f"{request_id}/{index}"
                one = self._one_choice(name, prompt_ids, params, priority, index)
                self._engine.add(dataclasses.replace(one, bad_tokens=bad))
                added.append(name)
        except ValueError:
            for name in added:
                self._engine.abort(name)
            raise
        self._owners.update({name: (request_id, i) for i, name in enumerate(added)})
        self._pending[request_id] = _Pending(
            prompt_ids=tuple(prompt_ids),
            choices=[_TextChoice(i, params, self._words, prompt_ids) for i in range(params.n)],
            wants_prompt_logprobs=params.prompt_logprobs is not None,
        )

    def _one_choice(
        self,
        name: str,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        priority: int,
        index: int,
    ) -> request_lib.Request:
        assert params.seed is not None
        only_first = params.prompt_logprobs if index == 0 else None
        return request_lib.Request(
            request_id=name,
            prompt_ids=prompt_ids,
            params=dataclasses.replace(
                params, n=1, seed=choice_seed(params.seed, index), prompt_logprobs=only_first
            ),
            priority=priority,
        )

    def abort(self, request_id: str) -> None:
        """Drops a request; nothing more is reported of it."""
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return
        for choice in pending.choices:
            name = f"{request_id}/{choice.index}"
            self._owners.pop(name, None)
            self._engine.abort(name)

    def step(self) -> request_lib.StepResult:
        """Runs one step of the engine; what it finished, in order."""
        scored: list[request_lib.ScoredPrompt] = []
        deltas: list[request_lib.Delta] = []
        completions = []
        started_s: dict[str, float] = {}
        for update in self._engine.step():
            owner = self._owners.get(update.request_id)
            if owner is None:
                continue
            request_id, index = owner
            pending = self._pending[request_id]
            if update.error is not None:
                self.abort(request_id)
                completions.append(
                    request_lib.Completion(
                        request_id=request_id,
                        prompt_ids=pending.prompt_ids,
                        choices=(),
                        error=update.error,
                    )
                )
                continue
            if update.started_s is not None:
                started_s[request_id] = min(
                    update.started_s, started_s.get(request_id, update.started_s)
                )
            pending.prompt_logprobs.extend(update.prompt_logprobs)
            if update.prompt_logprobs and pending.is_scored:
                scored.append(
                    request_lib.ScoredPrompt(
                        request_id=request_id, prompt_logprobs=tuple(pending.prompt_logprobs)
                    )
                )
            if update.token_ids:
                deltas.append(self._take(request_id, pending.choices[index], update))
            done = self._try_complete(request_id, pending)
            if done is not None:
                completions.append(done)
        return request_lib.StepResult(
            scored=tuple(scored),
            deltas=tuple(deltas),
            completions=tuple(completions),
            started_s=started_s,
        )

    def _take(
        self, request_id: str, choice: _TextChoice, update: request_lib.RequestUpdate
    ) -> request_lib.Delta:
        delta = dataclasses.replace(choice.take(update), request_id=request_id)
        if delta.finish_reason is not None:
            del self._owners[update.request_id]
            if update.finish_reason is None:  # a stop string, of which the engine knows nothing
                self._engine.abort(update.request_id, output_len=choice.num_tokens)
        return delta

    def _try_complete(self, request_id: str, pending: _Pending) -> request_lib.Completion | None:
        choices = [text.choice for text in pending.choices]
        finished = tuple(choice for choice in choices if choice is not None)
        if len(finished) < len(choices):
            return None
        del self._pending[request_id]
        return request_lib.Completion(
            request_id=request_id,
            prompt_ids=pending.prompt_ids,
            choices=finished,
            prompt_logprobs=tuple(pending.prompt_logprobs)
            if pending.wants_prompt_logprobs
            else None,
        )


def check_words(params: request_lib.SamplingParams, words: tokenizer.Tokenizer | None) -> None:
    """Refuses stop strings and bad words where there is no text to find them in.

    Raises:
        ValueError: There are some, and no tokenizer.
    """
    if params.stop and words is None:
        raise ValueError("stop strings need a tokenizer, and this model has none")
    if params.bad_words and words is None:
        raise ValueError("bad_words needs a tokenizer, and this model has none")


def choice_seed(seed: int, index: int) -> int:
    """Seed of one choice: the request's own for the first, others derived from it."""
    if index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
