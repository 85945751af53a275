"""Writes finished requests as OpenAI's completion and chat.completion objects.

Beyond OpenAI, with vLLM's names: `stop_reason`, and where asked for `token_ids`,
`prompt_token_ids` and `prompt_logprobs`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import tools as tools_lib
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.openai.requests import ApiRequest, Endpoint
from nanoflow_jax.openai.token_texts import TokenTexts
from nanoflow_jax.tokenizer import detokenizer, tokenizer

# JSON has no infinity; vLLM writes the same number.
_LEAST_LOGPROB = -9999.0

_PromptLogprobs = Sequence[request_lib.TokenLogprobs | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """The fields of an answer that come from the server, not from the model.

    Attributes:
        response_id: The answer's own id.
        created: Seconds since 1970.
        model: The model that answered.
    """

    response_id: str
    created: int
    model: str


class Writer:
    """Writes answers of one model."""

    def __init__(self, words: tokenizer.Tokenizer | None) -> None:
        """Wrap the model's tokenizer, if it has one."""
        self._words = words
        self._texts = TokenTexts(words)

    def body(
        self, request: ApiRequest, completions: Sequence[request_lib.Completion], head: Head
    ) -> dict[str, Any]:
        """The answer to a request.

        Args:
            request: What was asked.
            completions: What the generator made of it, one per prompt, in order.
            head: Identity of the answer.

        Raises:
            ApiError: A prompt failed while it ran.
        """
        for completion in completions:
            if completion.error is not None:
                raise failed(completion.error)
        if request.endpoint is Endpoint.COMPLETIONS:
            return self._completion(request, completions, head)
        return self._chat(request, completions[0], head)

    def _completion(
        self, request: ApiRequest, completions: Sequence[request_lib.Completion], head: Head
    ) -> dict[str, Any]:
        return {
            "id": f"cmpl-{head.response_id}",
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": [
                {
                    "index": i * request.params.n + choice.index,
                    **self._completion_choice(request, i, completion, choice),
                }
                for i, completion in enumerate(completions)
                for choice in completion.choices
            ],
            "usage": _usage(completions),
        }

    def _completion_choice(
        self,
        request: ApiRequest,
        number: int,
        completion: request_lib.Completion,
        choice: request_lib.Choice,
    ) -> dict[str, Any]:
        prompt = self.echoed(request, number) if request.show.echo else ""
        shown: dict[str, Any] = {
            "text": prompt + choice.text,
            "logprobs": self._completion_logprobs(request, number, completion, choice),
            **_ending(choice),
        }
        if request.show.prompt_logprobs is not None:
            shown["prompt_logprobs"] = self.prompt_logprobs(request, completion.prompt_logprobs)
        if request.show.token_ids:
            shown["prompt_token_ids"] = list(completion.prompt_ids)
            shown["token_ids"] = list(choice.token_ids)
        return shown

    def echoed(self, request: ApiRequest, number: int) -> str:
        """The text of a prompt, as an answer repeats it."""
        prompt = request.prompts[number]
        if isinstance(prompt, str):
            return prompt
        if self._words is None:
            return ""
        skip = request.params.skip_special_tokens
        return self._words.decode(prompt, skip_special_tokens=skip)

    def _completion_logprobs(
        self,
        request: ApiRequest,
        number: int,
        completion: request_lib.Completion,
        choice: request_lib.Choice,
    ) -> dict[str, Any] | None:
        if choice.logprobs is None or request.params.logprobs is None:
            return None
        entries: list[tuple[int, request_lib.TokenLogprobs | None]] = []
        offsets: list[int] = []
        start = 0
        if request.show.echo:
            given: _PromptLogprobs = completion.prompt_logprobs or ()
            entries += zip(completion.prompt_ids, given, strict=True)
            offsets += self.prompt_offsets(request, number, completion.prompt_ids)
            start = len(self.echoed(request, number))
        entries += zip(choice.token_ids, choice.logprobs, strict=True)
        counter = self.offsets(request, completion.prompt_ids, start=start)
        offsets += counter.take(choice.token_ids, start + len(choice.text))
        return self.token_logprobs(request, entries, offsets)

    def token_logprobs(
        self,
        request: ApiRequest,
        entries: Sequence[tuple[int, request_lib.TokenLogprobs | None]],
        offsets: Sequence[int],
    ) -> dict[str, Any]:
        """The `logprobs` of a completion's tokens, or of some of them."""
        count = request.params.logprobs
        return {
            "tokens": [self._text(request, token) for token, _ in entries],
            "token_logprobs": [None if e is None else _finite(e.logprob) for _, e in entries],
            "top_logprobs": [
                None if e is None else self._by_text(request, [*e.top[:count], _itself(e)])
                for _, e in entries
            ],
            "text_offset": list(offsets),
        }

    def _by_text(
        self, request: ApiRequest, ranked: Iterable[tuple[int, float]]
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, value in ranked:
            # Two tokens may be spelled alike: the likelier stays.
            found.setdefault(self._text(request, token), _finite(value))
        return found

    def offsets(self, request: ApiRequest, before: Sequence[int], *, start: int = 0) -> "Offsets":
        """A counter of where tokens begin in a text that is shown.

        Args:
            request: Says whether special tokens are text.
            before: Tokens before the first one that is counted.
            start: Where that one begins.
        """
        if self._words is None:
            return Offsets(None, start)
        skip = request.params.skip_special_tokens
        stream = detokenizer.continuing(self._words, before, skip_special_tokens=skip)
        return Offsets(stream, start)

    def prompt_offsets(
        self, request: ApiRequest, number: int, prompt_ids: Sequence[int]
    ) -> list[int]:
        """Where the tokens of a prompt begin in its echo."""
        echoed = self.echoed(request, number)
        if self._words is None or not isinstance(request.prompts[number], str):
            return self.offsets(request, ()).take(prompt_ids, len(echoed))
        # What the tokenizer puts before a text is not echoed; the text itself is, all of it.
        whole = self._words.decode(prompt_ids, skip_special_tokens=False)
        stream = detokenizer.Detokenizer(self._words, skip_special_tokens=False)
        found = Offsets(stream, len(echoed) - len(whole)).take(prompt_ids, len(echoed))
        return [max(0, offset) for offset in found]

    def _chat(
        self, request: ApiRequest, completion: request_lib.Completion, head: Head
    ) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "id": f"chatcmpl-{head.response_id}",
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": [self._chat_choice(request, choice, head) for choice in completion.choices],
            "usage": _usage([completion]),
        }
        if request.show.prompt_logprobs is not None:
            shown["prompt_logprobs"] = self.prompt_logprobs(request, completion.prompt_logprobs)
        if request.show.token_ids:
            shown["prompt_token_ids"] = list(completion.prompt_ids)
        return shown

    def _chat_choice(
        self, request: ApiRequest, choice: request_lib.Choice, head: Head
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"content": choice.text}
        if request.tools is not None:
            message = tools_lib.message_fields(
                request.tools, choice.text, head.response_id, choice.index
            )
        shown: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", **message, "refusal": None},
            "logprobs": None,
            **_ending(choice),
        }
        if "tool_calls" in message:
            shown["finish_reason"] = tools_lib.finish_reason(choice.finish_reason, has_calls=True)
        if choice.logprobs is not None:
            shown["logprobs"] = self.chat_logprobs(request, choice.logprobs)
        if request.show.token_ids:
            shown["token_ids"] = list(choice.token_ids)
        return shown

    def chat_logprobs(
        self, request: ApiRequest, entries: Iterable[request_lib.TokenLogprobs]
    ) -> dict[str, Any]:
        """The `logprobs` of a chat's tokens, or of some of them."""
        return {
            "content": [self._chat_entry(request, entry) for entry in entries],
            "refusal": None,
        }

    def _chat_entry(self, request: ApiRequest, entry: request_lib.TokenLogprobs) -> dict[str, Any]:
        top = entry.top[: request.params.logprobs]
        return {
            **self._chat_token(request, entry.token_id, entry.logprob),
            "top_logprobs": [self._chat_token(request, token, value) for token, value in top],
        }

    def _chat_token(self, request: ApiRequest, token: int, logprob: float) -> dict[str, Any]:
        data = self._texts.data(token)
        return {
            "token": self._text(request, token),
            "logprob": _finite(logprob),
            "bytes": None if data is None else list(data),
        }

    def prompt_logprobs(
        self, request: ApiRequest, entries: _PromptLogprobs | None
    ) -> list[dict[str, Any] | None]:
        """In vLLM's form: by token id, the token that stands there first."""
        count = request.show.prompt_logprobs
        found: list[dict[str, Any] | None] = []
        for entry in entries or ():
            if entry is None:
                found.append(None)
                continue
            ranks = {entry.token_id: entry.rank}
            values = dict([_itself(entry), *entry.top[:count]])
            for rank, (token, _) in enumerate(entry.top[:count], start=1):
                ranks.setdefault(token, rank)
            found.append(
                {
                    str(token): {
                        "logprob": _finite(value),
                        "rank": ranks[token],
                        "decoded_token": self._text(request, token),
                    }
                    for token, value in values.items()
                }
            )
        return found

    def _text(self, request: ApiRequest, token: int) -> str:
        return self._texts.text(token, as_id=request.show.tokens_as_ids)


