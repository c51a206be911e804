"""Whatever of a server's calls fails while its cluster changes: what comes of it is no defect and no damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from router_service.backends.qdrant_server import consensus, failures
from router_service.backends.qdrant_server.failures import Meaning
from router_service.errors import RoutingServiceError
from router_service.memories.store import MemoryStore
from router_service.memories.swap import replace_memory
from router_service.operations import Operations
from router_service.rpc.interceptors import status_of
from router_service.settings import QdrantSettings
from router_service.storage import opened_store
from tests.congruence.fast_dir import fast_dir
from tests.qdrant_standin import QdrantStandIn
from tests.unit.router_service.numbered_memory import MODEL, SETTINGS, fill, numbered_entries

__all__ = ["fast_dir"]
PASSING = (
    "Service internal error: Waiting for consensus operation commit failed. "
    "Timeout set at: 10 seconds"
)
METHODS = (
    "Collections/Get",
    "Collections/List",
    "ListAliases",
    "ListCollectionAliases",
    "CollectionExists",
    "Collections/Create",
    "Collections/Update",
    "Collections/Delete",
    "UpdateAliases",
    "CreateFieldIndex",
    "Points/Get",
    "Scroll",
    "Points/Count",
    "QueryBatch",
    "Points/Query",
    "Upsert",
    "Points/Delete",
)
Action = Callable[[MemoryStore, str], None]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried twice within a call, but what all nodes must agree on, for a second."""
    for meaning in (Meaning.PASSING, Meaning.UNREACHABLE):
        monkeypatch.setitem(failures._PAUSES_S, meaning, ())
    monkeypatch.setattr(consensus, "ADMIN_TIMEOUT_S", 1.0)


@pytest.fixture
def server(fast_dir: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(fast_dir / "qdrant") as running:
        yield running


def create(store: MemoryStore, name: str) -> None:
    store.create(f"{name}-new", MODEL, SETTINGS)


def delete(store: MemoryStore, name: str) -> None:
    store.delete(name)


def replace(store: MemoryStore, name: str) -> None:
    replace_memory(store, Operations(), "law", name)


def change_settings(store: MemoryStore, name: str) -> None:
    store.change_settings("law", {"neighbours": 3})


def upsert(store: MemoryStore, name: str) -> None:
    digest = store.get("law").record.fingerprint.digest()
    store.asked("law", lambda memory: memory.upsert(0, digest, numbered_entries(0, 8)))


def delete_entries(store: MemoryStore, name: str) -> None:
    store.asked("law", lambda memory: memory.delete(0, np.arange(4, dtype=np.uint64)))


def refresh(store: MemoryStore, name: str) -> None:
    store.refresh()


ACTIONS = [create, delete, replace, change_settings, upsert, delete_entries, refresh]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_is_said_as_such(server: QdrantStandIn, method: str, action: Action) -> None:
    """`memory delete` that was begun is finished later: then the name is not found."""
    with opened_store(server.url, QdrantSettings()) as store:
        for name in ("law", "by"):
            fill(store.create(name, MODEL, SETTINGS), 0, 20)
        fault = server.faults.fail(grpc.StatusCode.INTERNAL, PASSING, method)
        said = outcome(store, action)
        assert said in (None, grpc.StatusCode.UNAVAILABLE)
        fault.lift()
        store.refresh()
        assert "law" in store.names()
        assert not store.broken
        again = (None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND)
        assert said is None or outcome(store, action) in again


def outcome(store: MemoryStore, action: Action) -> grpc.StatusCode | None:
    """What a client would be answered; None: it is done."""
    try:
        action(store, "by")
    except RoutingServiceError as error:
        return status_of(error).code
    return None


def test_a_node_that_does_not_know_the_collections_yet(server: QdrantStandIn) -> None:
    """As one that comes back: the memory serves as soon as they are known, though its record is the same."""
    with opened_store(server.url, QdrantSettings()) as store:
        fill(store.create("law", MODEL, SETTINGS), 0, 20)
    gone = "Not found: Collection `x` doesn't exist!"
    fault = server.faults.fail(grpc.StatusCode.NOT_FOUND, gone, "Collections/Get")
    with opened_store(server.url, QdrantSettings()) as store:
        assert list(store.broken) == ["law"]
        store.refresh()
        assert list(store.broken) == ["law"]
        fault.lift()
        store.refresh()
        assert store.names() == ["law"]
        assert not store.broken
