"""Where the server or cluster is, and what it is asked to do for a collection."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

from router_service.errors import InvalidField

GRPC_PORT, REST_PORT = 6334, 6333
BACKEND_SETTING = "--backend (ROUTER_SERVICE_BACKEND)"
PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


class WriteOrdering(StrEnum):
    """Qdrant's write ordering: weak may reorder, medium goes through a leader, strong through a permanent one."""

    WEAK = "weak"
    MEDIUM = "medium"
    STRONG = "strong"


# What files of writes that are unfinished are called, before the prefix that they are for.
UNFINISHED = "unfinished-writes-"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Names are Qdrant's own; None leaves a value to the server."""

    url: str  # of a server; of several nodes with commas between them
    api_key: str | None = field(default=None, repr=False)
    ca_certificate: bytes | None = field(default=None, repr=False)
    prefix: str = "knnmoe"
    shard_number: int | None = None
    replication_factor: int | None = None
    write_consistency_factor: int | None = None
    on_disk: bool | None = None
    wait: bool = True
    ordering: WriteOrdering = WriteOrdering.WEAK
    timeout_s: float = 1.0  # of a lookup
    connections: int = 4
    named_by: str = BACKEND_SETTING  # what errors tell to change

    @property
    def secure(self) -> bool:
        """Whether the connections are encrypted."""
        return self.url.startswith("https://")

    @property
    def where(self) -> str:
        """What errors call it."""
        kind = "cluster" if len(urls_of(self.url)) > 1 else "server"
        return f"the Qdrant {kind} at {self.url}"


def ports_of(port: int | None) -> list[int]:
    """The gRPC ports that a URL's port may mean, the likeliest first: users give that of REST as often."""
    if port is None:
        return [GRPC_PORT]
    ports = [port + 1, port] if port == REST_PORT else [port, port + 1]
    return [each for each in ports if each <= 65_535]


def is_url(place: str) -> bool:
    """Whether a place is a server's or a cluster's, and not a name or a path."""
    return place.startswith(("http://", "https://"))


def urls_of(place: str) -> list[str]:
    """The URLs of the nodes of a cluster, each once, or that of a server. Raises InvalidField, that shows no key."""
    if (shown := without_key(place)) != place:
        raise InvalidField("--backend", shown, f"{_EXPECTED}; {_KEY_ELSEWHERE}")
    by_address: dict[tuple[str, int], str] = {}
    for each in (part.strip() for part in place.split(",")):
        host, port = parse_url(each)
        by_address.setdefault((host.lower(), ports_of(port)[0]), each)
    urls = list(by_address.values())
    if len({url.partition(":")[0] for url in urls}) > 1:
        expected = (
            "http:// or https:// for all nodes of a cluster: they have one key and one authority"
        )
        raise InvalidField("--backend", place, expected)
    return urls


_EXPECTED = (
    "http://HOST[:PORT] or https://HOST[:PORT] of a Qdrant server's gRPC port, e.g. http://localhost:6334, or several "
    "of one cluster with commas between them"
)
_KEY_ELSEWHERE = (
    "the server's API key is given in a file (--qdrant-api-key-file, ROUTER_SERVICE_QDRANT_API_KEY_FILE) or in "
    "ROUTER_SERVICE_QDRANT_API_KEY, never in the URL"
)


def without_key(place: str) -> str:
    """A place as it may be shown: of a URL, nothing that may be a user, a password or a key."""
    head, at, tail = place.rpartition("@")
    scheme = re.match("[A-Za-z]+:/*", head)
    shown = f"{scheme[0] if scheme else ''}...@{tail}" if at else place
    address, *rest = re.split("[?#]", shown, maxsplit=1)
    return f"{address}?..." if any(rest) and "/" in address else shown


def parse_url(url: str) -> tuple[str, int | None]:
    """Host (IPv6 in brackets) and port of http(s)://HOST[:PORT]. Raises InvalidField, that shows no key."""
    if (shown := without_key(url)) != url:
        raise InvalidField("--backend", shown, f"{_EXPECTED}; {_KEY_ELSEWHERE}")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InvalidField("--backend", url, _EXPECTED) from None
    plain = parts.path in ("", "/") and not (parts.query or parts.fragment or parts.username)
    if parts.scheme not in ("http", "https") or not host or not plain or port == 0:
        raise InvalidField("--backend", url, _EXPECTED)
    return (f"[{host}]" if ":" in host else host), port
