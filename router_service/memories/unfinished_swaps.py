"""Swaps, written down so that whoever starts after a crash can finish or undo them.

In RAM and on a server (NameSwaps) the catalogue gets the intent first, then collections change names, then comes the
record, with which lookups change over: what is announced is finished. On disk layers carry a mark while they move: what
has the new manifest is finished, what has not is moved back. See swap for the swaps themselves.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from router_service.backends.base import Backend, Renaming
from router_service.backends.disk import (
    fsync_directory,
    remove_durably,
    remove_tree,
    storage_call,
    write_atomically,
)
from router_service.errors import BackendUnavailable, CorruptMemory, StorageError
from router_service.memories.catalogue import DOOMED, Catalogue, Catalogued, Swap, SwapCatalogue
from router_service.memories.manifest import CAME_FROM, FILE_NAME, read_manifest, restored_directory
from router_service.memories.memory import MemoryRecord, collection_names

log = logging.getLogger(__name__)


class NameSwaps:
    """Swaps of one backend and its catalogue, by names. Whoever reads the catalogue after a crash finishes them."""

    def __init__(self, backend: Backend, catalogue: Catalogue) -> None:
        self._backend, self._catalogue = backend, catalogue
        self._left: set[str] = (
            set()
        )  # memories whose swap this service began, and does not know to have ended

    def begin(self, swap: Swap, other: MemoryRecord) -> None:
        """The collections of the memory `other` have the names of those of `swap.record` from here on.

        end() it later. Raises Busy and StorageError; nothing has changed then, unless a server went away: finished()
        finishes it later, if it was announced.
        """
        backend, catalogue = self._able()
        try:
            catalogue.begin_swap(swap)
            self._switch(backend, swap, other)
        except BackendUnavailable as error:
            self._left.add(swap.by)
            raise BackendUnavailable(
                f"{error}; whether {swap.by!r} takes the place of {swap.record.name!r} shows soon after the server's "
                "return, or within minutes should this service end before"
            ) from error

    def end(self, swap: Swap) -> None:
        """Removes the collections that were replaced, and the other memory's record. Raises StorageError."""
        backend, _ = self._able()
        for record in self._catalogue.read().records:
            before = record.created_unix_ms < swap.record.created_unix_ms
            if record.name == swap.record.name and before:  # by who changed its settings just then
                self._catalogue.commit(swap.record)
        backend.drop_replaced(_names(swap))
        self._catalogue.remove(replace(swap.record, name=swap.by))

    def finished(self, let_go: Callable[[str], None], *, stale_only: bool = False) -> Catalogued:
        """What the catalogue holds, once those that a crash cut short are finished. Raises StorageError.

        `let_go` closes the memory of a name, if it is open. `stale_only`: not those that may be under way elsewhere.
        """
        found = self._catalogue.read()
        cut_short = [
            each for each in found.swaps if each.stale or each.by in self._left or not stale_only
        ]
        for swap in cut_short:
            let_go(swap.by)
            self._resume(swap, found.records)
        self._left.clear()
        return self._catalogue.read() if cut_short else found

    def _resume(self, swap: Swap, records: Sequence[MemoryRecord]) -> None:
        log.warning("memory %s takes the place of %s at last", swap.by, swap.record.name)
        backend, _ = self._able()
        committed = any(_same_memory(record, swap.record) for record in records)
        backend.rename(_names(swap), swap.record.collections)
        if not committed:
            self._catalogue.commit(swap.record)
        self.end(swap)

    def _switch(self, backend: Renaming, swap: Swap, other: MemoryRecord) -> None:
        try:
            backend.rename(_names(swap), swap.record.collections)
        except BackendUnavailable:  # who knows what it did: what is announced is finished
            raise
        except BaseException:
            self._catalogue.commit(other)
            raise
        try:
            self._catalogue.commit(swap.record)
        except BaseException:
            self._left.add(swap.by)
            raise

    def _able(self) -> tuple[Renaming, SwapCatalogue]:
        backend, catalogue = self._backend, self._catalogue
        if isinstance(backend, Renaming) and isinstance(catalogue, SwapCatalogue):
            return backend, catalogue
        raise StorageError(
            f"a memory cannot take the place of another here ({self._catalogue.location})"
        )


