"""What a service answers, and what becomes of its writes, while another one replaces a memory that both serve.

Everything of the old memory or everything of the new one; nothing is written to what is gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from router_service.backends.qdrant_server.records import Records
from router_service.errors import (
    BackendUnavailable,
    Busy,
    CollectionClosed,
    MemoryNotFound,
    ModelMismatch,
)
from router_service.memories import swap
from router_service.memories.layer import RouteAnswer
from router_service.memories.memory import RoutingMemory
from router_service.memories.store import MemoryStore
from router_service.memories.swap import replace_memory
from router_service.operations import Operations
from router_service.settings import QdrantSettings, ServiceSettings
from router_service.snapshots import server as server_snapshots
from router_service.snapshots.base import SnapshotRef
from router_service.snapshots.local import LocalSnapshotStore
from router_service.storage import make_snapshot_store, make_store, opened_store
from tests.qdrant_standin import QdrantStandIn
from tests.unit.router_service.numbered_memory import (
    MODEL,
    OTHER_MODEL,
    SETTINGS,
    answers,
    assert_same_answers,
    counts,
    fill,
    numbered_entries,
)

OLD, NEW = 60, 40
QDRANT = QdrantSettings(timeout_s=60.0)


@pytest.fixture
def server(fast_dir: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(fast_dir / "qdrant") as running:
        yield running


@pytest.fixture
def store(server: QdrantStandIn) -> Iterator[MemoryStore]:
    """`bible`, and `rebuilt`, to take its place; they are read in different ways."""
    with opened_store(server.url, QDRANT) as opened:
        fill(opened.create("bible", MODEL, SETTINGS), 0, OLD)
        settings = replace(SETTINGS, neighbours=3, gamma=(0.02, 0.03))
        fill(opened.create("rebuilt", MODEL, settings), 0, NEW)
        yield opened


@pytest.fixture
def other(server: QdrantStandIn, store: MemoryStore) -> Iterator[MemoryStore]:
    """Those of another service, which looks at nothing by itself."""
    with opened_store(server.url, QDRANT) as opened:
        yield opened


def replaced(store: MemoryStore, before_end: Callable[[], Any] = lambda: None) -> RoutingMemory:
    """`rebuilt` serves as `bible`; `before_end` is called while the entries that it replaced are still there."""
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(sleep=lambda _: before_end(), time_ns=swap.time.time_ns)
        patch.setattr(swap, "time", clock)
        return replace_memory(store, Operations(), "bible", "rebuilt").memory


def asked(store: MemoryStore) -> list[RouteAnswer]:
    return store.asked("bible", answers)


def write(store: MemoryStore, start: int, stop: int) -> None:
    store.asked("bible", lambda memory: fill(memory, start, stop))


def test_all_old_until_the_old_is_gone_then_all_new(store: MemoryStore, other: MemoryStore) -> None:
    old, new = asked(store), answers(store.get("rebuilt"))
    version = other.get("bible").version

    def before_end() -> None:
        assert_same_answers(asked(store), new)
        assert_same_answers(asked(other), old)
        assert {answer.version for answer in asked(other)} == {version}

    replaced(store, before_end)
    found = asked(other)
    assert_same_answers(found, new)
    assert {answer.version for answer in found} == {version + 1}
    assert other.get("bible").record == store.get("bible").record
    with pytest.raises(MemoryNotFound):
        other.asked("rebuilt", answers)


def test_the_record_is_enough(store: MemoryStore, other: MemoryStore) -> None:
    """Also while the old one is there; what had begun on it is answered, and begins no more."""
    new, serving = answers(store.get("rebuilt")), other.get("bible")

    def before_end() -> None:
        other.refresh()
        assert_same_answers(asked(other), new)
        with pytest.raises(CollectionClosed):
            answers(serving)

    replaced(store, before_end)


def test_writes_of_the_other_service_are_not_lost(store: MemoryStore, other: MemoryStore) -> None:
    """Not in the moment in which both are there, and not afterwards."""
    stale = other.get("bible")

    def before_end() -> None:
        with pytest.raises(CollectionClosed, match="which was"):
            fill(stale, OLD, OLD + 1)
        write(other, OLD, OLD + 5)
        other.asked("bible", lambda memory: memory.delete(0, np.arange(3, dtype=np.uint64)))

    replaced(store, before_end)
    assert counts(store.get("bible")) == [NEW + 5 - 3, NEW + 5]
    write(other, OLD, OLD + 7)
    assert counts(store.get("bible")) == [NEW + 7 - 3, NEW + 7]


def test_a_deletion_that_finds_nothing_is_made_again(
    store: MemoryStore, other: MemoryStore
) -> None:
    """What the old one had not, the new one may have."""
    ids = np.array([OLD + 9], np.uint64)
    stale = other.get("bible")
    store.get("rebuilt").upsert(1, MODEL.digest(), numbered_entries(OLD + 9, OLD + 10, 1))

    def before_end() -> None:
        with pytest.raises(CollectionClosed):
            stale.delete(1, ids)
        assert other.asked("bible", lambda memory: memory.delete(1, ids)) == 1

    replaced(store, before_end)
    assert counts(store.get("bible")) == [NEW, NEW]


def test_writes_to_a_memory_that_has_another_name_now(
    store: MemoryStore, other: MemoryStore
) -> None:
    stale = other.get("rebuilt")
    replaced(store)
    with pytest.raises(CollectionClosed, match=r"which was 'knnmoe~rebuilt~layer-000'"):
        fill(stale, 0, NEW)
    with pytest.raises(MemoryNotFound):
        other.asked("rebuilt", lambda memory: fill(memory, 0, NEW))


def test_settings_that_the_other_service_changes(store: MemoryStore, other: MemoryStore) -> None:
    """They are those of the new one, and what was not changed is its own."""
    replaced(store)
    other.change_settings("bible", {"min_lambda": 0.25})
    store.refresh()
    settings = store.get("bible").record.settings
    assert (settings.neighbours, settings.min_lambda) == (3, 0.25)
    assert counts(other.get("bible")) == counts(store.get("bible")) == [NEW] * 2


def test_settings_that_were_measured_on_what_was_replaced(
    store: MemoryStore, other: MemoryStore
) -> None:
    measured = other.get("bible")
    replaced(store)
    with pytest.raises(Busy, match="'bible' was replaced while it was measured"):
        other.change_settings("bible", {"gamma": (1.0, 1.0)}, measured)
    assert other.get("bible").record == store.get("bible").record


def test_settings_that_the_other_service_changes_just_then(
    store: MemoryStore, other: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the old one do not come back with its entries, which go."""
    new = answers(store.get("rebuilt"))

    def before_end() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(other, "refresh", lambda: None)  # it has looked just before
            other.change_settings("bible", {"min_lambda": 0.25})

    replaced(store, before_end)
    for each in (store, other):
        each.refresh()
        assert_same_answers(asked(each), new)


