"""Addresses of `serve` beside --listen: they are taken before anything is opened."""

from __future__ import annotations

import os
import socket

from router_service.errors import InvalidField, StorageError
from router_service.rpc.server import host_and_port

_BACKLOG = 128


def listener(option: str, address: str, *, insecure: bool) -> tuple[str, socket.socket]:
    """The host of HOST:PORT, and a socket that listens there.

    Raises InvalidField on an address that is none, or that others reach without --insecure, and StorageError when it
    cannot be had.
    """
    host, port = host_and_port(option, address, "HOST:PORT", insecure)
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidField(option, address, f"HOST:PORT ({error.strerror})") from error
    family, _, _, _, place = found[0]
    try:
        return host, socket.create_server(place[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise StorageError(
            f"cannot listen on {address} ({reason}); choose another {option}"
        ) from error


def url_of(host: str, listening: socket.socket, path: str) -> str:
    """Where a browser finds `path`."""
    return f"http://{host}:{listening.getsockname()[1]}{path}"