def _same_memory(one: MemoryRecord, other: MemoryRecord) -> bool:
    """Settings aside, which may have been changed since."""
    return (one.name, one.created_unix_ms) == (other.name, other.created_unix_ms)


def _names(swap: Swap) -> dict[str, str]:
    """Collections by the names that they are to have."""
    record = swap.record
    return dict(zip(collection_names(record), collection_names(record, swap.by), strict=True))


# What a mark may say: a memory's directory, or restored layers in it.
_ORIGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/restored-\d{1,20})?")


@dataclass(frozen=True, slots=True)
class FileSwap:
    """Layers at `home` that came from `origin`, or have not left it yet."""

    home: Path
    origin: Path
    arrived: bool  # the manifest of the memory whose place they take leads to them


def mark(memories: Path, home: Path) -> None:
    """Lets the layers at `home` say where they lie, before they are moved. Raises StorageError."""
    text = home.relative_to(memories).as_posix().encode()
    write_atomically(home / CAME_FROM, lambda file: file.write(text))


def unmark(home: Path) -> None:
    """Undoes mark(), when the layers are where they were. Raises StorageError."""
    if home.is_dir():
        remove_durably(home / CAME_FROM)


def file_swaps(memories: Path) -> Iterator[FileSwap]:
    """Those that have not ended. Raises StorageError."""
    with storage_call(f"list {memories}"):
        marks = [
            path
            for pattern in (f"*/{CAME_FROM}", f"*/restored-*/{CAME_FROM}")
            for path in sorted(memories.glob(pattern))
            if not path.relative_to(memories).parts[0].endswith(DOOMED)
        ]
        for path in marks:
            origin = path.read_text(errors="replace")
            if _ORIGIN.fullmatch(origin):
                yield _file_swap(path.parent, memories / origin)
            else:
                log.error("%s does not say where its layers came from; left as it is", path)


def finish_file_swaps(memories: Path) -> None:
    """Ends every swap that a crash cut short; none of the layers may be open. Raises StorageError."""
    for move in file_swaps(memories):
        if move.arrived:
            arrive(move)
        elif move.home == move.origin:
            unmark(move.home)
        elif move.origin.exists():
            log.error(
                "%s came from %s, which is there again; both are kept", move.home, move.origin
            )
        else:
            _move_back(move)


def arrive(move: FileSwap) -> None:
    """Removes what is left of the memory that moved, at last the mark. Raises StorageError."""
    rest = move.origin.parent
    if move.origin.name.startswith("restored-") and _record_of(rest, move.origin) is not None:
        doomed = rest.with_name(f"{rest.name}{DOOMED}")
        with storage_call(f"delete {rest}"):
            rest.rename(doomed)
            fsync_directory(doomed.parent)
        remove_tree(doomed)
    remove_durably(move.home / FILE_NAME)
    remove_durably(move.home / CAME_FROM)


def _move_back(move: FileSwap) -> None:
    log.warning("moving %s back to %s: a swap never ended", move.home, move.origin)
    with storage_call(f"move {move.home} back"):
        move.home.rename(move.origin)
        fsync_directory(move.origin.parent)
        fsync_directory(move.home.parent)
    unmark(move.origin)


def _file_swap(home: Path, origin: Path) -> FileSwap:
    led_to = home.name.startswith("restored-") and _record_of(home.parent, home) is not None
    return FileSwap(home, origin, led_to and home != origin)


def _record_of(directory: Path, restored: Path) -> MemoryRecord | None:
    """The record in a memory's directory, if it is that of the layers at `restored`."""
    try:
        record = read_manifest(directory)
    except CorruptMemory:
        return None
    return record if restored_directory(directory.parent, record) == restored else None
