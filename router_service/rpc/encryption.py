"""TLS: certificate, key and clients' authority from files, read again when they change."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc
from knnmoe.watched import Watched

from router_service.errors import InvalidField


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Of a port. A change takes effect at the next connection; those that are there go on.

    Files that do not fit together, as they do not while they are being replaced, are said in the log, and those before
    stand. Raises InvalidField when they do not at the start.
    """
    paths = [cert, key, *([] if client_ca is None else [client_ca])]
    watched = Watched(
        paths, lambda: _read(cert, key, client_ca), secret=[key], unusable=(InvalidField,)
    )
    served = watched.get()

    def changed() -> Any:
        nonlocal served
        found = watched.get()
        if found is served:
            return None
        served = found
        return found

    return grpc.dynamic_ssl_server_credentials(served, changed, client_ca is not None)


def _read(cert: Path, key: Path, client_ca: Path | None) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # which gRPC would not ask for
    except (OSError, ValueError) as error:
        raise _unusable("--tls-cert", f"{cert} with {key}", error) from error
    authority = None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
            authority = client_ca.read_bytes()
        except OSError as error:
            raise _unusable("--tls-client-ca", str(client_ca), error) from error
    pair = (key.read_bytes(), cert.read_bytes())
    return grpc.ssl_server_certificate_configuration([pair], authority)


def _unusable(option: str, value: str, error: Exception) -> InvalidField:
    said = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return InvalidField(option, value, f"PEM files that fit together ({said})")