def _ending(choice: request_lib.Choice) -> dict[str, Any]:
    return {"finish_reason": str(choice.finish_reason), "stop_reason": choice.stop_reason}


def failed(message: str) -> ApiError:
    """What is said of a request that failed while it ran, by its own fault or by ours."""
    is_ours = not message.startswith(request_lib.REQUEST_ERRORS)
    return ApiError(message, code="generation_failed", status_code=500 if is_ours else 400)


def usage(prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    """The `usage` of an answer; no prompt token is taken from a cache of earlier prompts yet."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _usage(completions: Sequence[request_lib.Completion]) -> dict[str, Any]:
    return usage(
        sum(len(completion.prompt_ids) for completion in completions),
        sum(len(c.token_ids) for completion in completions for c in completion.choices),
    )


class Offsets:
    """Counts where tokens begin in a text that is shown."""

    def __init__(self, stream: detokenizer.Detokenizer | None, start: int) -> None:
        """Begin at character `start`; without a detokenizer tokens have no text."""
        self._stream = stream
        self._start = start

    def take(self, token_ids: Iterable[int], end: int | None) -> list[int]:
        """Where each of the next tokens begins; none beyond `end`, where a text was cut."""
        found = []
        for token in token_ids:
            found.append(self._start if end is None else min(self._start, end))
            if self._stream is not None:
                self._start += len(self._stream.push(token))
        return found


def _itself(entry: request_lib.TokenLogprobs) -> tuple[int, float]:
    return entry.token_id, entry.logprob


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
