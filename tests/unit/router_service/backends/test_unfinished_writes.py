"""Writes that a Qdrant server did not acknowledge are finished without anybody writing again. On the stand-in only."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from router_service.arrays import Entries
from router_service.backends.base import UnfinishedEntries
from router_service.backends.qdrant_server import failures, unfinished_writes
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.failures import Meaning
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.wire import q
from router_service.doctor import check_unfinished
from router_service.errors import (
    BackendMisconfigured,
    BackendUnavailable,
    DirectoryInUse,
    Overloaded,
)
from tests.integration.server_snapshots import until
from tests.qdrant_standin import QdrantStandIn
from tests.qdrant_standin.faults import Fault
from tests.unit.router_service.backends.numbered_entries import SPEC, numbered_entries

NOW, LATER = 1_700_000_000_000, 1_700_000_000_001
# Qdrant's words where a part of the shards took a write.
SHARDS = (
    "Service internal error: 2 out of 3 shards failed to apply operation. First error captured: Service internal "
    "error: Tonic status error: status: Unavailable"
)
Opened = Callable[..., ServerBackend]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried twice within a call."""
    for meaning in (Meaning.PASSING, Meaning.UNREACHABLE):
        monkeypatch.setitem(failures._PAUSES_S, meaning, ())
    monkeypatch.setattr(unfinished_writes, "_LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(unfinished_writes, "_GONE_S", 0.3)


@pytest.fixture
def server(fast_dir: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(fast_dir / "qdrant") as running:
        yield running


@pytest.fixture
def opened(server: QdrantStandIn) -> Iterator[Opened]:
    """Backends as services have them."""
    with ExitStack() as stack:

        def open_one(directory: Path | None = None, url: str = server.url) -> ServerBackend:
            backend = ServerBackend(Connection(ServerOptions(url)), directory)
            stack.callback(backend.close)
            return backend

        yield open_one


@pytest.fixture
def backend(opened: Opened) -> ServerBackend:
    return opened()


@pytest.fixture
def collection(backend: ServerBackend) -> ServerCollection:
    """With entries 0 to 9."""
    made = backend.create("law/layer-000", SPEC)
    made.upsert(entries(0, 10))
    return made


def entries(start: int, stop: int, created: int = NOW, factor: float = 1.0) -> Entries:
    made = numbered_entries(start, stop)
    origins = [replace(origin, created_unix_ms=created) for origin in made.provenance]
    return replace(made, values=made.values * np.float32(factor), provenance=origins)


def breaking(server: QdrantStandIn, method: str = "Upsert") -> Fault:
    return server.faults.fail(grpc.StatusCode.INTERNAL, SHARDS, method)


def strict(collection: ServerCollection) -> None:
    """The server wants an index of what a write filters by."""
    config = q.StrictModeConfig(enabled=True, unindexed_filtering_update=False)
    request = q.UpdateCollection(collection_name=collection.name, strict_mode_config=config)
    collection._connection.call("collections", "Update", request, 10.0)


def values_of(collection: ServerCollection) -> dict[int, float]:
    stored = collection.scroll(None, 1000)
    return dict(zip(stored.ids.tolist(), stored.values[:, 1].tolist(), strict=True))


def ids_of(collection: ServerCollection) -> list[int]:
    return list(values_of(collection))


def until_finished(collection: ServerCollection) -> None:
    until(lambda: collection.info().unfinished is None)


@contextmanager
def breaking_until_done(
    server: QdrantStandIn, collection: ServerCollection, method: str = "Upsert"
) -> Iterator[None]:
    """Inside, writes by `method` fail; afterwards what is unfinished is finished."""
    fault = breaking(server, method)
    yield
    fault.lift()
    until_finished(collection)


def test_an_upsert_is_finished(server: QdrantStandIn, collection: ServerCollection) -> None:
    version = collection.versions.now
    with breaking_until_done(server, collection):
        with pytest.raises(BackendUnavailable) as failed:
            collection.upsert(entries(5, 15, factor=2.0))
        assert failed.value.retry_after_s
        unfinished = collection.info().unfinished
        assert unfinished is not None
        assert (unfinished.writes, unfinished.ids) == (1, list(range(5, 15)))
        assert "2 out of 3 shards" in unfinished.problem
        assert not unfinished.on_disk
        version = collection.versions.now
    expected = {n: n * 2.0 for n in range(5)} | {n: n * 4.0 for n in range(5, 15)}
    assert values_of(collection) == expected
    assert collection.versions.now > version


def test_all_parts_of_an_upsert_are_finished(
    server: QdrantStandIn, collection: ServerCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router_service.backends.qdrant_server.collection._FLOATS_PER_UPDATE", 1)
    calls = server.faults.calls["Upsert"]
    with breaking_until_done(server, collection):
        with pytest.raises(BackendUnavailable):
            collection.upsert(entries(20, 60))
        assert server.faults.calls["Upsert"] - calls >= 1
        unfinished = collection.info().unfinished
        assert unfinished is not None
        assert unfinished.writes == 5
    assert ids_of(collection) == [*range(10), *range(20, 60)]


def test_a_deletion_is_finished(server: QdrantStandIn, collection: ServerCollection) -> None:
    with breaking_until_done(server, collection, "Delete"):
        with pytest.raises(BackendUnavailable):
            collection.delete(np.arange(4, 8, dtype=np.uint64))
        unfinished = collection.info().unfinished
        assert unfinished is not None
        assert unfinished.ids == [4, 5, 6, 7]
    assert ids_of(collection) == [0, 1, 2, 3, 8, 9]


def test_what_was_written_since_is_not_deleted(
    server: QdrantStandIn, collection: ServerCollection, opened: Opened
) -> None:
    """By this service and by another one, whatever the time that an entry says."""
    other = opened().open("law/layer-000", SPEC)
    with breaking_until_done(server, collection, "Delete"):
        with pytest.raises(BackendUnavailable):
            collection.delete(np.arange(4, 8, dtype=np.uint64))
        collection.upsert(entries(4, 5, factor=3.0))
        other.upsert(entries(5, 6, created=LATER, factor=3.0))
        other.upsert(entries(6, 7, created=NOW - 1, factor=3.0))
    found = values_of(collection)
    assert list(found) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert [found[n] for n in (4, 5, 6)] == [24.0, 30.0, 36.0]


def test_a_deletion_under_strict_mode(
    server: QdrantStandIn, collection: ServerCollection, opened: Opened
) -> None:
    """Without an index of the time of creation; what another service made anew stays."""
    other = opened().open("law/layer-000", SPEC)
    strict(collection)
    with breaking_until_done(server, collection, "Delete"):
        with pytest.raises(BackendUnavailable):
            collection.delete(np.arange(4, 8, dtype=np.uint64))
        other.upsert(entries(5, 6, created=LATER, factor=3.0))
    found = values_of(collection)
    assert list(found) == [0, 1, 2, 3, 5, 8, 9]
    assert found[5] == 30.0


def test_a_write_that_is_refused_holds_up_no_other(
    server: QdrantStandIn, collection: ServerCollection
) -> None:
    fault = breaking(server)
    broken = breaking(server, "Delete")
    with pytest.raises(BackendUnavailable):
        collection.delete(np.array([1], np.uint64))
    with pytest.raises(BackendUnavailable):
        collection.upsert(entries(20, 30))
    refusal = 'Bad request: Limit exceeded 10 > 5 for "delete". Help: Reduce it.'
    refused = server.faults.fail(grpc.StatusCode.INVALID_ARGUMENT, refusal, "Delete")
    broken.lift()

    def unfinished() -> UnfinishedEntries:
        found = collection.info().unfinished
        assert found is not None
        return found

    fault.lift()
    until(lambda: unfinished().ids == [1])
    assert ids_of(collection) == [*range(10), *range(20, 30)]
    refused.lift()
    until_finished(collection)


def test_what_was_deleted_since_does_not_come_back(
    server: QdrantStandIn, collection: ServerCollection
) -> None:
    """Also where the replica that is asked never had it."""
    with breaking_until_done(server, collection):
        with pytest.raises(BackendUnavailable):
            collection.upsert(entries(8, 12))
        assert collection.delete(np.array([8, 11], np.uint64)) == 1
        unfinished = collection.info().unfinished
        assert unfinished is not None
        assert unfinished.ids == [9, 10]
    assert ids_of(collection) == [*range(8), 9, 10]


def test_a_later_value_stays(
    server: QdrantStandIn, collection: ServerCollection, opened: Opened
) -> None:
    """Of this service's next write, whether it was acknowledged or not, and of another service's."""
    other = opened().open("law/layer-000", SPEC)
    fault = breaking(server)
    for factor in (2.0, 3.0):
        with pytest.raises(BackendUnavailable):
            collection.upsert(entries(0, 6, factor=factor))
    held = server.faults.fail(grpc.StatusCode.UNAVAILABLE, method="ListCollectionAliases")
    fault.lift()
    with pytest.raises(BackendUnavailable):  # it was written: whether it counts cannot be seen
        collection.upsert(entries(4, 5, factor=4.0))
    with pytest.raises(BackendUnavailable):
        other.upsert(entries(5, 6, created=LATER, factor=5.0))
    held.lift()
    until_finished(collection)
    found = values_of(collection)
    assert [found[n] for n in range(6)] == [0.0, 6.0, 12.0, 18.0, 32.0, 50.0]


def test_a_memory_that_is_gone_is_left_alone(
    server: QdrantStandIn, collection: ServerCollection, backend: ServerBackend
) -> None:
    fault = breaking(server)
    with pytest.raises(BackendUnavailable):
        collection.upsert(entries(20, 30))
    collection.close()
    backend.drop("law/layer-000")
    until(lambda: backend._unfinished.of(collection.name) is None)
    fault.lift()
    assert backend.create("law/layer-000", SPEC).info().entries == 0


def test_a_node_that_does_not_know_the_alias_yet_is_asked_again(
    server: QdrantStandIn, collection: ServerCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished_writes, "_GONE_S", 60.0)
    with breaking_until_done(server, collection):
        with pytest.raises(BackendUnavailable):
            collection.upsert(entries(20, 30))
        gone = "Not found: Collection `x` doesn't exist!"
        server.faults.fail(grpc.StatusCode.NOT_FOUND, gone, "ListCollectionAliases", calls=3)
    assert len(ids_of(collection)) == 20


def test_what_was_refused_is_not_tried_again(
    server: QdrantStandIn, collection: ServerCollection
) -> None:
    strict = 'Bad request: Limit exceeded 10 > 5 for "upsert". Help: Reduce it.'
    server.faults.fail(grpc.StatusCode.INVALID_ARGUMENT, strict, "Upsert", calls=1)
    with pytest.raises(BackendMisconfigured):
        collection.upsert(entries(20, 30))
    server.faults.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "Rate limit", "Upsert", calls=1)
    with pytest.raises(Overloaded):
        collection.upsert(entries(20, 30))
    assert collection.info().unfinished is None


def test_a_write_of_the_same_entries_waits_for_one_that_is_finished(
    server: QdrantStandIn, collection: ServerCollection
) -> None:
    fault = breaking(server)
    with pytest.raises(BackendUnavailable):
        collection.upsert(entries(0, 5, factor=2.0))
    calls = server.faults.calls["Upsert"]
    held = server.faults.black_hole("Upsert", calls=1)
    fault.lift()
    until(lambda: server.faults.calls["Upsert"] > calls)
    writer = threading.Thread(target=lambda: collection.upsert(entries(4, 6, factor=3.0)))
    writer.start()
    collection.upsert(entries(8, 9, factor=3.0))  # others do not wait
    held.lift()
    writer.join()
    until_finished(collection)
    found = values_of(collection)
    assert [found[n] for n in (3, 4, 5, 8)] == [12.0, 24.0, 30.0, 48.0]


def test_there_is_a_bound(
    server: QdrantStandIn, collection: ServerCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished_writes, "MOST_BYTES", 1000)
    with breaking_until_done(server, collection):
        with pytest.raises(BackendUnavailable, match="2 out of 3 shards"):
            collection.upsert(entries(20, 40))
        held = server.faults.fail(grpc.StatusCode.UNAVAILABLE, method="ListCollectionAliases")
        calls = server.faults.calls["Upsert"]
        with pytest.raises(BackendUnavailable, match="still to be finished"):
            collection.upsert(entries(40, 60))
        assert server.faults.calls["Upsert"] <= calls + 1  # the other one, again
        held.lift()
    assert ids_of(collection) == [*range(10), *range(20, 40)]
    collection.upsert(entries(40, 60))


class TestOnDisk:
    @pytest.fixture
    def backend(self, opened: Opened, data_dir: Path) -> ServerBackend:
        return opened(data_dir)

    def test_the_next_start_goes_on(
        self,
        server: QdrantStandIn,
        collection: ServerCollection,
        opened: Opened,
        data_dir: Path,
        fast_dir: Path,
    ) -> None:
        """After a kill, with another URL of the same server: perhaps with half a record at the file's end."""
        fault = breaking(server)
        broken = breaking(server, "Delete")
        with pytest.raises(BackendUnavailable):
            collection.upsert(entries(5, 15, factor=2.0))
        with pytest.raises(BackendUnavailable):
            collection.upsert(entries(14, 16, factor=3.0))
        with pytest.raises(BackendUnavailable):
            collection.delete(np.arange(3, dtype=np.uint64))
        unfinished = collection.info().unfinished
        assert unfinished is not None
        assert unfinished.on_disk
        shutil.copytree(data_dir, killed := fast_dir / "killed")
        [file] = killed.iterdir()
        file.write_bytes(file.read_bytes() + b"\x01half")
        again = opened(killed, f"{server.url}/").open("law/layer-000", SPEC)
        unfinished = again.info().unfinished
        assert unfinished is not None
        assert unfinished.ids == [0, 1, 2, *range(5, 16)]
        fault.lift()
        broken.lift()
        until_finished(again)
        expected = {3: 6.0, 4: 8.0} | {n: n * 4.0 for n in range(5, 14)} | {14: 84.0, 15: 90.0}
        assert values_of(again) == expected
        until_finished(collection)

    def test_what_came_later_is_not_undone_after_two_starts(
        self,
        server: QdrantStandIn,
        collection: ServerCollection,
        opened: Opened,
        data_dir: Path,
        fast_dir: Path,
    ) -> None:
        """What is superseded is left out of a file that is written anew."""
        fault = breaking(server)
        broken = breaking(server, "Delete")
        with pytest.raises(BackendUnavailable):
            collection.upsert(entries(20, 30))
        with pytest.raises(BackendUnavailable):
            collection.delete(np.arange(5, dtype=np.uint64))
        held = server.faults.fail(grpc.StatusCode.UNAVAILABLE, method="ListCollectionAliases")
        fault.lift()
        broken.lift()
        for change in (
            lambda: collection.delete(np.array([25], np.uint64)),
            lambda: collection.upsert(entries(4, 5, created=NOW - 1)),
        ):
            with pytest.raises(
                BackendUnavailable
            ):  # done, though it is not known whether it counts
                change()
        shutil.copytree(data_dir, killed := fast_dir / "killed")
        opened(killed).close()
        again = opened(killed).open("law/layer-000", SPEC)
        unfinished = again.info().unfinished
        assert unfinished is not None
        assert unfinished.ids == [0, 1, 2, 3, *range(20, 25), *range(26, 30)]
        held.lift()
        until_finished(again)
        assert ids_of(again) == [*range(4, 10), *range(20, 25), *range(26, 30)]

    def test_a_stop_leaves_it(
        self,
        server: QdrantStandIn,
        collection: ServerCollection,
        backend: ServerBackend,
        opened: Opened,
        data_dir: Path,
    ) -> None:
        fault = breaking(server)
        with pytest.raises(BackendUnavailable):
            collection.upsert(entries(20, 30))
        assert list(check_unfinished(data_dir)) == []  # the service says it itself
        backend.close()
        [found] = check_unfinished(data_dir)
        assert "did not acknowledge" in found.what
        again = opened(data_dir).open("law/layer-000", SPEC)
        assert again.info().unfinished is not None
        fault.lift()
        until_finished(again)
        assert ids_of(again)[-1] == 29

    def test_what_was_acknowledged_leaves_nothing(
        self, collection: ServerCollection, data_dir: Path
    ) -> None:
        collection.delete(np.array([1], np.uint64))
        [file] = data_dir.iterdir()
        assert file.stat().st_size == 0
        assert file.stat().st_mode & 0o777 == 0o600

    def test_it_is_one_service_s(
        self, collection: ServerCollection, opened: Opened, data_dir: Path
    ) -> None:
        with pytest.raises(DirectoryInUse, match="a --data of its own"):
            opened(data_dir)

    def test_a_long_file_is_written_anew(
        self,
        server: QdrantStandIn,
        collection: ServerCollection,
        data_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(unfinished_writes, "_LONG_FILE_BYTES", 10_000)
        fault = breaking(server)
        with pytest.raises(BackendUnavailable):
            collection.upsert(entries(20, 30))
        held = server.faults.fail(grpc.StatusCode.UNAVAILABLE, method="ListCollectionAliases")
        fault.lift()
        for start in range(100, 400, 10):
            with pytest.raises(BackendUnavailable):
                collection.upsert(entries(start, start + 10))
        [file] = data_dir.iterdir()
        assert file.stat().st_size < 20_000
        held.lift()
        until_finished(collection)
        assert file.stat().st_size == 0
        assert len(ids_of(collection)) == 320
