"""A memory on disk takes the place of another: whatever fails, and whenever the service ends, none is lost."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_service.backends.base import Report
from router_service.backends.disk import copy_tree
from router_service.backends.exact import ExactBackend
from router_service.errors import Busy, MemoryNotFound, StorageError
from router_service.memories import swap
from router_service.memories.memory import RoutingMemory, close_all
from router_service.memories.store import MemoryStore
from router_service.memories.swap import replace_memory
from router_service.operations import Operations
from router_service.snapshots import local
from router_service.snapshots.local import SnapshotInfo
from tests.unit.router_service.numbered_memory import (
    MODEL,
    SETTINGS,
    answers,
    assert_same_answers,
    counts,
    fill,
    open_store,
)

OLD, NEW = 300, 40


@pytest.fixture
def rebuilt(store: MemoryStore, memory: RoutingMemory) -> RoutingMemory:
    """A memory named `rebuilt`, to take the place of `bible`."""
    return rebuild(store)


def rebuild(store: MemoryStore) -> RoutingMemory:
    made = store.create("rebuilt", MODEL, SETTINGS)
    fill(made, 0, NEW)
    return store.change_settings("rebuilt", {"neighbours": 3})


def replace(store: MemoryStore, name: str = "bible", by: str = "rebuilt") -> RoutingMemory:
    return replace_memory(store, Operations(), name, by, retire_after_s=0).memory


def files(directory: Path) -> list[str]:
    """Directories and manifests; the engine's files and hit counts come and go."""
    paths = (path.relative_to(directory) for path in directory.rglob("*"))
    return sorted(str(path) for path in paths if len(path.parts) <= 3 and path.suffix != ".npz")


def check_both(store: MemoryStore) -> None:
    assert (store.names(), store.broken) == (["bible", "rebuilt"], {})
    assert counts(store.get("bible")) == [OLD] * 2
    assert store.get("bible").record.settings.neighbours == 5
    assert counts(store.get("rebuilt")) == [NEW] * 2
    assert store.get("rebuilt").record.settings.neighbours == 3


def check_replaced(store: MemoryStore) -> None:
    assert (store.names(), store.broken) == (["bible"], {})
    assert counts(store.get("bible")) == [NEW] * 2
    assert store.get("bible").record.settings.neighbours == 3


def check_nothing_is_left(data: Path) -> None:
    """No mark, and layers of no memory but those that serve."""
    assert list(data.rglob("CAME-FROM")) == []
    for home in data.iterdir():
        if home.is_dir():
            assert len(list(home.rglob("layer-*"))) == MODEL.num_layers