def test_versions_count_what_a_service_itself_wrote(store: MemoryStore, other: MemoryStore) -> None:
    """Its own writes raise the number once they are acknowledged; those of others are read all the same."""
    before = {each.version for each in asked(other)}
    write(store, OLD, OLD + 5)
    assert_same_answers(asked(other), asked(store))
    assert {each.version for each in asked(other)} == before == {other.get("bible").version}
    other.asked("bible", lambda memory: memory.delete(0, np.arange(3, dtype=np.uint64)))
    assert {each.version for each in asked(other)} == {version + 1 for version in before}


def test_deleted_and_made_again_for_another_model(store: MemoryStore, other: MemoryStore) -> None:
    """Clients of the old one are refused; nothing of theirs is stored."""
    store.delete("bible")
    store.create("bible", OTHER_MODEL, SETTINGS)
    for use in (answers, lambda memory: fill(memory, 0, 3)):
        with pytest.raises(ModelMismatch):
            other.asked("bible", use)
    assert counts(store.get("bible")) == [0, 0]
    other.delete("bible")
    store.refresh()
    assert store.names() == ["rebuilt"]


def quiet(stage: str, done: int, total: int) -> None:
    """A Report."""


RESTORED = SnapshotRef("bible", "monday"), "bible", True, quiet


@pytest.fixture
def restoring(
    server: QdrantStandIn, store: MemoryStore, fast_dir: Path
) -> Iterator[tuple[MemoryStore, LocalSnapshotStore]]:
    """Another service and its snapshots: `monday` of `bible`, which has other entries and settings since."""
    settings = ServiceSettings(
        backend=server.url, data=None, snapshot_dir=fast_dir / "snapshots", qdrant=QDRANT
    )
    backend, made = make_store(settings)
    made.open_all()
    snapshots = make_snapshot_store(settings, backend, made)
    list(snapshots.create("bible", "monday", quiet))
    write(made, OLD, OLD + 20)
    made.change_settings("bible", {"neighbours": 2})
    store.refresh()
    yield made, snapshots
    made.close()
    backend.close()


