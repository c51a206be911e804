"""Making, finding and removing memories; a failure leaves nothing behind and nothing closed that serves."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_service import __version__
from router_service.arrays import Entries, Provenance
from router_service.backends.base import CollectionSpec
from router_service.backends.exact import ExactBackend, ExactCollection
from router_service.errors import (
    Busy,
    Cancelled,
    CorruptMemory,
    DirectoryInUse,
    InvalidField,
    MemoryExists,
    MemoryNotFound,
    NewerFormat,
    StorageError,
)
from router_service.fingerprint import ModelFingerprint
from router_service.memories.settings import Kind, MemorySettings, Similarity
from router_service.memories.store import MemoryStore
from tests.unit.router_service.memories.directory_backend import DirectoryBackend

MODEL = ModelFingerprint("tiny", 3, 4, 5, 2, "ab")
SETTINGS = MemorySettings(similarity=Similarity.RBF)


@pytest.fixture
def backend(tmp_path: Path) -> DirectoryBackend:
    return DirectoryBackend(tmp_path)


@pytest.fixture
def store(backend: DirectoryBackend, tmp_path: Path) -> Iterator[MemoryStore]:
    made = MemoryStore(backend, tmp_path)
    made.open_all()
    yield made
    made.close()


def _reopened(store: MemoryStore, backend: DirectoryBackend) -> MemoryStore:
    store.close()
    again = MemoryStore(backend, store.directory)
    again.open_all()
    return again


def _entries(rows: int) -> Entries:
    return Entries(
        np.arange(rows, dtype=np.uint64),
        np.ones((rows, MODEL.hidden_size), np.float32),
        np.ones((rows, MODEL.num_experts), np.float32),
        [Provenance()] * rows,
    )


def test_a_memory_has_a_collection_per_layer(store: MemoryStore, backend: DirectoryBackend) -> None:
    memory = store.create("m", MODEL, SETTINGS)
    assert backend.names() == [f"m/layer-00{number}" for number in range(3)]
    assert store.get("m") is memory
    assert store.names() == ["m"]
    assert store.memories() == [memory]


@pytest.mark.parametrize(
    "failure", [StorageError("no room"), OSError(28, "No space left"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_failed_creation_leaves_nothing(
    store: MemoryStore,
    backend: DirectoryBackend,
    tmp_path: Path,
    failure: BaseException,
    layer: int,
) -> None:
    backend.fail_at = {f"m/layer-00{layer}": failure}
    with pytest.raises(type(failure)):
        store.create("m", MODEL, SETTINGS)
    assert list(tmp_path.iterdir()) == []
    assert backend.names() == []
    assert store.names() == []
    backend.fail_at = {}
    store.create("m", MODEL, SETTINGS)


def test_others_are_served_while_one_is_created(
    store: MemoryStore, backend: DirectoryBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create("other", MODEL, SETTINGS)
    begun, may_go_on, create = threading.Event(), threading.Event(), backend.create

    def slow(name: str, spec: CollectionSpec) -> ExactCollection:
        begun.set()
        assert may_go_on.wait(60)
        return create(name, spec)

    monkeypatch.setattr(backend, "create", slow)
    with ThreadPoolExecutor(1) as pool:
        creating = pool.submit(store.create, "m", MODEL, SETTINGS)
        assert begun.wait(60)
        with store.exclusive():
            assert store.names() == ["other"]
        store.flush()
        with pytest.raises(Busy, match="being created"):
            store.create("m", MODEL, SETTINGS)
        store.delete("other")
        may_go_on.set()
        assert [layer.layer for layer in creating.result().layers] == [0, 1, 2]
    assert store.names() == ["m"]


def test_a_creation_whose_caller_left_leaves_nothing(
    store: MemoryStore, backend: DirectoryBackend, tmp_path: Path
) -> None:
    calls = itertools.count()

    def check() -> None:
        if next(calls) == 3:  # every layer is there, the manifest is not
            raise Cancelled("gone")

    with pytest.raises(Cancelled):
        store.create("m", MODEL, SETTINGS, check)
    assert list(tmp_path.iterdir()) == []
    assert backend.names() == []
    store.create("m", MODEL, SETTINGS)


def test_a_failed_manifest_leaves_nothing(
    store: MemoryStore, backend: DirectoryBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("no room")

    monkeypatch.setattr("router_service.memories.catalogue.write_manifest", full)
    with pytest.raises(StorageError, match="no room"):
        store.create("m", MODEL, SETTINGS)
    assert list(tmp_path.iterdir()) == []
    assert backend.names() == []


def test_a_creation_does_not_touch_a_directory_that_is_not_its_own(
    store: MemoryStore, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="File exists"):
        store.create("m", MODEL, SETTINGS)
    assert (tmp_path / "m" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "-a", "a" * 65, "a\n", "x.deleted", "ü"])
def test_names(store: MemoryStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidField, match="name"):
        store.create(name, MODEL, SETTINGS)
    with pytest.raises(MemoryNotFound):
        store.get(name)
    assert list(tmp_path.iterdir()) == []


def test_create_twice(store: MemoryStore) -> None:
    store.create("m", MODEL, SETTINGS)
    with pytest.raises(MemoryExists):
        store.create("m", MODEL, SETTINGS)


def test_an_unknown_name_is_told_the_known_ones(store: MemoryStore) -> None:
    with pytest.raises(MemoryNotFound, match="none; create one"):
        store.get("x")
    store.create("m", MODEL, SETTINGS)
    with pytest.raises(MemoryNotFound, match="this service has: m"):
        store.get("x")


def test_what_was_stored_comes_back(store: MemoryStore, backend: DirectoryBackend) -> None:
    memory = store.create("m", MODEL, SETTINGS)
    memory.upsert(1, MODEL.digest(), _entries(4))
    store.change_settings("m", {"neighbours": 7})
    record = store.get("m").record
    again = _reopened(store, backend)
    assert again.get("m").record == record
    assert again.get("m").record.settings.neighbours == 7
    assert again.get("m").layer(1).info().entries == 4


def test_settings_that_are_refused_change_nothing(store: MemoryStore, tmp_path: Path) -> None:
    memory = store.create("m", MODEL, SETTINGS)
    before = (memory.record, memory.version, (tmp_path / "m" / "memory.json").read_bytes())
    for changes in ({"neighbours": 0}, {"kind": Kind.ASSIGNMENT}, {"gamma": (1.0, 2.0)}):
        with pytest.raises(InvalidField):
            store.change_settings("m", changes)
    after = (memory.record, memory.version, (tmp_path / "m" / "memory.json").read_bytes())
    assert after == before


def test_delete(store: MemoryStore, backend: DirectoryBackend, tmp_path: Path) -> None:
    store.create("m", MODEL, SETTINGS).upsert(0, MODEL.digest(), _entries(3))
    store.create("kept", MODEL, SETTINGS)
    assert store.delete("m") == 3
    assert store.names() == ["kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert all(name.startswith("kept/") for name in backend.names())
    with pytest.raises(MemoryNotFound):
        store.delete("m")


def test_a_deletion_that_a_crash_cut_short_is_finished(
    store: MemoryStore, backend: DirectoryBackend, tmp_path: Path
) -> None:
    (tmp_path / "m.deleted" / "layer-000").mkdir(parents=True)
    _reopened(store, backend)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [CorruptMemory("torn"), CorruptMemory("missing")])
def test_a_damaged_memory_is_set_aside_and_the_others_serve(
    store: MemoryStore, backend: DirectoryBackend, tmp_path: Path, error: CorruptMemory
) -> None:
    for name in ("bad", "good"):
        store.create(name, MODEL, SETTINGS)
    backend.fail_at = {"bad/layer-001": error}
    again = _reopened(store, backend)
    assert again.names() == ["good"]
    for use in (again.get, again.delete, lambda name: again.create(name, MODEL, SETTINGS)):
        with pytest.raises(CorruptMemory, match=f"set aside at start: {error}"):
            use("bad")
    assert (tmp_path / "bad" / "memory.json").exists()
    backend.fail_at = {}
    assert _reopened(again, backend).names() == ["bad", "good"]


def test_a_memory_that_another_process_holds_ends_the_start(
    store: MemoryStore, backend: DirectoryBackend
) -> None:
    store.create("m", MODEL, SETTINGS)
    backend.fail_at = {"m/layer-001": DirectoryInUse("held")}
    with pytest.raises(DirectoryInUse):
        _reopened(store, backend)
    backend.fail_at = {}
    assert _reopened(store, backend).names() == ["m"]


def test_an_unfinished_creation_is_removed_and_a_lost_manifest_is_not(
    store: MemoryStore, backend: DirectoryBackend, tmp_path: Path
) -> None:
    store.create("lost", MODEL, SETTINGS)
    (tmp_path / "lost" / "memory.json").unlink()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "CREATING").touch()
    again = _reopened(store, backend)
    assert again.names() == []
    assert set(again.broken) == {"lost"}
    assert [path.name for path in tmp_path.iterdir()] == ["lost"]


def test_a_manifest_of_a_newer_version_is_set_aside(
    store: MemoryStore, backend: DirectoryBackend, tmp_path: Path
) -> None:
    store.create("m", MODEL, SETTINGS)
    path = tmp_path / "m" / "memory.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = _reopened(store, backend)
    for call in (again.get, lambda name: again.create(name, MODEL, SETTINGS)):
        with pytest.raises(NewerFormat, match=f"format 99, .*{__version__}, reads up to 1"):
            call("m")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_close_closes_the_others_when_one_fails(
    store: MemoryStore, backend: DirectoryBackend
) -> None:
    class Torn(ExactCollection):
        def close(self) -> None:
            super().close()
            raise StorageError("torn")

    memory = store.create("m", MODEL, SETTINGS)
    torn: Any = memory.layers[0].collection
    torn.__class__ = Torn
    with pytest.raises(StorageError, match="torn"):
        store.close()
    torn.__class__ = ExactCollection
    assert all(layer.collection.closed for layer in memory.layers)  # type: ignore[attr-defined]
    assert store.names() == []


def test_in_ram_there_are_no_files(tmp_path: Path) -> None:
    backend = ExactBackend()
    store = MemoryStore(backend, None)
    store.open_all()
    store.create("m", MODEL, SETTINGS).upsert(0, MODEL.digest(), _entries(2))
    store.change_settings("m", {"neighbours": 3})
    store.flush()
    assert store.delete("m") == 2
    store.create("m", MODEL, SETTINGS)
    assert store.get("m").layer(0).info().entries == 0
    store.close()


def test_flush_while_memories_come_and_go(store: MemoryStore) -> None:
    """A background flush never meets a closed collection (those raise)."""
    failures: list[BaseException] = []
    stop = threading.Event()

    def flush() -> None:
        while not stop.is_set():
            try:
                store.flush()
            except StorageError as error:
                failures.append(error)

    flusher = threading.Thread(target=flush)
    flusher.start()
    for _ in range(20):
        store.create("m", MODEL, SETTINGS)
        store.delete("m")
    stop.set()
    flusher.join()
    assert failures == []
