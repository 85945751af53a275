"""Reads the bodies of requests, of bounded size and in bounded time."""

import asyncio
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from nanoflow_jax.openai.errors import ApiError


async def read_object(request: Request, *, most_bytes: int, timeout_s: float) -> dict[str, Any]:
    """The JSON object that a request sends.

    Args:
        request: Its body is read from the connection.
        most_bytes: Of the body.
        timeout_s: For all of it to arrive.

    Raises:
        ApiError: The body is too large (413), too slow (408) or no JSON object (400).
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind.lower() != "application/json":
        # Browsers send other kinds across origins without asking first.
        raise ApiError(
            f"the content type is {kind!r:.80}; send JSON with the header "
            "'Content-Type: application/json'",
            code="unsupported_media_type",
            status_code=415,
        )
    data = await read_bytes(request, most_bytes=most_bytes, timeout_s=timeout_s)
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise ApiError("the body is no JSON object", code="invalid_json")
    return found


async def read_bytes(request: Request, *, most_bytes: int, timeout_s: float) -> bytes:
    """The body of a request; see `read_object`."""
    too_large = ApiError(
        f"the body has more than {most_bytes} bytes",
        code="body_too_large",
        status_code=413,
    )
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most_bytes:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                found += part
                if len(found) > most_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(
            f"the body was not there after {timeout_s:g} s", code="timeout", status_code=408
        ) from error
    except ClientDisconnect as error:
        raise ApiError("the client is gone", status_code=400) from error
    return bytes(found)
