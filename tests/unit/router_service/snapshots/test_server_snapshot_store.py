"""Snapshots of a Qdrant server's memories, on the stand-in and on a real one: what is restored answers bit for bit."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import grpc as q

from router_service.arrays import Entries, Provenance
from router_service.backends.base import Compression, Quantization
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.errors import (
    Busy,
    Cancelled,
    CorruptMemory,
    InvalidField,
    MemoryExists,
    MemoryNotFound,
    SnapshotInvalid,
    SnapshotNotFound,
    StorageError,
)
from router_service.memories.deletion import delete_entries
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import Similarity
from router_service.snapshots import copying
from router_service.snapshots.base import SnapshotRef
from router_service.snapshots.local import LocalSnapshotStore
from router_service.snapshots.server import ServerSnapshotStore
from tests.engines import SERVERS, clean_server, url_of
from tests.unit.router_service.numbered_memory import (
    MODEL,
    SETTINGS,
    answers,
    assert_same_answers,
    counts,
    fill,
    numbered_entries,
    open_store,
)
from tests.unit.router_service.snapshots.server_memories import (
    MONDAY,
    Service,
    assert_same_entries,
    at,
    opened,
    quiet,
    stored,
)


@pytest.fixture(params=SERVERS)
def options(request: pytest.FixtureRequest) -> Iterator[ServerOptions]:
    with clean_server(url_of(request.param, request)) as found:
        yield found


@pytest.fixture
def directory(fast_dir: Path) -> Path:
    return fast_dir / "snapshots"


@pytest.fixture
def service(options: ServerOptions, directory: Path) -> Iterator[Service]:
    """With a memory `bible` of 100 entries in each layer."""
    with opened(options, directory) as (store, snapshot_store):
        fill(store.create("bible", MODEL, SETTINGS), 0, 100)
        yield store, snapshot_store


def after(monkeypatch: pytest.MonkeyPatch, step: str, act: Callable[[], object]) -> None:
    """Acts whenever a copy has done a step of the first layer."""
    original = getattr(copying.LayerCopy, step)

    def then_act(layer: copying.LayerCopy, *arguments: Any, **named: Any) -> Any:
        done = original(layer, *arguments, **named)
        if layer.name == "layer-000":
            act()
        return done

    monkeypatch.setattr(copying.LayerCopy, step, then_act)


def test_what_is_restored_answers_alike(service: Service) -> None:
    store, snapshot_store = service
    memory = store.get("bible")
    memory.layers[1].optimize(Compression(Quantization.INT8))
    before = answers(memory)
    [made] = snapshot_store.create("bible", "monday", quiet)
    assert (made.entries, made.write_pause_ms, made.problem) == (200, 0, "")
    assert list(snapshot_store.verify(MONDAY, quiet)) == snapshot_store.list("bible") == [made]
    [(copy, _)] = snapshot_store.restore(MONDAY, "copy", False, quiet)
    assert_same_answers(answers(copy), before)
    assert_same_entries(copy, memory)
    assert [each.info().compression.label for each in copy.layers] == ["none", "int8"]
    fill(memory, 100, 130)
    version = memory.version
    with pytest.raises(MemoryExists):
        list(snapshot_store.restore(MONDAY, "bible", False, quiet))
    [(restored, _)] = snapshot_store.restore(MONDAY, "bible", True, quiet)
    assert restored is store.get("bible")
    assert_same_answers(answers(restored), before)
    assert restored.version > version
    fill(restored, 100, 110)
    assert counts(restored) == [110, 110]


@pytest.mark.parametrize("packed", [False, True], ids=["directory", "archive"])
@pytest.mark.parametrize("similarity", list(Similarity))
def test_into_an_embedded_memory_and_back(
    service: Service, fast_dir: Path, similarity: Similarity, packed: bool
) -> None:
    """By an absolute path, or packed."""
    store, snapshot_store = service
    settings = replace(SETTINGS, similarity=similarity)
    memory = store.create("odd", MODEL, settings)
    memory.upsert(0, MODEL.digest(), numbered_entries(0, 60))
    memory.upsert(1, MODEL.digest(), odd_entries())
    memory.layers[0].optimize(Compression(Quantization.INT8))
    before = answers(memory)
    [made] = snapshot_store.create("odd", "monday", quiet)
    path = made.path
    if packed:
        [done] = snapshot_store.pack("odd", "monday", "monday.tar", quiet)
        path = done.archive
    with open_store(fast_dir / "data") as embedded:
        brought = LocalSnapshotStore(embedded, fast_dir / "embedded", 0, fast_dir / "packs")
        [(there, _)] = brought.restore(SnapshotRef(path=str(path)), "there", False, quiet)
        assert_same_entries(there, memory)
        assert_same_answers(answers(there), before)
        assert there.layers[0].info().compression == Compression(Quantization.INT8)
        there.layers[0].optimize()  # its index can be built
        [back] = brought.create("there", "tuesday", quiet)
        path = back.path
        if packed:
            [done] = brought.pack("there", "tuesday", "tuesday.tar", quiet)
            path = done.archive
        [(again, _)] = snapshot_store.restore(SnapshotRef(path=str(path)), "again", False, quiet)
        assert_same_entries(again, memory)
        assert_same_answers(answers(again), before)
        assert [each.info().compression.label for each in again.layers] == ["int8", "none"]


def odd_entries() -> Entries:
    """Ids over their whole range, keys and values from tiny to huge, provenance of every kind."""
    random = np.random.default_rng(3)
    ids = np.unique(random.integers(0, 2**63, 60, np.uint64))
    scale = 10.0 ** random.uniform(0, 12, (60, 1))
    scale[::2], scale[1] = 1, 1e-12  # of more tiny ones the distances would be the same
    keys = (random.normal(size=(60, MODEL.hidden_size)) * scale).astype(np.float32)
    values = (random.normal(size=(60, 4)) * scale).astype(np.float32)
    values[0] = -0.0
    origins = [
        Provenance("", "", 0, -1, 0.0, 0),
        Provenance("text", "e", 2**40, 7, 1.0, 1),
        *[Provenance("s\N{SNOWMAN}", f"e{n}", n, n, n / 7, 10**12 + n) for n in range(2, 60)],
    ]
    return Entries(ids, keys, values, origins)


def test_search_keys_that_a_server_lacks(service: Service, fast_dir: Path) -> None:
    """They are said, and the keys are searched themselves."""
    _, snapshot_store = service
    with open_store(fast_dir / "data") as embedded:
        memory = embedded.create("half", MODEL, SETTINGS)
        fill(memory, 0, 50)
        memory.layers[1].optimize(Compression(Quantization.FLOAT16))
        brought = LocalSnapshotStore(embedded, fast_dir / "embedded", 0)
        [made] = brought.create("half", "monday", quiet)
        [(there, remark)] = snapshot_store.restore(
            SnapshotRef(path=str(made.path)), "half", False, quiet
        )
        assert_same_entries(there, memory)
    assert [each.info().compression.label for each in there.layers] == ["none", "none"]
    assert remark.startswith("layer 1 was quantized as float16: this server does not have that")


def test_services_share_snapshots(
    service: Service, options: ServerOptions, directory: Path
) -> None:
    store, snapshot_store = service
    before = answers(store.get("bible"))
    [made] = snapshot_store.create("bible", "monday", quiet)
    with opened(options, directory) as (others, other):
        assert other.list("") == [made]
        fill(store.get("bible"), 100, 120)
        list(other.restore(MONDAY, "bible", True, at("copy", snapshot_store.sweep)))
        store.refresh()
        for each in (store, others):
            assert_same_answers(answers(each.get("bible")), before)
        assert store.get("bible").record == others.get("bible").record
        other.delete("bible", "monday")
    with pytest.raises(SnapshotNotFound, match="'monday' not found"):
        list(snapshot_store.verify(MONDAY, quiet))


def test_writes_and_deletions_meanwhile(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that came, changed or went after they were copied are in it as they are at the end."""
    store, snapshot_store = service
    memory = store.get("bible")

    def change() -> None:
        fill(memory, 95, 104)
        other = replace(numbered_entries(0, 3, 1), values=np.ones((3, 4), np.float32))
        memory.upsert(1, MODEL.digest(), other)
        memory.delete(0, np.array([50, 51], np.uint64))

    after(monkeypatch, "fill", change)
    [made] = snapshot_store.create("bible", "monday", quiet)
    assert (made.entries, made.write_pause_ms) == (206, 0)
    [(copy, _)] = snapshot_store.restore(MONDAY, "copy", False, quiet)
    assert_same_entries(copy, memory)


