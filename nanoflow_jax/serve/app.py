"""Puts the application together: gate, routes, and errors in OpenAI's form."""

import logging
from collections.abc import Sequence
from typing import Any

import fastapi
import starlette.exceptions
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match

from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.serve import completions, gate, keys, routes
from nanoflow_jax.serve import service as service_lib

_LOG = logging.getLogger(__name__)
# What a client should wait before it tries again.
_RETRY_AFTER_S = {429: "1", 503: "2"}


def build_app(
    service: service_lib.Service,
    *,
    api_keys: keys.ApiKeys,
    more: Sequence[fastapi.APIRouter] = (),
) -> gate.Gate:
    """The ASGI application of a server.

    Args:
        service: What its routes share.
        api_keys: Who may use it.
        more: Routers of other parts: page, files, batches.
    """
    app = _App(
        title="nanoflow_jax",
        description="OpenAI-compatible server of one model.",
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.needs_key = api_keys.are_needed
    for router in (routes.router(service, needs_key=api_keys.are_needed), *more):
        app.include_router(router)
        app.known_routes += router.routes
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(starlette.exceptions.HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(RecursionError, _on_deep_body)
    app.add_exception_handler(Exception, _on_crash)
    names = [name for name in service.section.allowed_hosts.split(",") if name.strip()]
    return gate.Gate(app, keys=api_keys, allowed_hosts=[*names, service.section.host])


class _App(fastapi.FastAPI):
    """An application that describes itself as it is behind its gate.

    Attributes:
        needs_key: Whether the gate asks for a key.
        known_routes: Those of its routers.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.needs_key = False
        self.known_routes: list[BaseRoute] = []

    def openapi(self) -> dict[str, Any]:
        """What /openapi.json says."""
        found = super().openapi()
        for path, operations in found["paths"].items():
            for operation in operations.values():
                # FastAPI's own form of refusal, which `_on_validation_error` replaces.
                operation["responses"].pop("422", None)
                if self.needs_key and path not in gate.OPEN_PATHS:
                    operation["security"] = [{"key": []}]
        schemes = {"key": {"type": "http", "scheme": "bearer"}} if self.needs_key else {}
        found.setdefault("components", {})["securitySchemes"] = schemes
        return found


def error_response(error: ApiError) -> Response:
    """The answer to a request that cannot be served."""
    headers = {}
    if error.status_code in _RETRY_AFTER_S:
        headers["retry-after"] = _RETRY_AFTER_S[error.status_code]
    return completions.JsonResponse(error.body(), status_code=error.status_code, headers=headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, starlette.exceptions.HTTPException)
    made = error_response(
        ApiError(
            f"{request.method} {request.url.path:.200}: {error.detail}",
            code="not_found" if error.status_code == 404 else "bad_request",
            status_code=error.status_code,
        )
    )
    made.headers.update(error.headers or {})
    if error.status_code == 405:
        made.headers["allow"] = ", ".join(sorted(_methods(request)))
    return made


def _methods(request: Request) -> set[str]:
    """What can be done with a path; Starlette names only the methods of its first route."""
    routes_of_app = request.app.known_routes
    matching = (r for r in routes_of_app if r.matches(request.scope)[0] is not Match.NONE)
    return {method for route in matching for method in getattr(route, "methods", None) or ()}


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0]) if error.errors() else {}
    place = ".".join(map(str, first.get("loc", ())))
    return error_response(ApiError(f"{place}: {first.get('msg', 'is not valid')}", param=place))


async def _on_deep_body(request: Request, error: Exception) -> Response:
    """A body that could just be read, and not be written into the message that refuses it."""
    return error_response(ApiError("the body is nested too deeply", code="invalid_json"))


async def _on_crash(request: Request, error: Exception) -> Response:
    # Starlette raises the error again, and uvicorn logs where it came from.
    _LOG.error("%s %.200s failed", request.method, ascii(request.url.path)[1:-1])
    return error_response(
        ApiError("the server failed on this request", code="internal", status_code=500)
    )
