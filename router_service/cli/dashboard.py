"""The page of `serve --dashboard`: a process of its own, so that nothing it does keeps a lookup waiting for Python."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from router_service.children import start_module
from router_service.cli.listeners import listener, url_of
from router_service.errors import StorageError
from router_service.settings import ServiceSettings

log = logging.getLogger(__name__)

_OPTION, _MODULE = "--dashboard", "router_service.dashboard"
_LIBRARIES = ("starlette", "uvicorn")
# Lookups come first.
_NICENESS = 10
# Where a client on this machine finds a service that listens everywhere.
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104


class Dashboard:
    """Of a service; one without an address is none, and stays so."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Takes the address. Raises as listener(), and StorageError without the libraries."""
        self._host, self._listener = "", None
        self._process: subprocess.Popen[bytes] | None = None
        self._log_format = settings.log_format
        self._closing = False
        if settings.dashboard is not None:
            _require_libraries()
            self._host, self._listener = listener(
                _OPTION, settings.dashboard, insecure=settings.insecure
            )

    @property
    def is_on(self) -> bool:
        """Whether there is one."""
        return self._listener is not None

    def start(self, target: str, token: str | None) -> str | None:
        """Shows the service at `target`, which asks for `token`; returns where, or None."""
        if self._listener is None:
            return None
        descriptor = self._listener.fileno()
        host, _, rest = target.rpartition(":")
        target = f"{_EVERYWHERE.get(host, host)}:{rest}"
        with _kept(token) as kept:
            arguments = [str(descriptor), self._host, target, self._log_format, *map(str, kept)]
            self._process = start_module(
                _MODULE, arguments, stderr=None, pass_fds=[descriptor, *kept], niceness=_NICENESS
            )
        if token is not None:
            log.warning("%s asks nobody for a token: who reaches it reads every memory", _OPTION)
        watching = threading.Thread(target=self._watch, args=[self._process], daemon=True)
        watching.start()
        return url_of(self._host, self._listener, "/")

    def close(self) -> None:
        """Ends the page at once: it keeps nothing. Closing twice is allowed."""
        self._closing = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._listener is not None:
            self._listener.close()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self._closing:
            log.error("the dashboard has ended with code %d; the service goes on without", code)


@contextmanager
def _kept(token: str | None) -> Iterator[list[int]]:
    """The descriptor of a file in RAM with a token, which nobody else sees: neither as an argument nor on disk."""
    if token is None:
        yield []
        return
    file = os.memfd_create("token")
    try:
        os.fchmod(file, 0o600)
        os.write(file, token.encode())
        yield [file]
    finally:
        os.close(file)


def _require_libraries() -> None:
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise StorageError(
            f"{_OPTION} needs {' and '.join(missing)}, which cannot be found: pip install 'knn-moe[dashboard]'"
        )