def test_a_key_that_changes_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """This service knows what it wrote itself, whatever a listing shows."""
    store, snapshot_store = service
    memory = store.get("bible")
    old = stored(memory, 0).slice(10, 12)

    def change() -> None:
        memory.upsert(0, MODEL.digest(), replace(old, keys=-old.keys))

    after(monkeypatch, "fill", change)
    list(snapshot_store.create("bible", "monday", quiet))
    [(copy, _)] = snapshot_store.restore(MONDAY, "copy", False, quiet)
    assert_same_entries(copy, memory)


def numbered(number: int, layer: int) -> Entries:
    """Entries that say which generation of writes they are of."""
    entries = numbered_entries(0, 5, layer)
    return replace(entries, values=np.full((5, 4), number, np.float32))


class Writer:
    """Writes generation after generation, layer by layer in order, until it is stopped."""

    def __init__(self, memory: RoutingMemory) -> None:
        self._memory, self._stopped, self.written = memory, threading.Event(), 0
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _write(self) -> None:
        while not self._stopped.is_set():
            for layer in range(MODEL.num_layers):
                self._memory.upsert(layer, MODEL.digest(), numbered(self.written + 1, layer))
            self.written += 1


def test_all_layers_are_of_one_moment(service: Service) -> None:
    """A generation is in the second layer only when it is in the first, and at most one is on its way."""
    store, snapshot_store = service
    with Writer(store.get("bible")) as writer:
        for name in ("one", "two"):
            before = writer.written
            [made] = snapshot_store.create("bible", name, quiet)
            assert made.write_pause_ms > 0
            [(copy, _)] = snapshot_store.restore(SnapshotRef("bible", name), name, False, quiet)
            found = [stored(copy, layer).values[:5] for layer in range(MODEL.num_layers)]
            first, second = (set(values.ravel().tolist()) for values in found)
            assert len(first) == len(second) == 1
            assert before <= second.pop() <= first.pop() <= second_of(found) + 1
    assert counts(store.get("bible")) == [100, 100]


