"""The Qdrant server that a benchmark asks: one that is there, or the tests' stand-in as a process for as long."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.options import ServerOptions

STANDIN = "standin"
PREFIX = "knnmoe-benchmark"
TIMEOUT_S = 60.0
_ROOT = Path(__file__).parents[1]
_LISTENING = "listening on "


@contextmanager
def serving(backend: str, nodes: int = 0) -> Iterator[str]:
    """The URL that is given, or that of a stand-in; or URL,URL,... of a cluster of them with so many nodes.

    Raises RuntimeError when they do not start.
    """
    if backend != STANDIN:
        yield backend
        return
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "tests.qdrant_standin", "--data", f"{directory}/data"]
        command += ["--peers", str(nodes)] if nodes else []
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=_ROOT, text=True) as process:
            try:
                assert process.stdout is not None
                said = process.stdout.readline().strip()
                if not said.startswith(_LISTENING):
                    raise RuntimeError(f"the stand-in did not start: {said!r}")
                yield said.removeprefix(_LISTENING)
            finally:
                process.terminate()


def options(url: str) -> ServerOptions:
    """How benchmarks ask a server; its key is where the service looks for it."""
    key = os.environ.get("ROUTER_SERVICE_QDRANT_API_KEY")
    return ServerOptions(url=url, api_key=key, prefix=PREFIX, timeout_s=TIMEOUT_S)


@contextmanager
def backend_at(url: str) -> Iterator[ServerBackend]:
    """A backend on that server; collections of an earlier run may be there."""
    backend = ServerBackend(Connection(options(url)))
    try:
        yield backend
    finally:
        backend.close()
