"""Real services, shared by many tests; each test makes memories of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests.engines import REMOTE, clean_server, url_of
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


@pytest.fixture(
    scope="session",
    params=["exact", "edge", "standin", pytest.param("server", marks=pytest.mark.docker)],
)
def sidecar(request: pytest.FixtureRequest, fast_dir: Path) -> Iterator[Sidecar]:
    """A service on each backend, on TCP; it must end cleanly after the last test, and leaves nothing in RAM."""
    data = fast_dir / request.param
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, data, ignore_errors=True)
        backend, flags, environment = request.param, [], dict(os.environ)
        if request.param in REMOTE:
            options = stack.enter_context(clean_server(url_of(request.param, request)))
            backend = options.url
            flags = ["--qdrant-prefix", options.prefix, "--qdrant-timeout-s", "30"]
            environment |= {KEY_VARIABLE: options.api_key} if options.api_key else {}
        service = running_sidecar(data, backend=backend, flags=flags, env=environment)
        yield stack.enter_context(service)


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
def name() -> str:
    """The name of a memory that no other test uses."""
    return f"memory-{next(_NUMBERS)}"


@pytest.fixture(scope="session")
def made(sidecar: Sidecar) -> Memories:
    """Memories for bad requests; see `memories`."""
    return fill(sidecar)


@pytest.fixture
def memories(made: Memories) -> Iterator[Memories]:
    """Two filled memories; afterwards nothing has changed and both answer."""
    before = made.state()
    yield made
    assert made.state() == before
    made.assert_answering()


@pytest.fixture(scope="session")
def memory_of(sidecar: Sidecar) -> MemoryOf:
    """Filled memories by kind and similarity, read as asked."""
    return filled_memories(sidecar)
