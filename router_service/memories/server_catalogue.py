"""Which memories a server holds: a point for each in the collection PREFIX~memories, which services share.

A record has the settings and the own names of the layers' collections, so that both change in one step: whoever reads
it knows which entries its settings are for, whatever aliases lead to at the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from typing_extensions import override

from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.records import Records, age_ms
from router_service.errors import Busy, CorruptMemory, MemoryExists
from router_service.memories.catalogue import Catalogue, Catalogued, Swap, SwapCatalogue
from router_service.memories.manifest import record_from_json, record_to_json
from router_service.memories.memory import MemoryRecord, collection_names

READY, CREATING, DELETING, MOVING = "ready", "creating", "deleting", "moving"
# A creation or deletion that takes longer was killed.
_MOST_NAMED = 5
_PATIENCE_MS = 120_000


class ServerCatalogue(Catalogue, SwapCatalogue):
    """A state beside each record takes the place of the marks that the embedded backend makes."""

    def __init__(self, backend: ServerBackend) -> None:
        """Makes the collection of records when it is not there. Raises StorageError."""
        self._backend, connection = backend, backend.connection
        options = connection.options
        self.location = (
            f"Qdrant {connection.version} at {options.url}, collections {options.prefix}~*"
        )
        self._records = Records(connection, f"{options.prefix}~memories")
        self._records.ensure()
        backend.made.ensure()
        backend.owned, backend.named, backend.due = self._owns, self._is_named, self._due

    @override
    def away(self) -> list[str]:
        return self._backend.connection.nodes.away()

    @override
    def at_risk(self) -> str:
        if not (found := self._backend.uncopied()):
            return ""
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        return (
            f"{', '.join(found[:_MOST_NAMED])}{more}: kept in fewer copies than asked for, or in one; with the node "
            "that has it nothing of that can be read, and without the records (~memories, ~layers) no memory. "
            "Give --qdrant-replication-factor 2 from the first start on; for what is there add replicas with Qdrant's "
            "own means (POST /collections/NAME/cluster, replicate_shard), or migrate to another --qdrant-prefix"
        )

    @override
    def read(self) -> Catalogued:
        self._records.mend()
        self._backend.made.mend()
        found = Catalogued([], {}, [])
        for payload in self._records.all():
            name, state = payload.get("name", ""), payload.get("state")
            called = payload.get("becomes", name)  # the record is that of what it becomes
            try:
                record = record_from_json(payload.get("record", ""), called, self._where(name))
            except CorruptMemory as error:
                found.broken[name] = error
                continue
            stale = age_ms(payload) > _PATIENCE_MS
            if state == READY:
                found.records.append(record)
            elif state == MOVING:
                found.swaps.append(Swap(record, name, stale))
            elif stale:
                found.leftovers.append(record)
        found.records[:] = self._pinned(found.records)
        return found

    def _pinned(self, records: Sequence[MemoryRecord]) -> list[MemoryRecord]:
        """Records of earlier versions do not name collections: then they are those that aliases lead to."""
        bare = [record for record in records if not record.collections]
        led = (
            self._backend.behind(n for each in bare for n in collection_names(each)) if bare else {}
        )
        pinned = []
        for record in records:
            names = collection_names(record)
            if record in bare and all(name in led for name in names):
                record = replace(record, collections=tuple(led[name] for name in names))
            pinned.append(record)
        return pinned

    @override
    def begin(self, record: MemoryRecord, *, whole: bool = False) -> None:
        """Raises Busy while another service makes or removes a memory of that name."""
        if (payload := self._records.read(record.name)) is not None:
            if payload.get("state") == READY:
                raise MemoryExists(record.name)
            if age_ms(payload) <= _PATIENCE_MS:
                problem = f"another service is {payload.get('state')} memory {record.name!r}"
                raise Busy(f"{problem}; try again in {_PATIENCE_MS // 1000} s at the latest")
        self._write(record, READY if whole else CREATING, new=payload is None)
        if (payload := self._records.read(record.name)) is None or not _is_of(payload, record):
            raise MemoryExists(record.name)  # another service was first

    @override
    def begin_swap(self, swap: Swap) -> None:
        """The record of the one is that of the other to be, until it is removed."""
        record, by = swap.record, swap.by
        for name in (record.name, by):
            payload = self._records.read(name)
            if payload is None or payload.get("state") != READY:
                raise Busy(f"another service makes, moves or removes memory {name!r}; try again")
            if name == record.name:
                self._pin(record_from_json(payload.get("record", ""), name, self._where(name)))
        fields = {"name": by, "state": MOVING, "becomes": record.name}
        self._records.write(by, fields | {"record": record_to_json(record)})

    @override
    def commit(self, record: MemoryRecord) -> None:
        self._write(record, READY)

    @override
    def retire(self, record: MemoryRecord) -> None:
        self._write(record, DELETING)

    @override
    def remove(self, record: MemoryRecord) -> None:
        payload = self._records.read(record.name)
        if payload is not None and payload.get("state") == DELETING:
            self._backend.forget_lost(record.collections)  # what is there was dropped
        self._records.remove(record.name)

    def find(self, name: str) -> MemoryRecord | None:
        """The record of a memory that exists; None when there is none, or it cannot be read."""
        payload = self._records.read(name)
        if payload is None or payload.get("state") != READY:
            return None
        with suppress(CorruptMemory):
            return record_from_json(payload.get("record", ""), name, self._where(name))
        return None

    def due(self, name: str) -> MemoryRecord | None:
        """As find(); but of a memory whose place another one is about to take, that one's record."""
        own = self.find(name)
        found = [] if own is None else [own]
        for payload in self._records.all():
            if payload.get("becomes") == name:
                with suppress(CorruptMemory):
                    where = self._where(payload.get("name", ""))
                    found.append(record_from_json(payload.get("record", ""), name, where))
        return max(found, key=lambda record: record.created_unix_ms, default=None)

    def _is_named(self, collection: str) -> bool:
        has = (each for each in self._records.all() if each.get("state") in (READY, MOVING))
        return any(_names(each, collection) for each in has)

    def _due(self, memory: str) -> dict[str, str]:
        record = self.due(memory)
        if record is None or not record.collections:
            return {}
        return dict(zip(collection_names(record), record.collections, strict=True))

    def _pin(self, record: MemoryRecord) -> None:
        """Before aliases lead elsewhere, a record of an earlier version names what they led to."""
        if not record.collections:
            self.commit(self._pinned([record])[0])

    def _owns(self, memory: str, collection: str, settled: bool, timeout_s: float) -> bool:
        """Whether a memory has this collection. `settled`: and no other is about to take its place."""
        payload = self._records.read(memory, timeout_s)
        if payload is None or payload.get("state") != READY or not _names(payload, collection):
            return False
        coming = (each for each in self._records.all() if each.get("becomes") == memory)
        return not settled or all(_names(each, collection) for each in coming)

    def _write(self, record: MemoryRecord, state: str, *, new: bool = False) -> None:
        fields = {"name": record.name, "state": state, "record": record_to_json(record)}
        self._records.write(record.name, fields, new=new)

    def _where(self, name: str) -> str:
        return f"the record of memory {name!r} in collection {self._records.name!r}"


def _is_of(payload: Mapping[str, Any], record: MemoryRecord) -> bool:
    return bool(payload.get("record") == record_to_json(record))


def _names(payload: Mapping[str, Any], collection: str) -> bool:
    return f'"{collection}"' in str(payload.get("record"))
