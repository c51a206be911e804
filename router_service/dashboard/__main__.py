"""`python -m router_service.dashboard FD HOST TARGET LOG_FORMAT [TOKEN_FD]`, which `serve --dashboard` starts.

FD is a socket that listens at HOST; TARGET is the service's address. TOKEN_FD: a file with the token that it asks for.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import uvicorn
from knnmoe.client import AdminClient, Credentials

from router_service.children import die_with_parent_thread
from router_service.dashboard.view import View
from router_service.dashboard.web import application
from router_service.telemetry.logs import configure


def main(listener: str, host: str, target: str, log_format: str, token: str | None = None) -> None:
    """Serves the page until the service ends this process."""
    die_with_parent_thread()
    configure("WARNING", log_format)
    # Nothing from the environment: that is for other services.
    credentials = Credentials(token_file=None if token is None else Path(f"/dev/fd/{token}"))
    with (
        AdminClient(target, credentials=credentials) as client,
        socket.socket(fileno=int(listener)) as listening,
    ):
        config = uvicorn.Config(
            application(View(client), host),
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=64,
        )
        uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    main(*sys.argv[1:])