def test_a_memory_that_is_restored_in_place(
    store: MemoryStore,
    restoring: tuple[MemoryStore, LocalSnapshotStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restorer, snapshots = restoring
    old = asked(store)

    def before_end(_: float) -> None:
        assert restorer.asked("bible", counts) == [OLD] * 2
        assert_same_answers(asked(store), old)
        write(store, OLD, OLD + 3)

    clock = SimpleNamespace(
        sleep=before_end,
        time_ns=server_snapshots.time.time_ns,
        monotonic=server_snapshots.time.monotonic,
    )
    monkeypatch.setattr(server_snapshots, "time", clock)
    list(snapshots.restore(*RESTORED))
    assert store.asked("bible", counts) == [OLD + 3] * 2
    assert store.get("bible").record.settings.neighbours == SETTINGS.neighbours
    assert store.get("bible").record == restorer.get("bible").record


@contextmanager
def away_after_aliases_changed(server: QdrantStandIn) -> Iterator[None]:
    """From then on nothing can be written down."""
    before = server.faults.before

    def then_fail(path: str, context: Any) -> None:
        before(path, context)
        if path.endswith("UpdateAliases"):
            server.faults.fail(grpc.StatusCode.UNAVAILABLE, method="Upsert")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.faults, "before", then_fail)
        yield
    server.faults.lift()


def test_a_server_that_goes_away_before_the_record_is_written(
    server: QdrantStandIn, store: MemoryStore, other: MemoryStore
) -> None:
    """All old until the next look after its return, then all new, for either service; writes wait until then."""
    old, new = asked(store), answers(store.get("rebuilt"))
    with away_after_aliases_changed(server):
        with pytest.raises(BackendUnavailable, match="shows soon after the server's return"):
            replaced(store)
        for each in (store, other):
            assert_same_answers(asked(each), old)
    with opened_store(server.url, QDRANT) as late:  # finishes it
        assert_same_answers(asked(late), new)
    for each in (store, other):
        assert_same_answers(asked(each), new)
    for each in (store, other):
        write(each, 0, NEW + 1)
    assert counts(store.get("bible")) == [NEW + 1] * 2


def test_who_began_it_finishes_it(
    server: QdrantStandIn, store: MemoryStore, other: MemoryStore
) -> None:
    """At its next look, not when it would be taken for killed."""
    old, new = asked(other), answers(store.get("rebuilt"))
    with away_after_aliases_changed(server), pytest.raises(BackendUnavailable):
        replaced(store)
    with pytest.raises(CollectionClosed):
        fill(other.get("bible"), 0, OLD)
    other.refresh()
    assert_same_answers(asked(other), old)
    store.refresh()
    for each in (store, other):
        assert_same_answers(asked(each), new)
        assert each.names() == ["bible"]


def test_a_server_that_goes_away_before_the_record_of_what_is_restored_is_written(
    server: QdrantStandIn, store: MemoryStore, restoring: tuple[MemoryStore, LocalSnapshotStore]
) -> None:
    restorer, snapshots = restoring
    old = asked(store)
    with away_after_aliases_changed(server):
        with pytest.raises(BackendUnavailable):
            list(snapshots.restore(*RESTORED))
        for each in (store, restorer):
            assert_same_answers(asked(each), old)
    restorer.refresh()
    store.refresh()
    for each in (store, restorer):
        assert each.asked("bible", counts) == [OLD] * 2
        assert each.get("bible").record.settings.neighbours == SETTINGS.neighbours
    write(store, OLD, OLD + 3)
    assert counts(restorer.get("bible")) == [OLD + 3] * 2


def test_replaced_between_reading_its_record_and_opening_it(
    server: QdrantStandIn, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set aside, for its collections are gone; found again when somebody asks for it."""
    new, opened = answers(store.get("rebuilt")), MemoryStore.open_layers

    def after_that(self: MemoryStore, record: Any) -> Any:
        if record.name == "bible":
            monkeypatch.undo()
            replaced(store)
        return opened(self, record)

    monkeypatch.setattr(MemoryStore, "open_layers", after_that)
    with opened_store(server.url, QDRANT) as late:
        assert_same_answers(asked(late), new)
        assert late.broken == {}


def test_records_of_earlier_versions(server: QdrantStandIn, store: MemoryStore) -> None:
    """They do not name collections: aliases lead to them, and a swap writes down what they led to."""
    old, new = asked(store), answers(store.get("rebuilt"))
    connection = store._backend.connection  # type: ignore[attr-defined]
    records = Records(connection, "knnmoe~memories")
    for name in ("bible", "rebuilt"):
        fields = records.read(name)
        assert fields is not None
        bare = json.loads(fields["record"])
        del bare["collections"], bare["crc32"]
        records.write(name, {"name": name, "state": "ready", "record": json.dumps(bare)})
    with opened_store(server.url, QDRANT) as late, opened_store(server.url, QDRANT) as other:
        assert_same_answers(asked(late), old)
        with away_after_aliases_changed(server), pytest.raises(BackendUnavailable):
            replaced(late)
        other.refresh()
        assert_same_answers(asked(other), old)
        late.refresh()
        for each in (late, other):
            assert_same_answers(asked(each), new)
