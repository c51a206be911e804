"""GET over HTTP for a few pages that are made when they are asked for: metrics and probes."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import urlsplit

from typing_extensions import override

log = logging.getLogger(__name__)

# Of the next bytes of a request, and connections at a time: then the one that has been open longest is ended.
_WITHIN_S, _MOST = 5.0, 16
TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Page:
    """One answer."""

    status: int
    body: bytes
    kind: str = TEXT


Pages = Mapping[str, Callable[[], Page]]


class PageServer(ThreadingHTTPServer):
    """Answers from start() to close(), in threads of its own."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, pages: Pages) -> None:
        """`listener` listens already; it is closed with the server."""
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.pages = listener, pages
        self._open: dict[socket.socket, None] = {}  # oldest first
        self._changing = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, name="http", daemon=True)

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def close(self) -> None:
        """Closing twice is allowed."""
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
        self.server_close()

    @override
    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changing:
            if len(self._open) >= _MOST:
                with suppress(OSError):  # it has left
                    next(iter(self._open)).shutdown(socket.SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    @override
    def shutdown_request(self, request: Any) -> None:
        with self._changing:
            self._open.pop(request, None)
        super().shutdown_request(request)

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("%s left before it had its answer", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _WITHIN_S
    server_version, sys_version = "knnmoe", ""

    def do_GET(self) -> None:
        """Any page."""
        pages = cast("PageServer", self.server).pages
        make = pages.get(urlsplit(self.path).path)
        page = _not_found(pages) if make is None else _made(make)
        self.send_response(page.status)
        self.send_header("Content-Type", page.kind)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

    do_HEAD = do_GET  # noqa: N815

    @override
    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.address_string(), format % args)


def _made(make: Callable[[], Page]) -> Page:
    try:
        return make()
    except Exception as error:
        log.exception("a page could not be made")
        return Page(500, f"{type(error).__name__}; see the service's log\n".encode())


def _not_found(pages: Pages) -> Page:
    return Page(404, f"expected {', '.join(pages)}\n".encode())