def test_writes_go_on_while_the_last_listing_lasts(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes during it is not in the snapshot, nor half of it."""
    store, snapshot_store = service
    memory, generation = store.get("bible"), iter(range(1, 10**6))

    def write() -> None:
        number = next(generation)
        for layer in range(MODEL.num_layers):
            memory.upsert(layer, MODEL.digest(), numbered(number, layer))

    after(monkeypatch, "fill", write)
    after(monkeypatch, "changes", write)
    [made] = snapshot_store.create("bible", "monday", quiet)
    monkeypatch.undo()
    assert made.write_pause_ms > 0
    [(copy, _)] = snapshot_store.restore(MONDAY, "copy", False, quiet)
    found = [set(stored(copy, layer).values[:5].ravel().tolist()) for layer in (0, 1)]
    [first], [second] = found
    assert first == second < next(generation) - 1


def test_a_deletion_while_the_last_listing_lasts(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, snapshot_store = service
    memory, numbers = store.get("bible"), iter(range(1, 100))

    def forget() -> None:
        delete_entries(memory, memory.layers, np.array([next(numbers)], np.uint64))

    after(monkeypatch, "fill", forget)
    after(monkeypatch, "changes", forget)
    [made] = snapshot_store.create("bible", "monday", quiet)
    monkeypatch.undo()
    assert made.write_pause_ms > 0
    [(copy, _)] = snapshot_store.restore(MONDAY, "copy", False, quiet)
    gone = [set(range(100)) - set(stored(copy, layer).ids.tolist()) for layer in (0, 1)]
    assert gone[0] == gone[1] == set(range(1, 1 + len(gone[0])))
    assert len(gone[0]) < next(numbers) - 1


def test_a_write_that_hangs_holds_no_other_up_for_long(
    service: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the other layers wait for it the snapshot can be cancelled, and gives up at a limit."""
    store, snapshot_store = service
    memory = store.get("bible")

    def leave() -> None:
        raise Cancelled("the caller left")

    with memory.layers[1].gate.writing(np.array([1], np.uint64)):
        monkeypatch.setattr(copying, "_WRITES_END_S", math.inf)
        with pytest.raises(Cancelled, match="the caller left"):
            list(snapshot_store.create("bible", "monday", at("wait for writes", leave)))
        monkeypatch.setattr(copying, "_WRITES_END_S", 0.0)
        with pytest.raises(Busy, match="has not ended"):
            list(snapshot_store.create("bible", "monday", quiet))
        fill(memory, 100, 110)
    assert counts(memory) == [110, 110]
    assert snapshot_store.list("bible") == []
    assert list(directory.glob("**/layer-*")) == []


def second_of(found: list[Any]) -> float:
    """The generation that all of the second layer is of."""
    return float(found[1][0, 0])


def test_others_that_keep_writing(
    service: Service, options: ServerOptions, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their writes do not wait: when the listings never agree the snapshot fails, and says what to do."""
    store, snapshot_store = service
    with opened(options, directory) as (others, _):
        generation = iter(range(10**6))

        def write() -> None:
            for layer in range(MODEL.num_layers):
                entries = numbered(next(generation), layer)
                others.get("bible").upsert(layer, MODEL.digest(), entries)

        after(monkeypatch, "fill", write)
        after(monkeypatch, "changes", write)
        with pytest.raises(Busy, match=r"written to by others than this service.*pause the other"):
            list(snapshot_store.create("bible", "monday", quiet))
        monkeypatch.undo()
        assert snapshot_store.list("") == []
        fill(store.get("bible"), 100, 101)  # nothing waits any more
        after(monkeypatch, "fill", write)
        [made] = snapshot_store.create("bible", "monday", quiet)
        [(copy, _)] = snapshot_store.restore(MONDAY, "copy", False, quiet)
        assert_same_entries(copy, store.get("bible"))
        assert made.entries == 202


@pytest.mark.parametrize("again", [True, False], ids=["replaced", "deleted"])
def test_a_memory_that_goes_while_it_is_copied(
    service: Service,
    options: ServerOptions,
    directory: Path,
    again: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, snapshot_store = service
    with opened(options, directory) as (others, _):

        def change() -> None:
            others.delete("bible")
            if again:
                fill(others.create("bible", MODEL, SETTINGS), 0, 5)

        for step in ("fill", "changes"):
            after(monkeypatch, step, change)
            with pytest.raises((Busy, MemoryNotFound), match=r"replaced or deleted|'bible'"):
                list(snapshot_store.create("bible", "monday", quiet))
            monkeypatch.undo()
            if not again:
                fill(others.create("bible", MODEL, SETTINGS), 0, 5)
    assert snapshot_store.list("") == []


def test_a_cancelled_snapshot_leaves_nothing(service: Service, directory: Path) -> None:
    store, snapshot_store = service

    def cancel() -> None:
        raise Cancelled("a client asked for it")

    for stage in ("copy entries", "list", "sum"):
        with pytest.raises(Cancelled):
            list(snapshot_store.create("bible", "monday", at(stage, cancel)))
        assert snapshot_store.list("") == []
        assert [path.name for path in (directory / "bible").iterdir()] == ["LOCK"]
    fill(store.get("bible"), 100, 101)
    [made] = snapshot_store.create("bible", "monday", quiet)
    assert snapshot_store.list("") == list(snapshot_store.verify(MONDAY, quiet)) == [made]


def test_a_cancelled_restore_changes_nothing(service: Service, directory: Path) -> None:
    store, snapshot_store = service
    list(snapshot_store.create("bible", "monday", quiet))
    fill(store.get("bible"), 100, 120)

    def cancel() -> None:
        raise Cancelled("a client asked for it")

    def restore_too() -> None:
        list(snapshot_store.restore(MONDAY, "bible", True, quiet))

    for stage in ("check", "copy entries"):
        with pytest.raises(Cancelled):
            list(snapshot_store.restore(MONDAY, "bible", True, at(stage, cancel)))
    with pytest.raises(Busy, match="'bible' is being restored already"):
        list(snapshot_store.restore(MONDAY, "bible", True, at("copy", restore_too)))
    assert counts(store.get("bible")) == [120, 120]
    assert [path.name for path in directory.iterdir()] == ["bible"]


def test_a_damaged_snapshot_changes_nothing(service: Service) -> None:
    """Also one whose files are right and are not what its manifest says; its own files are never opened."""
    store, snapshot_store = service
    [made] = snapshot_store.create("bible", "monday", quiet)
    before = answers(store.get("bible"))
    victim = sorted(Path(made.path).glob("layer-001/gen-000000/shard/segments/*/**/*"))
    victim = [path for path in victim if path.is_file() and path.stat().st_size]
    whole = victim[0].read_bytes()
    victim[0].write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    for call in (
        lambda: snapshot_store.verify(MONDAY, quiet),
        lambda: snapshot_store.restore(MONDAY, "bible", True, quiet),
    ):
        with pytest.raises(SnapshotInvalid, match="has other content than when"):
            list(call())
    victim[0].write_bytes(whole)
    assert_same_answers(answers(store.get("bible")), before)
    list(snapshot_store.restore(MONDAY, "bible", True, quiet))
    assert list(snapshot_store.verify(MONDAY, quiet)) == [made]


@pytest.mark.parametrize("act", ["lost", "added"])
def test_a_server_that_does_not_keep_what_is_restored(
    service: Service, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """What it lists is compared with what was written; nothing is left of it."""
    store, snapshot_store = service
    list(snapshot_store.create("bible", "monday", quiet))
    before, fill_collection = answers(store.get("bible")), ServerCollection.fill

    def fill_otherwise(collection: ServerCollection, entries: Entries) -> None:
        changed = entries.slice(0, len(entries) - 1) if act == "lost" else numbered_entries(0, 101)
        fill_collection(collection, changed)

    monkeypatch.setattr(ServerCollection, "fill", fill_otherwise)
    with pytest.raises(CorruptMemory, match="does not hold what was written to it"):
        list(snapshot_store.restore(MONDAY, "bible", True, quiet))
    monkeypatch.undo()
    assert_same_answers(answers(store.get("bible")), before)


def test_a_memory_whose_collection_is_lost(
    service: Service, options: ServerOptions, directory: Path
) -> None:
    """It is set aside at the next start; a snapshot takes its place."""
    store, snapshot_store = service
    before = answers(store.get("bible"))
    list(snapshot_store.create("bible", "monday", quiet))
    connection = Connection(options)
    reply = connection.call("collections", "List", q.ListCollectionsRequest(), 30.0)
    [lost] = [each.name for each in reply.collections if "bible~layer-001" in each.name]
    connection.call("collections", "Delete", q.DeleteCollection(collection_name=lost), 30.0)
    connection.close()
    with opened(options, directory) as (store, other):
        assert list(store.broken) == ["bible"]
        [(restored, _)] = other.restore(MONDAY, "bible", True, quiet)
        assert_same_answers(answers(restored), before)
        assert not store.broken


def test_without_a_directory(service: Service, options: ServerOptions) -> None:
    """The setting is named."""
    store, snapshot_store = service
    nowhere = ServerSnapshotStore(store, snapshot_store.backend, None)
    for call in (
        lambda: nowhere.create("bible", "", quiet),
        lambda: nowhere.list(""),
        lambda: nowhere.restore(SnapshotRef(path="/x"), "copy", False, quiet),
    ):
        with pytest.raises(InvalidField, match=r"--snapshot-dir DIR .ROUTER_SERVICE_SNAPSHOT_DIR."):
            list(call())


def test_a_disk_that_is_full(service: Service, directory: Path) -> None:
    store, snapshot_store = service
    full = ServerSnapshotStore(store, snapshot_store.backend, directory, 2**60)
    with pytest.raises(StorageError, match="bytes free"):
        list(full.create("bible", "monday", quiet))
    list(snapshot_store.create("bible", "monday", quiet))
    with pytest.raises(StorageError, match="bytes free"):
        list(full.restore(MONDAY, "copy", False, quiet))
    assert [path.name for path in directory.iterdir()] == ["bible"]
    assert store.names() == ["bible"]
