"""Serves the page at `/`: its files, and the headers that keep text from becoming script.

A key covers the page like every route: browsers ask for it when they open the page, and send it
with all that the page asks for.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from importlib import resources

import fastapi

# The page is served from the package and asks for nothing elsewhere. Trusted types make a browser
# refuse to parse text as HTML, whatever the scripts do.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

PAGE_HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
_FILES: Mapping[str, str] = {
    "/": "index.html",
    **{
        f"/page/{name}": name
        for name in (
            "page.js",
            "api.js",
            "charts.js",
            "dom.js",
            "engine.js",
            "playground.js",
            "rates.js",
            "page.css",
            "icon.svg",
        )
    },
}

PAGE_PATHS = frozenset(_FILES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PageFile:
    """A file of the page, as it is sent."""

    data: bytes
    media_type: str
    etag: str


def make_router() -> fastapi.APIRouter:
    """Routes of the page's files, `PAGE_PATHS`, by GET and HEAD, outside the OpenAPI schema."""
    router = fastapi.APIRouter(include_in_schema=False)
    for path, name in _FILES.items():
        _add(router, path, _read(name))
    return router


def _read(name: str) -> _PageFile:
    data = resources.files("nanoflow_jax.serve").joinpath("page", name).read_bytes()
    return _PageFile(
        data=data,
        media_type=_TYPES[name.rpartition(".")[2]],
        etag=f'"{hashlib.sha256(data).hexdigest()[:32]}"',
    )


def _add(router: fastapi.APIRouter, path: str, file: _PageFile) -> None:
    async def send(request: fastapi.Request) -> fastapi.Response:
        headers = {**PAGE_HEADERS, "ETag": file.etag}
        if file.etag in _etags(request.headers.get("if-none-match", "")):
            return fastapi.Response(status_code=304, headers=headers)
        return fastapi.Response(file.data, media_type=file.media_type, headers=headers)

    router.add_api_route(path, send, methods=["GET", "HEAD"], response_class=fastapi.Response)


def _etags(header: str) -> set[str]:
    """The tags of If-None-Match; a proxy that compressed the file may have made them weak."""
    return {tag.strip().removeprefix("W/") for tag in header.split(",")}
