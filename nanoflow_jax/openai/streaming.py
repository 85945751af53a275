"""Writes a streamed answer piece by piece, in the form that OpenAI's clients read."""

from collections.abc import Sequence
from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import responses, tool_parser, tools
from nanoflow_jax.openai.requests import ApiRequest, Endpoint

DONE = b"data: [DONE]\n\n"


class StreamWriter:
    """The pieces of one answer.

    Invariant: the pieces of a choice, put together, are the choice of the answer not streamed.
    """

    def __init__(
        self,
        writer: responses.Writer,
        request: ApiRequest,
        head: responses.Head,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        """Begins an answer.

        Args:
            writer: Of the model.
            request: What was asked.
            head: Identity of the answer.
            prompts: Token ids of each prompt.
        """
        self._writer = writer
        self._request = request
        self._prompts = prompts
        self._is_chat = request.endpoint is Endpoint.CHAT
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{head.response_id}",
            "object": kind,
            "created": head.created,
            "model": head.model,
        }
        self._waiting: dict[int, _Waiting] = {}
        self._begun: set[int] = set()
        self._scores: dict[int, Sequence[request_lib.TokenLogprobs | None]] = {}
        self._held: dict[int, list[request_lib.Delta]] = {}
        self._response_id = head.response_id
        self._parsers: dict[int, tool_parser.ToolParser] = {}
        self._output_tokens = 0

    def begin(self) -> list[dict[str, Any]]:
        """What can be said before the first token: who speaks, in a chat."""
        if not self._is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(self._chat_choice(i, delta)) for i in range(self._request.params.n)]

    def scored(self, number: int, scored: request_lib.ScoredPrompt) -> list[dict[str, Any]]:
        """Takes the log-probabilities of a prompt."""
        self._scores[number] = scored.prompt_logprobs
        return [
            piece for delta in self._held.pop(number, ()) for piece in self.delta(number, delta)
        ]

    def delta(self, number: int, delta: request_lib.Delta) -> list[dict[str, Any]]:
        """The pieces for what was added to a choice of a prompt."""
        wants_scores = self._request.params.prompt_logprobs is not None
        if wants_scores and number not in self._scores and len(self._prompts[number]) > 1:
            self._held.setdefault(number, []).append(delta)
            return []
        index = number * self._request.params.n + delta.index
        self._output_tokens += len(delta.token_ids)
        is_first = index not in self._begun
        self._begun.add(index)
        if self._is_chat:
            return self._chat_delta(index, number, delta, is_first=is_first)
        return self._completion_delta(index, number, delta, is_first=is_first)

    def usage(self) -> list[dict[str, Any]]:
        """The last piece, where asked for."""
        if not self._request.include_usage:
            return []
        return [{**self._head, "choices": [], "usage": self._usage()}]

    def _usage(self) -> dict[str, Any]:
        return responses.usage(sum(map(len, self._prompts)), self._output_tokens)

    def _chunk(self, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        shown = {**self._head, "choices": [choice], **more}
        if self._request.usage_in_each:
            shown["usage"] = self._usage()
        elif self._request.include_usage:
            shown["usage"] = None
        return shown

    def _completion_delta(
        self, index: int, number: int, delta: request_lib.Delta, *, is_first: bool
    ) -> list[dict[str, Any]]:
        request, show = self._request, self._request.show
        prompt_ids = self._prompts[number]
        echoed = self._writer.echoed(request, number) if is_first and show.echo else ""
        token_ids, logprobs = delta.token_ids, None
        if request.params.logprobs is not None:
            token_ids, logprobs = self._logprobs(index, number, delta, echoed, is_first=is_first)
        has_news = is_first or delta.text or delta.finish_reason is not None
        if not (has_news or logprobs or request.usage_in_each or (show.token_ids and token_ids)):
            return []
        shown: dict[str, Any] = {"index": index, "text": echoed + delta.text, "logprobs": logprobs}
        shown["finish_reason"] = _reason(delta)
        shown["stop_reason"] = delta.stop_reason
        if is_first and show.prompt_logprobs is not None:
            scores = self._scores.get(number, (None,))
            shown["prompt_logprobs"] = self._writer.prompt_logprobs(request, scores)
        if show.token_ids:
            if is_first:
                shown["prompt_token_ids"] = list(prompt_ids)
            shown["token_ids"] = list(token_ids)
        return [self._chunk(shown)]

    def _logprobs(
        self, index: int, number: int, delta: request_lib.Delta, echoed: str, *, is_first: bool
    ) -> tuple[tuple[int, ...], dict[str, Any] | None]:
        """New tokens of a completion whose place is certain, and their `logprobs` if any are."""
        request, prompt_ids = self._request, self._prompts[number]
        entries: list[tuple[int, request_lib.TokenLogprobs | None]] = []
        offsets: list[int] = []
        if is_first and request.show.echo:
            scores = self._scores.get(number, (None,) * len(prompt_ids))
            entries += zip(prompt_ids, scores, strict=True)
            offsets += self._writer.prompt_offsets(request, number, prompt_ids)
        if is_first:
            counter = self._writer.offsets(request, prompt_ids, start=len(echoed))
            self._waiting[index] = _Waiting(counter, len(echoed))
        certain = self._waiting[index].take(delta)
        entries += [(entry.token_id, entry) for entry, _ in certain]
        offsets += [offset for _, offset in certain]
        token_ids = tuple(entry.token_id for entry, _ in certain)
        if not entries:
            return token_ids, None
        return token_ids, self._writer.token_logprobs(request, entries, offsets)

    def _chat_delta(
        self, index: int, number: int, delta: request_lib.Delta, *, is_first: bool
    ) -> list[dict[str, Any]]:
        request, show = self._request, self._request.show
        more: dict[str, Any] = {}
        is_first = is_first and len(self._begun) == 1  # these are of the answer, not of a choice
        if is_first and show.prompt_logprobs is not None:
            scores = self._scores.get(number, (None,))
            more["prompt_logprobs"] = self._writer.prompt_logprobs(request, scores)
        if is_first and show.token_ids:
            more["prompt_token_ids"] = list(self._prompts[number])
        said = self._said(index, delta)
        has_news = more or said or delta.finish_reason is not None
        shows_tokens = request.params.logprobs is not None or show.token_ids
        if not (has_news or shows_tokens or request.usage_in_each):
            return []  # half a character is nothing to see
        choices = [self._chat_choice(index, part) for part in said or [{}]]
        first, last = choices[0], choices[-1]
        if request.params.logprobs is not None:
            first["logprobs"] = self._writer.chat_logprobs(request, delta.logprobs)
        if show.token_ids:
            first["token_ids"] = list(delta.token_ids)
        last["finish_reason"] = self._chat_reason(index, delta)
        last["stop_reason"] = delta.stop_reason
        return [self._chunk(first, **more), *map(self._chunk, choices[1:])]

    def _said(self, index: int, delta: request_lib.Delta) -> list[dict[str, Any]]:
        """What new text is to a chat: content, or parts of calls."""
        if self._request.tools is None:
            return [{"content": delta.text}] if delta.text else []
        parser = self._parser(index)
        pieces = parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.finish()
        return [tools.delta(piece) for piece in pieces]

    def _parser(self, index: int) -> tool_parser.ToolParser:
        assert self._request.tools is not None
        if index not in self._parsers:
            self._parsers[index] = self._request.tools.parser(self._response_id, index)
        return self._parsers[index]

    def _chat_reason(self, index: int, delta: request_lib.Delta) -> str | None:
        if delta.finish_reason is None or self._request.tools is None:
            return _reason(delta)
        return tools.finish_reason(delta.finish_reason, has_calls=self._parser(index).num_calls > 0)

    @staticmethod
    def _chat_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class _Waiting:
    """Tokens of one choice of a completion until it is certain where in the text they begin.

    A stop string may still cut text that is held back; a token that would begin there begins at
    the end of the text then.
    """

    def __init__(self, counter: responses.Offsets, start: int) -> None:
        self._counter = counter
        self._text_end = start
        self._tokens: list[tuple[request_lib.TokenLogprobs, int]] = []

    def take(self, delta: request_lib.Delta) -> list[tuple[request_lib.TokenLogprobs, int]]:
        """Adds new tokens; those that are certain now, each with its offset."""
        self._text_end += len(delta.text)
        offsets = self._counter.take(delta.token_ids, None)
        self._tokens += zip(delta.logprobs, offsets, strict=True)
        end, found = self._text_end, self._tokens
        if delta.finish_reason is None:
            found = [(entry, offset) for entry, offset in self._tokens if offset <= end]
        self._tokens = self._tokens[len(found) :]
        return [(entry, min(offset, end)) for entry, offset in found]


def _reason(delta: request_lib.Delta) -> str | None:
    return None if delta.finish_reason is None else str(delta.finish_reason)
