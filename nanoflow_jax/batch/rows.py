"""What one line of the input asks for.

A line is a row of OpenAI's batch format, `{"custom_id", "method", "url", "body"}`, or short: the
body alone, `{"prompt": ...}` or `{"messages": ...}`, with or without a `custom_id`.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from nanoflow_jax.batch import source
from nanoflow_jax.openai import requests
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.tokenizer import tool_formats

_ENVELOPE = ("custom_id", "method", "url", "body")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line that was understood.

    Attributes:
        number: Of the line, from 0: the row's identity.
        custom_id: The user's name for it; `row-NUMBER` if it has none.
        request: What it asks.
        seeds: One for each prompt.
    """

    number: int
    custom_id: str
    request: requests.ApiRequest
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadRow:
    """A line that cannot be served, and why."""

    number: int
    custom_id: str
    error: ApiError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a row that does not say gets.

    Attributes:
        sampling: Fields of SamplingParams.
        seed: Of the job: rows without a seed get one from it and their number.
    """

    sampling: Mapping[str, Any]
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accepts:
    """Which rows a job serves.

    Attributes:
        endpoint: Rows for another one fail.
        models: Rows that name another model fail.
    """

    endpoint: requests.Endpoint
    models: frozenset[str]

    def check(self, request: requests.ApiRequest) -> None:
        """Raises ApiError for a request that is not served."""
        if request.endpoint is not self.endpoint:
            raise ApiError(
                f"the row is for {request.endpoint} and the batch for {self.endpoint}; make a "
                "batch for each endpoint",
                param="url",
                code="invalid_url",
            )
        if request.model is not None and request.model not in self.models:
            raise ApiError(
                f"the model {request.model!r:.80} is not served here; use one of "
                f"{', '.join(sorted(self.models))}",
                param="model",
                code="model_not_found",
                status_code=404,
            )


def read(
    number: int,
    data: bytes,
    defaults: Defaults,
    *,
    repeats: int | None = None,
    accepts: Accepts | None = None,
    tool_style: tool_formats.ToolStyle | None = None,
) -> Row | BadRow:
    """Reads a line.

    Args:
        number: Of the line, from 0.
        data: Its bytes.
        defaults: For what it leaves out.
        repeats: The line that had the same custom_id before, if there is one.
        accepts: Which rows are served; None for all.
        tool_style: How the model calls tools; without it rows with tools are refused.
    """
    custom_id = f"row-{number}"
    try:
        found = source.parse_object(data, line=number)
        if isinstance(found.get("custom_id"), str):
            custom_id = found["custom_id"]
        if repeats is not None:
            raise ApiError(
                f"custom_id {custom_id!r} was used before, in line {repeats + 1}; "
                "give each row its own",
                param="custom_id",
                code="duplicate_custom_id",
            )
        endpoint, body = _body(found)
        request = requests.parse(endpoint, body, defaults.sampling, tool_style=tool_style)
        if accepts is not None:
            accepts.check(request)
        if request.stream:
            raise ApiError(
                "a batch job writes whole answers; leave out stream, or set it to false",
                param="stream",
                code="unsupported_parameter",
            )
    except ApiError as error:
        return BadRow(number=number, custom_id=custom_id, error=error)
    given = request.params.seed
    count = len(request.prompts) or 1
    return Row(
        number=number,
        custom_id=custom_id,
        request=request,
        seeds=tuple(
            given if given is not None else row_seed(defaults.seed, number, prompt)
            for prompt in range(count)
        ),
    )


def row_seed(job_seed: int, number: int, prompt: int) -> int:
    """The seed of a prompt of a row that has none: the same whenever and wherever it runs."""
    digest = hashlib.sha256(f"row {job_seed}/{number}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _body(found: dict[str, Any]) -> tuple[requests.Endpoint, Mapping[str, Any]]:
    custom_id = found.get("custom_id")
    if custom_id is not None and not (isinstance(custom_id, str) and custom_id):
        raise ApiError(f"custom_id={custom_id!r:.80} is not text", param="custom_id")
    if not any(name in found for name in ("method", "url", "body")):
        return _short(found)
    for name in found:
        if name not in _ENVELOPE:
            raise ApiError(
                f"{name!r:.80} is no field of a batch row, which has custom_id, method, url and "
                "body",
                param=name[:80],
                code="unknown_parameter",
            )
    for name in _ENVELOPE:
        if found.get(name) is None:
            raise ApiError(f"{name} is missing from the row", param=name)
    if found["method"] != "POST":
        raise ApiError(f"method={found['method']!r:.80} is not 'POST'", param="method")
    if found["url"] not in list(requests.Endpoint):
        raise ApiError(
            f"url={found['url']!r:.80} is not one of {', '.join(requests.Endpoint)}",
            param="url",
            code="invalid_url",
        )
    if not isinstance(found["body"], dict):
        raise ApiError(f"body={found['body']!r:.80} is not an object", param="body")
    return requests.Endpoint(found["url"]), found["body"]


def _short(found: dict[str, Any]) -> tuple[requests.Endpoint, Mapping[str, Any]]:
    body = {name: value for name, value in found.items() if name != "custom_id"}
    if ("prompt" in body) == ("messages" in body):
        raise ApiError(
            "a row has either a prompt, or messages, or the fields custom_id, method, url and body",
            param="prompt",
        )
    is_chat = "messages" in body
    return requests.Endpoint.CHAT if is_chat else requests.Endpoint.COMPLETIONS, body
