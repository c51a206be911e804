"""The engines that one body of tests runs on, and what stands for each here.

    numpy      the oracle
    embedded   Qdrant Edge on files
    standin    tests/qdrant_standin: the Qdrant wire in front of Qdrant Edge
    server     a real Qdrant server: what is at QDRANT_TEST_URL (key: QDRANT_TEST_API_KEY), else one in a container

Without either the last is skipped, and fails under REQUIRE_DOCKER=1. The end of a run says which were exercised.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from qdrant_client import grpc as q

from router_service.backends.base import Backend, Compression
from router_service.backends.edge.backend import EdgeBackend
from router_service.backends.exact import ExactBackend
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.options import ServerOptions
from tests.qdrant_image import QDRANT_IMAGE
from tests.qdrant_standin import QdrantStandIn

URL, API_KEY, REQUIRED = "QDRANT_TEST_URL", "QDRANT_TEST_API_KEY", "REQUIRE_DOCKER"
NAMES = ("numpy", "embedded", "standin", "server")
ENGINES = [*NAMES[:-1], pytest.param("server", marks=pytest.mark.docker)]
REMOTE, SERVERS = NAMES[2:], ENGINES[2:]
TURBO_SINCE = (1, 18)
_exercised: dict[str, str] = {}
_missing: dict[str, str] = {}


@pytest.fixture(scope="session")
def standin_url() -> Iterator[str]:
    """One stand-in for all tests that leave it as it is."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        tempfile.TemporaryDirectory(dir=memory) as directory,
        QdrantStandIn(Path(directory)) as server,
    ):
        yield server.url


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A real server, or a skip that says why not."""
    if url := _given_url():
        _exercised["server"] = f"at {URL}"
        yield url
        return
    if problem := _docker_problem():
        _missing["server"] = problem
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, and there is no Docker engine: {problem}")
        pytest.skip(f"no {URL}, and no Docker engine: {problem}")
    from testcontainers.qdrant import QdrantContainer

    with ExitStack() as stack:
        container = QdrantContainer(QDRANT_IMAGE)
        for place in ("storage", "snapshots"):
            # The container's own root may be fuse-overlayfs, where a restored collection is found empty.
            volume = stack.enter_context(_docker_volume())
            container.with_volume_mapping(volume, f"/qdrant/{place}", "rw")
        stack.enter_context(container)
        host = container.get_container_host_ip()
        url = f"http://{host}:{container.get_exposed_port(6334)}"
        _exercised["server"] = QDRANT_IMAGE
        yield url


@contextmanager
def _docker_volume() -> Iterator[str]:
    """The name of a volume that is gone afterwards."""
    import docker

    client = docker.from_env()
    volume = client.volumes.create(name=f"knnmoe-{fresh_prefix()}")
    try:
        yield volume.name
    finally:
        volume.remove()
        client.close()


def _given_url() -> str:
    """QDRANT_TEST_URL, of plain HTTP unless it says otherwise, one or several with commas; empty without it."""
    urls = (each.strip() for each in os.environ.get(URL, "").split(",") if each.strip())
    return ",".join(url if "://" in url else f"http://{url}" for url in urls)


def _docker_problem() -> str:
    """Why containers cannot run here; empty when they can."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if host.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as probe:
            if error := probe.connect_ex(host.removeprefix("unix://")):
                return f"{host}: {os.strerror(error)}"
    import docker

    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        return f"{host}: {error}"
    client.close()
    return ""


def options_for(url: str, prefix: str) -> ServerOptions:
    """How tests talk to a server."""
    key = os.environ.get(API_KEY) if url == _given_url() else None
    return ServerOptions(url=url, api_key=key, prefix=prefix, timeout_s=30.0)


def fresh_prefix() -> str:
    """Names that no other test has: servers are shared."""
    return f"test-{secrets.token_hex(6)}"


@contextmanager
def clean_server(url: str) -> Iterator[ServerOptions]:
    """A prefix of its own on a server, with nothing left of it afterwards."""
    options = options_for(url, fresh_prefix())
    try:
        yield options
    finally:
        remove_collections(options)


def remove_collections(options: ServerOptions) -> None:
    """Drops every collection of a prefix."""
    connection = Connection(options)
    try:
        reply = connection.call("collections", "List", q.ListCollectionsRequest(), 30.0)
        for each in reply.collections:
            if each.name.startswith(f"{options.prefix}~"):
                request = q.DeleteCollection(collection_name=each.name)
                connection.call("collections", "Delete", request, 60.0)
    finally:
        connection.close()


def url_of(engine: str, request: pytest.FixtureRequest) -> str:
    """The server that stands for `standin` or `server`."""
    url: str = request.getfixturevalue(f"{engine}_url")
    _exercised.setdefault(engine, "")
    return url


@contextmanager
def backend_of(engine: str, request: pytest.FixtureRequest, directory: Path) -> Iterator[Backend]:
    """A backend with nothing in it, closed afterwards."""
    if engine in REMOTE:
        with clean_server(url_of(engine, request)) as options:
            backend: Backend = ServerBackend(Connection(options))
            try:
                yield backend
            finally:
                backend.close()
        return
    backend = ExactBackend() if engine == "numpy" else EdgeBackend(directory, min_free_bytes=0)
    _exercised.setdefault(engine, "")
    try:
        yield backend
    finally:
        backend.close()


def require_compression(backend: Backend, label: str) -> None:
    """Skips what a server does not have: search keys beside the keys, and before 1.18 TurboQuant."""
    if not isinstance(backend, ServerBackend):
        return
    if Compression.parse(label).apart:
        pytest.skip(f"a Qdrant server has no {label}: search keys apart are the embedded backend's")
    version = tuple(map(int, backend.version.split(".")[:2]))
    if label.startswith("turbo") and version < TURBO_SINCE:
        pytest.skip(f"Qdrant {backend.version} has no {label}")


def seen() -> dict[str, dict[str, str]]:
    """What this process exercised and what it missed."""
    return {"exercised": _exercised, "missing": _missing}


def add(others: dict[str, dict[str, str]]) -> None:
    """Takes over what another process of the same run saw."""
    _exercised.update(others["exercised"])
    _missing.update(others["missing"])


def summary() -> str:
    """Which engines were exercised, and why others were not."""
    done = [
        f"{name} ({_exercised[name]})" if _exercised[name] else name
        for name in NAMES
        if name in _exercised
    ]
    lines = [f"engines exercised: {', '.join(done) or 'none'}"]
    lines += [f"engine not exercised: {name}: {reason}" for name, reason in _missing.items()]
    return "\n".join(lines)
