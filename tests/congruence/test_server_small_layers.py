"""A server's layer is scanned while it is small; how many entries it has is asked now and then, not at each lookup."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from router_service.arrays import Entries, Provenance
from router_service.backends.base import CollectionSpec, Metric, SearchOptions
from router_service.backends.qdrant_server import collection as server_collection
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.options import ServerOptions
from tests.engines import SERVERS, clean_server, url_of

NAME, SPEC = "law/layer-000", CollectionSpec(16, Metric.EUCLID, 1)
SMALL = 100


class Calls:
    """What a service asks a server, method by method; it is asked all the same."""

    def __init__(self, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = 0
        self.exact = False  # of the last query
        for name in ("call", "begin"):
            monkeypatch.setattr(connection, name, self._seen(getattr(connection, name)))

    def _seen(self, ask: Any) -> Any:
        def asked(service: str, method: str, request: Any, *rest: Any, **more: Any) -> Any:
            self.counts += method == "Count"
            if method == "QueryBatch":
                self.exact = request.query_points[0].params.exact
            return ask(service, method, request, *rest, **more)

        return asked


@pytest.fixture(params=SERVERS)
def options(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServerOptions]:
    monkeypatch.setattr(server_collection, "_NUMBERS_OF_SMALL", SMALL * 512)
    with clean_server(url_of(request.param, request)) as options:
        yield options


def entries(start: int, stop: int) -> Entries:
    ids = np.arange(start, stop, dtype=np.uint64)
    keys = np.random.default_rng(start).normal(size=(len(ids), 16)).astype(np.float32)
    return Entries(ids, keys, keys[:, :1], [Provenance()] * len(ids))


def search(collection: ServerCollection) -> None:
    collection.search(np.zeros((3, 16), np.float32), 4, SearchOptions())


def test_entries_are_counted_once_after_a_write(
    options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_collection, "_COUNT_AGE_S", float("inf"))
    connection = Connection(options)
    backend = ServerBackend(connection)
    collection = backend.create(NAME, SPEC)
    collection.upsert(entries(0, SMALL))
    calls = Calls(connection, monkeypatch)
    for _ in range(20):
        search(collection)
        assert calls.exact
    assert calls.counts == 1
    collection.upsert(entries(SMALL, 2 * SMALL))
    while calls.exact:  # the count is on its way
        search(collection)
    collection.delete(np.arange(SMALL, dtype=np.uint64))
    while not calls.exact:
        search(collection)
    assert calls.counts == 3
    backend.close()


def test_what_another_service_writes_is_counted_too(
    options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_collection, "_COUNT_AGE_S", 0.0)
    connection = Connection(options)
    backend, other = ServerBackend(connection), ServerBackend(Connection(options))
    collection = backend.create(NAME, SPEC)
    theirs = other.open(NAME, SPEC)
    calls = Calls(connection, monkeypatch)
    search(collection)
    assert calls.exact
    theirs.upsert(entries(0, 2 * SMALL))
    while calls.exact:
        search(collection)
    theirs.delete(np.arange(SMALL, dtype=np.uint64))
    while not calls.exact:
        search(collection)
    backend.close()
    other.close()
