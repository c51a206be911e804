"""Real services, shared by many tests; each test makes memories of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path

import pytest
from knnmoe.client import AdminClient
from knnmoe.v1 import memory_admin_pb2 as pb

from router_service.backends.qdrant_server.options import ServerOptions
from tests.engines import clean_server, url_of
from tests.integration.filled_memories import MemoryOf, filled_memories
from tests.integration.refusals import Memories, fill
from tests.integration.server_snapshots import KEY_VARIABLE
from tests.sidecar import Sidecar, running_sidecar

_NUMBERS = count()
_MEMORY_FILES = Path("/dev/shm")
# The service refuses writes below 1 GiB or 5 %; a small tmpfs could end a mapped write in SIGBUS.
_NEEDED_BYTES = 4 * 2**30


@pytest.fixture(scope="session")
def fast_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in RAM where there is room for one: SIGKILL spares it as it spares the page cache."""
    if not _MEMORY_FILES.is_dir() or shutil.disk_usage(_MEMORY_FILES).free < _NEEDED_BYTES:
        yield tmp_path_factory.mktemp("services")
        return
    with tempfile.TemporaryDirectory(dir=_MEMORY_FILES) as directory:
        yield Path(directory)


@pytest.fixture
def data(fast_dir: Path) -> Iterator[Path]:
    """A data directory that is not there yet, in a directory of its own."""
    parent = fast_dir / f"test-{next(_NUMBERS)}"
    parent.mkdir()
    yield parent / "data"
    shutil.rmtree(parent)


@pytest.fixture(scope="session")
def exact_service(fast_dir: Path) -> Iterator[Sidecar]:
    with _service_on(fast_dir / "exact", "exact") as running:
        yield running


@pytest.fixture(scope="session")
def edge_service(fast_dir: Path) -> Iterator[Sidecar]:
    with _service_on(fast_dir / "edge", "edge") as running:
        yield running


@pytest.fixture(scope="session")
def standin_service(
    request: pytest.FixtureRequest, standin_url: str, fast_dir: Path
) -> Iterator[Sidecar]:
    with (
        clean_server(url_of("standin", request)) as options,
        _service_on(fast_dir / "standin", options) as running,
    ):
        yield running


@pytest.fixture(scope="session")
def server_service(server_url: str, fast_dir: Path) -> Iterator[Sidecar]:
    with clean_server(server_url) as options, _service_on(fast_dir / "server", options) as running:
        yield running


@contextmanager
def _service_on(data: Path, backend: str | ServerOptions) -> Iterator[Sidecar]:
    """On TCP; it must end cleanly after the last test, and leaves nothing in RAM."""
    flags, environment = [], dict(os.environ)
    if isinstance(backend, ServerOptions):
        flags = ["--qdrant-prefix", backend.prefix, "--qdrant-timeout-s", "30"]
        environment |= {KEY_VARIABLE: backend.api_key} if backend.api_key else {}
        backend = backend.url
    try:
        with running_sidecar(data, backend=backend, flags=flags, env=environment) as running:
            yield running
    finally:
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture(
    params=["exact", "edge", "standin", pytest.param("server", marks=pytest.mark.docker)]
)
def sidecar(request: pytest.FixtureRequest) -> Sidecar:
    """A service on each backend: one for the whole session, and not of it, or each module would start all anew."""
    running: Sidecar = request.getfixturevalue(f"{request.param}_service")
    return running


@pytest.fixture(scope="session")
def ram_sidecar(fast_dir: Path) -> Iterator[Sidecar]:
    """A service in RAM, on TCP; it must end cleanly after the last test."""
    with running_sidecar(fast_dir / "ram", backend="exact") as running:
        yield running


@pytest.fixture(scope="session")
def edge_sidecar(fast_dir: Path) -> Iterator[Sidecar]:
    """A service on Qdrant Edge, on a Unix socket; it must end cleanly after the last test."""
    with running_sidecar(fast_dir / "unix", listen=f"unix:{fast_dir}/s") as running:
        yield running


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a memory that no other test uses; it and those of names that begin with it go afterwards.

    A service looks after each memory that it has until the last test ends.
    """
    own = f"memory-{next(_NUMBERS)}"
    yield own
    for service in {"edge_sidecar", "ram_sidecar"} & set(request.fixturenames):
        with AdminClient(request.getfixturevalue(service).target) as client:
            listed = client.unary(client.admin.ListMemories, pb.ListMemoriesRequest())
            for memory in listed.memories:
                if memory.name == own or memory.name.startswith(f"{own}-"):
                    client.delete(memory.name)


@pytest.fixture(scope="session")
def fill_once() -> Callable[[Sidecar], Memories]:
    """Memories for bad requests; see `memories`."""
    return cache(fill)


@pytest.fixture
def memories(sidecar: Sidecar, fill_once: Callable[[Sidecar], Memories]) -> Iterator[Memories]:
    """Two filled memories; afterwards nothing has changed and both answer."""
    made = fill_once(sidecar)
    before = made.state()
    yield made
    assert made.state() == before
    made.assert_answering()


@pytest.fixture(scope="session")
def read_memories() -> Callable[[Sidecar], MemoryOf]:
    """See `memory_of`."""
    return cache(filled_memories)


@pytest.fixture
def memory_of(sidecar: Sidecar, read_memories: Callable[[Sidecar], MemoryOf]) -> MemoryOf:
    """Filled memories by kind and similarity, read as asked."""
    return read_memories(sidecar)
