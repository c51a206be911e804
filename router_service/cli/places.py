"""The ends of a migration as a user names them: `embedded`, the URL of a Qdrant server, or a data directory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from router_service.backends.exact import ExactBackend
from router_service.backends.qdrant_server.options import GRPC_PORT, REST_PORT, is_url, parse_url
from router_service.cli.admin_client import AdminClient
from router_service.cli.errors import AdminError, BadInput, Unreachable
from router_service.cli.service_place import ServicePlace
from router_service.errors import (
    BackendUnavailable,
    InvalidField,
    InvalidRequest,
    RoutingServiceError,
    shorten,
)
from router_service.memories.store import MemoryStore
from router_service.settings import QdrantSettings
from router_service.storage import opened_store
from router_service.transfer import Place, StorePlace

EMBEDDED = "embedded"
_EXPECTED = "embedded (the service), http(s)://HOST[:PORT] of a Qdrant server, or a data directory"


@dataclass(frozen=True, slots=True)
class PlaceName:
    """A place as the user wrote it; `identity` is equal where two are the same place."""

    text: str
    identity: tuple[str, ...]

    @property
    def directory(self) -> Path | None:
        """The data directory, when it is one."""
        return Path(self.text) if self.identity[0] == "directory" else None


def place_name(option: str, text: str) -> PlaceName:
    """What a user means. Raises BadInput that names the option."""
    if text == EMBEDDED:
        return PlaceName(text, (EMBEDDED,))
    if is_url(text):
        return PlaceName(text, _server(option, text))
    if not text or "\0" in text or "://" in text or re.fullmatch(r"[^/]+:\d+", text):
        raise BadInput(f"{option}: got {shorten(text)}, expected {_EXPECTED}")
    return PlaceName(text, ("directory", str(Path(text).resolve())))


def _server(option: str, url: str) -> tuple[str, ...]:
    try:
        host, port = parse_url(url)
    except InvalidField as error:
        raise BadInput(f"{option}: got {error.value}, expected {error.expected}") from error
    grpc_port = GRPC_PORT if port in (None, REST_PORT) else port
    return "server", host.lower(), str(grpc_port)


@contextmanager
def opened_source(name: PlaceName, client: AdminClient, qdrant: QdrantSettings) -> Iterator[Place]:
    """The place that memories are read from. Raises AdminError."""
    if name.directory is not None and not (name.directory / "memories").is_dir():
        raise BadInput(
            f"--from: {shorten(name.text)} is no data directory of a service (it has no memories/), "
            f"expected {_EXPECTED}"
        )
    with _opened("--from", name, client, qdrant) as place:
        yield place


@contextmanager
def opened_target(
    name: PlaceName, client: AdminClient, qdrant: QdrantSettings, *, dry_run: bool
) -> Iterator[Place]:
    """The place that memories are written to; a dry run makes no directory. Raises AdminError."""
    if name.directory is not None and name.directory.exists() and not name.directory.is_dir():
        raise BadInput(f"--to: {shorten(name.text)} is a file, expected {_EXPECTED}")
    if dry_run and name.directory is not None and not (name.directory / "memories").exists():
        yield StorePlace(MemoryStore(ExactBackend(), None))
        return
    with _opened("--to", name, client, qdrant) as place:
        yield place


@contextmanager
def _opened(
    option: str, name: PlaceName, client: AdminClient, qdrant: QdrantSettings
) -> Iterator[Place]:
    if name.text == EMBEDDED:
        yield ServicePlace(client)
        return
    with store_errors(), opened_store(name.text, qdrant, option) as store:
        yield StorePlace(store)


@contextmanager
def store_errors() -> Iterator[None]:
    """What a store that this process holds open itself raises, as AdminError."""
    try:
        yield
    except InvalidRequest as error:
        raise BadInput(str(error)) from error
    except BackendUnavailable as error:
        raise Unreachable(str(error)) from error
    except RoutingServiceError as error:
        raise AdminError(str(error)) from error
    except ValidationError as error:
        problem = error.errors()[0]
        name = "_".join(str(part) for part in problem["loc"]).upper()
        raise BadInput(f"environment: ROUTER_SERVICE_{name}: {problem['msg']}") from error
