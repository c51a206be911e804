"""Which snapshots of memories a server keeps, and which restores are under way: records that services share."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.records import Records, age_ms
from router_service.backends.qdrant_server.rest import SnapshotFile
from router_service.errors import (
    Busy,
    CorruptMemory,
    InvalidField,
    SnapshotInvalid,
    SnapshotNotFound,
    shorten,
)
from router_service.memories.manifest import record_from_json, record_to_json
from router_service.memories.memory import MemoryRecord

log = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = 1
READY, UNFINISHED, LEFT = "ready", "unfinished", "left"
SNAPSHOT, RESTORE = "snapshot", "restore"
# Work under way writes its record again more often than this; what does not was killed.
PATIENCE_MS = 120_000
RENEW_S = 20.0
_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class LayerSnapshot:
    """The snapshot of a layer; `exact`: no writes came meanwhile, else `entries` are those afterwards."""

    file: SnapshotFile
    entries: int
    exact: bool


@dataclass(frozen=True, slots=True)
class ServerSnapshot:
    """A snapshot of a memory; the fields after `layers` are of one that is unfinished."""

    name: str
    record: MemoryRecord
    service_version: str
    created_unix_ms: int
    layers: tuple[LayerSnapshot, ...] = ()
    making: str = ""  # the collection whose snapshot is being made
    making_since_ms: int = 0
    before: tuple[str, ...] = ()  # the snapshots that it had then

    def __str__(self) -> str:
        return f"snapshot {self.name!r} of memory {self.record.name!r}"


@dataclass(frozen=True, slots=True)
class Restoring:
    """A restore under way: `record` is the memory's from its publication on, which leaves `replaced` to be dropped."""

    token: str
    record: MemoryRecord
    collections: tuple[str, ...] = ()  # by layer
    replaced: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"a restore of memory {self.record.name!r}"


class SnapshotBook:
    """The collection PREFIX~snapshots, made at its first use. Raises StorageError."""

    def __init__(self, connection: Connection) -> None:
        self._records = Records(connection, f"{connection.options.prefix}~snapshots")
        self.location = f"Qdrant at {connection.options.url}"

    def snapshots(
        self, memory: str = ""
    ) -> tuple[list[ServerSnapshot], dict[tuple[str, str], str]]:
        """Whole ones, of one memory or of all; and why others cannot be used, by memory and name."""
        found, broken = [], {}
        for fields in self._all(SNAPSHOT):
            if fields["state"] != READY or memory not in ("", fields["memory"]):
                continue
            try:
                found.append(_snapshot(fields))
            except SnapshotInvalid as error:
                broken[fields["memory"], fields["name"]] = str(error)
        return found, broken

    def find(self, memory: str, name: str) -> ServerSnapshot:
        """Raises SnapshotNotFound, or SnapshotInvalid when its record cannot be read."""
        fields = self._read(_key(SNAPSHOT, memory, name))
        if fields is not None and fields["state"] == READY:
            return _snapshot(fields)
        have = sorted(each.name for each in self.snapshots(memory)[0])[-_MOST_NAMED:]
        known = ", ".join(have) or "none; make one first"
        raise SnapshotNotFound(
            f"snapshot {shorten(name)} not found; memory {memory!r} has on the server: {known}"
        )

    def begin(self, snapshot: ServerSnapshot) -> None:
        """Before the first layer. Raises InvalidField when the name is taken, or Busy while another is being made."""
        memory, name = snapshot.record.name, snapshot.name
        self._records.ensure()
        fields = self._read(_key(SNAPSHOT, memory, name))
        if fields is not None and fields["state"] == READY:
            raise InvalidField("snapshot", name, "a name that no snapshot of the memory has")
        if any(each["memory"] == memory and _fresh(each) for each in self._all(SNAPSHOT)):
            raise Busy(
                f"another snapshot of {memory!r} is being made or removed; try again when it is done, or in "
                f"{PATIENCE_MS // 1000} s should its service have been killed"
            )
        self.keep(snapshot)

    def keep(self, snapshot: ServerSnapshot) -> None:
        """How far one is that is being made or removed; from here on it is not listed."""
        self._write(snapshot, UNFINISHED)

    def commit(self, snapshot: ServerSnapshot) -> None:
        """It is whole from here on."""
        self._write(snapshot, READY)

    def leave(self, snapshot: ServerSnapshot) -> None:
        """It failed, and the server may still be at work on it: a later sweep looks again. The name is free."""
        self._write(replace(snapshot, name=f".left-{secrets.token_hex(4)}"), LEFT)
        self.remove(snapshot)

    def remove(self, snapshot: ServerSnapshot) -> None:
        """Nothing is left of it."""
        self._records.remove(_key(SNAPSHOT, snapshot.record.name, snapshot.name))

    def files(self, but: ServerSnapshot) -> set[SnapshotFile]:
        """What all snapshots but one are made of, also of those that are being made."""
        own = but.record.name, but.name
        others = [each for each in self._all(SNAPSHOT) if (each["memory"], each["name"]) != own]
        return {layer.file for each in others for layer in _snapshot(each).layers}

    def begin_restore(self, restoring: Restoring) -> None:
        """Before the first collection. Raises Busy while another service restores a memory of that name."""
        name = restoring.record.name
        self._records.ensure()
        if any(each["memory"] == name and _fresh(each) for each in self._all(RESTORE)):
            raise Busy(
                f"memory {name!r} is being restored already; try again when that is done, or in "
                f"{PATIENCE_MS // 1000} s should the service that did it have been killed"
            )
        self.keep_restore(restoring)

    def keep_restore(self, restoring: Restoring, state: str = UNFINISHED) -> None:
        """How far a restore is; LEFT: it failed, and the server may still be at work on it."""
        body = {
            "format": FORMAT,
            "record": record_to_json(restoring.record),
            "collections": restoring.collections,
            "replaced": restoring.replaced,
        }
        self._put(RESTORE, restoring.record.name, restoring.token, state, body)

    def remove_restore(self, restoring: Restoring) -> None:
        """Nothing is left to be done for it."""
        self._records.remove(_key(RESTORE, restoring.record.name, restoring.token))

    def unfinished(self) -> tuple[list[ServerSnapshot], list[Restoring]]:
        """What was killed; records that cannot be read are logged."""
        old = [
            each for each in self._all() if each["state"] != READY and age_ms(each) > PATIENCE_MS
        ]
        snapshots = _readable(_snapshot, (each for each in old if each["kind"] == SNAPSHOT))
        restores = _readable(_restoring, (each for each in old if each["kind"] == RESTORE))
        return snapshots, restores

    def restores(self) -> list[Restoring]:
        """Every restore that is under way, or was when its service was killed; as in unfinished()."""
        return _readable(_restoring, self._all(RESTORE))

    def _all(self, kind: str = "") -> Iterator[dict[str, Any]]:
        if self._records.exist():
            yield from (each for each in self._records.all() if kind in ("", each["kind"]))

    def _read(self, key: str) -> dict[str, Any] | None:
        return self._records.read(key) if self._records.exist() else None

    def _write(self, snapshot: ServerSnapshot, state: str) -> None:
        body = {
            "format": FORMAT,
            "record": record_to_json(snapshot.record),
            "service_version": snapshot.service_version,
            "created_unix_ms": snapshot.created_unix_ms,
            "layers": [asdict(layer) for layer in snapshot.layers],
            "making": snapshot.making,
            "making_since_ms": snapshot.making_since_ms,
            "before": snapshot.before,
        }
        self._put(SNAPSHOT, snapshot.record.name, snapshot.name, state, body)

    def _put(self, kind: str, memory: str, name: str, state: str, body: dict[str, Any]) -> None:
        fields = {"kind": kind, "memory": memory, "name": name, "state": state}
        self._records.write(_key(kind, memory, name), fields | {"body": json.dumps(body)})


