"""Which memories there are, beside their entries: files, a server's records, or nothing but RAM.

A creation begins, makes its collections and is committed; a deletion is retired, drops its collections and is removed.
What was killed in between is a leftover.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from typing_extensions import override

from router_service.backends.disk import fsync_directory, remove_durably, remove_tree, storage_call
from router_service.errors import CorruptMemory, StorageError
from router_service.memories.manifest import (
    UNFINISHED,
    begin_creation,
    is_unfinished,
    read_manifest,
    write_manifest,
)
from router_service.memories.memory import MemoryRecord

log = logging.getLogger(__name__)

# A deleted memory's directory until its files are gone.
DOOMED = ".deleted"


@dataclass(frozen=True, slots=True)
class Swap:
    """The memory `by` takes the place of the memory of that record, and its name is gone."""

    record: MemoryRecord  # as it is afterwards
    by: str
    stale: bool = False  # whoever began it has been killed


@dataclass(frozen=True, slots=True)
class Catalogued:
    """What a catalogue holds."""

    records: list[MemoryRecord]
    broken: dict[str, StorageError]  # name -> why its record cannot be read
    leftovers: list[MemoryRecord]  # their collections go, then they are removed
    swaps: list[Swap] = field(default_factory=list)  # under way, or cut short


class Catalogue(Protocol):
    """Every call raises StorageError when the storage fails. `location`: where, human-readable."""

    location: str

    def away(self) -> list[str]:
        """Nodes of the storage that get no work at this moment, and why."""
        return []

    def at_risk(self) -> str:
        """What the loss of one node makes unreadable, and the remedy; empty: nothing, or there is one node only."""
        return ""

    def read(self) -> Catalogued:
        """What there is."""
        ...

    def begin(self, record: MemoryRecord, *, whole: bool = False) -> None:
        """Before the first collection of a new memory; `whole`: which exists at once. Raises MemoryExists or Busy."""
        ...

    def commit(self, record: MemoryRecord) -> None:
        """The memory exists from here on, or has these settings from here on."""
        ...

    def retire(self, record: MemoryRecord) -> None:
        """The memory is gone from here on; its collections are not."""
        ...

    def remove(self, record: MemoryRecord) -> None:
        """Nothing is left of a memory that was retired, or never committed."""
        ...


@runtime_checkable
class SwapCatalogue(Protocol):
    """A Catalogue of memories that are swapped by names, without being moved."""

    def begin_swap(self, swap: Swap) -> None:
        """Announces it; commit() of its record and remove() of the other complete it. Raises Busy and StorageError."""
        ...


class RamCatalogue(Catalogue, SwapCatalogue):
    """Of memories that end with the service."""

    location = "in RAM: nothing is kept"

    @override
    def read(self) -> Catalogued:
        return Catalogued([], {}, [])

    @override
    def begin(self, record: MemoryRecord, *, whole: bool = False) -> None: ...

    commit = retire = remove = begin

    @override
    def begin_swap(self, swap: Swap) -> None: ...


class FileCatalogue(Catalogue):
    """DATA/memories/NAME/memory.json for each memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.location = str(directory)

    @override
    def read(self) -> Catalogued:
        """Leftovers are removed at once, for their collections are files among them."""
        with storage_call(f"open {self._directory}"):
            self._directory.mkdir(parents=True, exist_ok=True)
            paths = sorted(p for p in self._directory.iterdir() if p.is_dir())
        found = Catalogued([], {}, [])
        for path in paths:
            if path.name.endswith(DOOMED) or is_unfinished(path):
                log.warning("removing %s: its deletion or creation never ended", path)
                remove_tree(path)
                continue
            try:
                found.records.append(read_manifest(path))
            except CorruptMemory as error:
                found.broken[path.name] = error
        return found

    @override
    def begin(self, record: MemoryRecord, *, whole: bool = False) -> None:
        begin_creation(self._of(record))

    @override
    def commit(self, record: MemoryRecord) -> None:
        write_manifest(self._of(record), record)
        if (mark := self._of(record) / UNFINISHED).exists():
            remove_durably(mark)

    @override
    def retire(self, record: MemoryRecord) -> None:
        """After a crash the next read() does the rest."""
        with storage_call(f"delete {self._of(record)}"):
            self._of(record).rename(self._doomed(record))
            fsync_directory(self._directory)

    @override
    def remove(self, record: MemoryRecord) -> None:
        remove_tree(self._doomed(record) if self._doomed(record).exists() else self._of(record))

    def _of(self, record: MemoryRecord) -> Path:
        return self._directory / record.name

    def _doomed(self, record: MemoryRecord) -> Path:
        return self._directory / f"{record.name}{DOOMED}"
