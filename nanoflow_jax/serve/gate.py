"""What every request passes before any route sees it: host, origin, key, and the access log."""

import ipaddress
import logging
import time
import urllib.parse
from collections.abc import Iterable

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.serve import log
from nanoflow_jax.serve.keys import ApiKeys

# Answers whether the server lives, to those who watch it; says nothing else.
OPEN_PATHS = frozenset({"/health"})
# The page asks every second: such lines would bury the others.
_QUIET_PATHS = frozenset({"/page/stats"})
_LOCAL_NAMES = frozenset({"localhost"})


class Gate:
    """ASGI middleware around the whole application; what it does not know it refuses."""

    def __init__(self, app: ASGIApp, *, keys: ApiKeys, allowed_hosts: Iterable[str]) -> None:
        """Wraps an application.

        Args:
            app: What is behind the gate.
            keys: Who may come in.
            allowed_hosts: Names under which clients may call, beside local ones and addresses.
        """
        self._app = app
        self._keys = keys
        self._hosts = _LOCAL_NAMES | {host.strip().lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, noting_send)
            else:
                await _refuse(refusal, noting_send)
        finally:
            client = (scope.get("client") or ("?", 0))[0]
            is_quiet = scope["path"] in _QUIET_PATHS and status == 200
            log.ACCESS.log(
                logging.DEBUG if is_quiet else logging.INFO,
                "%s %s %.200s %d %.0f ms",
                client,
                scope["method"],
                ascii(scope["path"])[1:-1],
                status,
                (time.monotonic() - began) * 1e3,
            )

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in headers and name in (b"host", b"authorization", b"origin"):
                return ApiError(f"the header {name.decode()} stands there twice")
            headers[name] = value
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self._knows_host(host):
            # A page of a foreign site whose name was pointed at this machine (DNS rebinding).
            return ApiError(
                f"the server is not known as {host!r:.100}; the one who runs it can add the name "
                "to --allowed_hosts",
                status_code=403,
                code="unknown_host",
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and not _is_page_of(origin, host):
            return ApiError(
                f"pages of {origin!r:.100} may not use this server",
                status_code=403,
                code="foreign_origin",
            )
        if scope["path"] not in OPEN_PATHS and not self._keys.open_to(
            headers.get(b"authorization")
        ):
            return ApiError(
                "this server needs an API key: send the header 'Authorization: Bearer KEY'; in a "
                "browser, load the page again and give the key as password, with any user name",
                status_code=401,
                code="invalid_api_key",
            )
        return None

    def _knows_host(self, host: str) -> bool:
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
            if name in self._hosts:
                return True
            # A plain address cannot be pointed elsewhere.
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _is_page_of(origin: str, host: str) -> bool:
    try:
        return urllib.parse.urlsplit(origin).netloc == host
    except ValueError:  # such as a bracket that is never closed
        return False


async def _refuse(error: ApiError, send: Send) -> None:
    body = msgspec.json.encode(error.body())
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if error.status_code == 401:
        # Basic, with the key as password, is what lets a browser open the page.
        headers.append((b"www-authenticate", b'Basic realm="nanoflow_jax", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": error.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