def _key(*parts: str) -> str:
    return "/".join(parts)


def _readable(decode: Callable[[dict[str, Any]], T], records: Iterable[dict[str, Any]]) -> list[T]:
    """What can be read: a service of another version may have written the others."""
    found = []
    for fields in records:
        try:
            found.append(decode(fields))
        except SnapshotInvalid as error:
            log.warning("%s; it is left as it is", error)
    return found


def _fresh(fields: dict[str, Any]) -> bool:
    """Whether a record is that of work under way."""
    return fields["state"] == UNFINISHED and age_ms(fields) <= PATIENCE_MS


def _snapshot(fields: dict[str, Any]) -> ServerSnapshot:
    body, record = _body(fields)
    try:
        layers = [
            LayerSnapshot(SnapshotFile(**each["file"]), each["entries"], each["exact"])
            for each in body["layers"]
        ]
        return ServerSnapshot(
            fields["name"],
            record,
            body["service_version"],
            body["created_unix_ms"],
            tuple(layers),
            body["making"],
            body["making_since_ms"],
            tuple(body["before"]),
        )
    except (KeyError, TypeError) as error:
        raise _damaged(fields, error) from error


def _restoring(fields: dict[str, Any]) -> Restoring:
    body, record = _body(fields)
    try:
        collections, replaced = tuple(body["collections"]), tuple(body["replaced"])
        return Restoring(fields["name"], record, collections, replaced)
    except (KeyError, TypeError) as error:
        raise _damaged(fields, error) from error


def _body(fields: dict[str, Any]) -> tuple[dict[str, Any], MemoryRecord]:
    try:
        body = json.loads(fields["body"])
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']}, this version reads {FORMAT}")
        return body, record_from_json(body["record"], fields["memory"], "the record of the memory")
    except (ValueError, KeyError, TypeError, CorruptMemory) as error:
        raise _damaged(fields, error) from error


def _damaged(fields: dict[str, Any], error: Exception) -> SnapshotInvalid:
    what = (
        f"the server's record of {fields['kind']} {fields['name']!r} of memory {fields['memory']!r}"
    )
    return SnapshotInvalid(f"{what} cannot be read ({type(error).__name__}: {error})")
