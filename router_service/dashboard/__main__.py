"""`python -m router_service.dashboard FD HOST TARGET`, which `router-service serve --dashboard` starts.

FD is a socket that listens at HOST; TARGET is the service's address.
"""

from __future__ import annotations

import logging
import socket
import sys

import uvicorn
from knnmoe.client import AdminClient

from router_service.children import die_with_parent_thread
from router_service.dashboard.view import View
from router_service.dashboard.web import application


def main(listener: str, host: str, target: str) -> None:
    """Serves the page until the service ends this process."""
    die_with_parent_thread()
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with AdminClient(target) as client, socket.socket(fileno=int(listener)) as listening:
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