class Moments:
    """Copies of a directory before each step that changes what leads where, as a kill would leave it.

    A memory that made room closes meanwhile, in a thread of its own: its steps wait for a copy that is being made.
    """

    def __init__(self, directory: Path, target: Path) -> None:
        self.directory, self.target = directory, target
        self.copies: list[Path] = []
        self._last: Any = None
        self._alone = threading.RLock()

    def note(self) -> None:
        with self._alone:
            manifests = [path.read_bytes() for path in sorted(self.directory.rglob("memory.json"))]
            state = manifests, files(self.directory)
            if state != self._last:
                self._last = state
                self.copies.append(self.target / str(len(self.copies)))
                copy_tree(self.directory, self.copies[-1])

    @contextmanager
    def noted(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (
                *((Path, "rename"), (Path, "replace"), (Path, "unlink")),
                (shutil, "rmtree"),
            ):
                patch.setattr(owner, name, self._before(getattr(owner, name)))
            yield
        self.note()

    def _before(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any, **options: Any) -> Any:
            with self._alone:
                self.note()
                return step(*arguments, **options)

        return noting


@pytest.mark.parametrize("restored", [False, True], ids=["created", "restored"])
def test_at_every_moment_a_kill_leaves_both_or_the_new_one(
    store: MemoryStore, rebuilt: RoutingMemory, snapshot_store: Path, fast_dir: Path, restored: bool
) -> None:
    if restored:  # then their layers lie elsewhere
        for name in ("bible", "rebuilt"):
            made = local.create(store, name, snapshot_store, min_free_bytes=0)
            local.restore(
                store, made.path, name, replacing=True, retire_after_s=0, min_free_bytes=0
            )
    moments = Moments(fast_dir / "data", fast_dir / "moments")
    with moments.noted():
        replace(store)
    check_replaced(store)
    check_nothing_is_left(fast_dir / "data")
    ends = []
    for copy in moments.copies:
        with open_store(copy, workers=0) as again:
            ends.append(len(again.names()))
            (check_both if ends[-1] == 2 else check_replaced)(again)
            answers(again.get("bible"), 3)
        check_nothing_is_left(copy)
    assert ends == sorted(ends, reverse=True)
    assert ends.count(2) >= 3  # before it, marked, moved
    assert ends.count(1) >= 3  # the manifest, the rest, the mark


def failing_after(step: Callable[..., Any]) -> Callable[..., Any]:
    """At its worst: after the work, before anyone knows."""

    def fail(*arguments: Any, **options: Any) -> None:
        step(*arguments, **options)
        raise StorageError("made to fail")

    return fail


@pytest.mark.parametrize(
    ("owner", "step"),
    [
        (swap, "mark"),
        (swap, "close_all"),
        (swap, "_move"),
        (swap, "_require_entries"),
        (swap, "finish_creation"),
    ],
)
def test_a_step_that_fails_changes_nothing(
    store: MemoryStore,
    rebuilt: RoutingMemory,
    fast_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    step: str,
) -> None:
    expected, before = answers(rebuilt), files(fast_dir / "data")
    ones = np.ones((1, 1))
    rebuilt.layers[0].hits.note(ones.astype(np.uint64), ones.astype(np.float32), ones[0] > 0)
    with monkeypatch.context() as broken:
        broken.setattr(owner, step, failing_after(getattr(owner, step)))
        with pytest.raises(StorageError, match="made to fail"):
            replace(store)
    assert files(fast_dir / "data") == before
    check_both(store)
    again = store.get("rebuilt")
    assert again.layers[0].counters.read().requests > 0
    assert again.layers[0].hits.summary() == rebuilt.layers[0].hits.summary()
    assert_same_answers(answers(again), expected)
    fill(again, 0, NEW)
    fill(store.get("bible"), 0, OLD)
    replace(store)
    check_replaced(store)


def fail(*_: object) -> None:
    raise StorageError("made to fail")


def test_layers_that_cannot_be_brought_back_are_at_the_next_start(
    fast_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(fast_dir / "data") as store, monkeypatch.context() as broken:
        fill(store.create("bible", MODEL, SETTINGS), 0, OLD)
        rebuild(store)
        broken.setattr(swap, "_require_entries", fail)
        broken.setattr(swap, "_move_back", fail)
        with pytest.raises(StorageError, match="made to fail"):
            replace(store)
        assert store.names() == ["bible"]
        assert set(store.broken) == {"rebuilt"}
    with open_store(fast_dir / "data") as store:
        check_both(store)
    check_nothing_is_left(fast_dir / "data")


def test_what_cannot_be_tidied_up_goes_at_the_next_start(
    store: MemoryStore, rebuilt: RoutingMemory, fast_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(swap, "arrive", fail)
        broken.setattr(store, "discard_layers", lambda _, layers: fail(close_all(layers)))
        replace(store)
    check_replaced(store)
    store.close()
    store.open_all()
    check_replaced(store)
    check_nothing_is_left(fast_dir / "data")


def test_a_memory_of_the_given_name_that_is_made_meanwhile_stays(
    store: MemoryStore, rebuilt: RoutingMemory, fast_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(swap, "arrive", lambda move: None)
        replace(store)
    fill(rebuild(store), NEW, NEW + 5)
    store.close()
    store.open_all()
    assert counts(store.get("bible")) == [NEW] * 2
    assert counts(store.get("rebuilt")) == [NEW + 5] * 2
    check_nothing_is_left(fast_dir / "data")


def test_a_replaced_memory_is_restored_and_replaced_again(
    store: MemoryStore, snapshot: SnapshotInfo, fast_dir: Path
) -> None:
    rebuild(store)
    replace(store)
    local.restore(store, snapshot.path, "bible", replacing=True, retire_after_s=0, min_free_bytes=0)
    rebuild(store)
    check_both(store)
    replace(store)
    check_replaced(store)
    check_nothing_is_left(fast_dir / "data")


@pytest.mark.parametrize(("held", "exclusive"), [("bible", False), ("rebuilt", True)])
def test_an_operation_on_either_is_in_the_way(
    store: MemoryStore, rebuilt: RoutingMemory, held: str, exclusive: bool
) -> None:
    operations, go_on = Operations(), threading.Event()

    def work(report: Report) -> Iterator[bool]:
        yield go_on.wait(30)

    steps = operations.run("optimize", held, work, exclusive=exclusive)
    next(steps)
    with pytest.raises(Busy, match=f"memory '{held}' is held by operation"):
        replace_memory(store, operations, "bible", "rebuilt")
    check_both(store)
    go_on.set()
    list(steps)
    replace_memory(store, operations, "bible", "rebuilt", retire_after_s=0)


def test_in_ram_nothing_is_left_of_what_was_replaced() -> None:
    backend = ExactBackend()
    store = MemoryStore(backend, None)
    old = store.create("bible", MODEL, SETTINGS)
    fill(old, 0, OLD)
    rebuild(store)
    replace(store)
    check_replaced(store)
    with pytest.raises(StorageError, match="closed"):
        old.layers[0].info()
    assert store.delete("bible") == NEW * 2
    store.create("rebuilt", MODEL, SETTINGS)
    store.create("bible", MODEL, SETTINGS)
    assert counts(store.get("bible")) == [0] * 2


@pytest.mark.parametrize("made_again", [False, True])
def test_what_was_replaced_is_closed_though_its_files_went_meanwhile(
    store: MemoryStore,
    memory: RoutingMemory,
    snapshot_store: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    made_again: bool,
) -> None:
    """The memory that came into its place is deleted before it is retired, and perhaps made again."""
    made = local.create(store, "bible", snapshot_store, min_free_bytes=0)

    def delete_and(retire: Callable[..., None]) -> Callable[..., None]:
        def first(store: MemoryStore, replaced: RoutingMemory) -> None:
            store.delete("bible")
            if made_again:
                fill(store.create("bible", MODEL, SETTINGS), 0, NEW)
            retire(store, replaced)

        return first

    monkeypatch.setattr(local, "retire", delete_and(swap.retire))
    with nullcontext() if made_again else pytest.raises(MemoryNotFound):
        local.restore(store, made.path, "bible", replacing=True, retire_after_s=0, min_free_bytes=0)
    assert all(layer.collection.closed for layer in memory.layers)  # type: ignore[attr-defined]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    if made_again:
        assert store.get("bible").layer(0).info().entries == NEW
        answers(store.get("bible"), 3)
