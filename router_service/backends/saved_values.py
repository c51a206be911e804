"""The value table of a generation: saved beside the shard at close, read from the shard when that did not happen.

A saved table promises that the shard has exactly its entries, so it is removed before the first write.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from router_service.arrays import Entries
from router_service.backends.disk import remove_durably
from router_service.backends.shard import Shard
from router_service.backends.value_table import ValueTable
from router_service.errors import CorruptMemory, StorageError

_ENTRIES_PER_PAGE = 2048


def read_table(shard: Shard, value_width: int) -> ValueTable:
    """The table as the engine has it; takes 20 us per entry."""
    pages: list[Entries] = []
    after = None
    while len(page := shard.scroll(after, _ENTRIES_PER_PAGE, keys=False, provenance=False)):
        pages.append(page)
        after = int(page.ids[-1])
    read = Entries.joined(pages, 0, value_width)
    return ValueTable(read.ids, read.values)


class SavedValues:
    """The saved table of one generation, or that there is none."""

    def __init__(self, path: Path, *, is_saved: bool) -> None:
        self._path, self._is_saved = path, is_saved

    @staticmethod
    def open(path: Path, value_width: int) -> tuple[SavedValues, ValueTable | None]:
        """What is saved at `path`; the table is None when there is no intact one."""
        table = ValueTable.load(path, value_width)
        return SavedValues(path, is_saved=table is not None), table

    def forget(self) -> None:
        """Before the first write."""
        if self._is_saved:
            remove_durably(self._path)
            self._is_saved = False

    def save(self, table: ValueTable) -> None:
        """At close; a disk that is full now is no harm: the next open reads the engine."""
        if not self._is_saved:
            with suppress(StorageError):
                table.save(self._path)

    def check(self, table: ValueTable, entries: int) -> ValueTable:
        """A damaged write-ahead log shows only as missing entries. Raises CorruptMemory."""
        if entries != len(table):
            directory = self._path.parent.parent
            raise CorruptMemory(
                f"{directory} has {entries} entries, {len(table)} when it was closed; restore the memory from a "
                f"snapshot, or remove {self._path} to go on with what is left"
            )
        return table
