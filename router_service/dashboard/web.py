"""The page over HTTP: files of this package, and JSON that is read through a View. It only reads, and only for GET."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from knnmoe.client import MemoryNotFound, ServiceError, ServiceRefused
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router_service.cli.errors import admin_error
from router_service.dashboard.view import View

_STATIC = Path(__file__).with_name("static")
# Nothing but files of this package runs or is shown, in no other page's frame.
_HEADERS = {
    b"content-security-policy": b"default-src 'self'; base-uri 'none'; form-action 'none'; "
    b"frame-ancestors 'none'; object-src 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cache-control": b"no-store",
}
_LARGEST = 2**64


def application(view: View, host: str) -> Starlette:
    """The page of what `view` shows, at an address of this host, as in --dashboard."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        view.start()
        yield
        view.stop()

    def api(path: str, answer: Callable[[Request], Any]) -> Route:
        def endpoint(request: Request) -> Response:  # in a thread: it waits for the service
            return JSONResponse(answer(request))

        return Route(f"/api/{path}", endpoint)

    routes = [
        Route("/", lambda _: FileResponse(_STATIC / "index.html")),
        Mount("/static", StaticFiles(directory=_STATIC)),
        api("overview", lambda _: view.overview()),
        api("snapshots", lambda _: view.snapshots()),
        api("history", lambda request: view.history(_text(request, "memory"))),
        api("sources", lambda request: view.sources(_text(request, "memory"))),
        api("map", lambda request: view.map(*_layer(request))),
        api("recent", lambda request: view.recent(*_layer(request))),
        api("explain", lambda request: view.explain(*_layer(request), _number(request, "id"))),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guarded, host=host)],
        exception_handlers={ServiceError: _failed, BadQuery: _failed},
        lifespan=lifespan,
    )


class BadQuery(Exception):
    """A parameter that cannot be used."""


def _text(request: Request, name: str) -> str:
    if not (value := request.query_params.get(name, "")):
        raise BadQuery(f"{name}: got nothing, expected a name")
    return value


def _number(request: Request, name: str) -> int:
    value = request.query_params.get(name, "")
    if not (value.isascii() and value.isdigit()) or len(value) > 20 or int(value) >= _LARGEST:
        raise BadQuery(f"{name}: got {value[:50]!r}, expected a number")
    return int(value)


def _layer(request: Request) -> tuple[str, int]:
    layer = _number(request, "layer")
    if layer >= 2**32:
        raise BadQuery(f"layer: got {layer}, expected the number of a layer")
    return _text(request, "memory"), layer


async def _failed(_: Request, error: Exception) -> Response:
    status, said = 400, str(error)
    if isinstance(error, ServiceError):
        status = 422 if isinstance(error, ServiceRefused) else 503
        status, said = 404 if isinstance(error, MemoryNotFound) else status, str(admin_error(error))
    return JSONResponse({"error": said}, status)


class Guarded:
    """Answers GET for this page's own host, with headers that keep the page to itself.

    A name that another site's owner makes lead here (DNS rebinding) is refused, and so are requests that other sites'
    pages send.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = [pair for pair in message["headers"] if pair[0] not in _HEADERS]
                message["headers"] = [*given, *_HEADERS.items()]
            await send(message)

        app = self._refusal(scope) or self._app
        await app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_own_host(host, self._host):
            return PlainTextResponse(f"Host: got {host[:100]!r}, expected {self._host}", 421)
        is_foreign = headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site")
        if is_foreign and headers.get(b"sec-fetch-mode") != b"navigate":
            return PlainTextResponse("this page answers no other site's pages", 403)
        if scope["method"] != "GET":
            text = f"got {scope['method']}, expected GET: this page only reads"
            return PlainTextResponse(text, 405, {"allow": "GET"})
        return None


def is_own_host(header: str, host: str) -> bool:
    """Whether a Host header names an address that the page is served at, given the host of --dashboard.

    A loopback address has those of all loopback addresses and localhost; another one has any address, or its own name.
    """
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    own = host.strip("[]").lower()
    if _is_loopback(own):
        return _is_loopback(name)
    return name == own or name == "localhost" or _address(name) is not None


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return name == "localhost" if address is None else address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
