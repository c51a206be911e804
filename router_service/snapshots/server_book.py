"""What services that share a server know of restores under way; and which snapshots version 0.1.0 left there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.records import Records, age_ms
from router_service.errors import Busy, CorruptMemory, SnapshotInvalid
from router_service.memories.manifest import record_from_json, record_to_json
from router_service.memories.memory import MemoryRecord

log = logging.getLogger(__name__)

FORMAT = 1
READY, UNFINISHED, LEFT = "ready", "unfinished", "left"
SNAPSHOT, RESTORE = "snapshot", "restore"
# Work under way writes its record again more often than this; what does not was killed.
PATIENCE_MS = 120_000
RENEW_S = 20.0


@dataclass(frozen=True, slots=True)
class EarlierSnapshot:
    """One that 0.1.0 made, or was making: `files` are collections with names of Qdrant's own snapshots of them."""

    memory: str
    name: str
    files: tuple[tuple[str, str], ...]


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

    def earlier(self, memory: str = "") -> list[EarlierSnapshot]:
        """What 0.1.0 left, of one memory or of all; but for what it may be at work on."""
        found = [each for each in self._all(SNAPSHOT) if memory in ("", each["memory"])]
        return [_earlier(each) for each in found if not _fresh(each)]

    def remove(self, snapshot: EarlierSnapshot) -> None:
        """Nothing is left of it."""
        self._records.remove(_key(SNAPSHOT, snapshot.memory, snapshot.name))

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

    def killed(self) -> list[Restoring]:
        """Restores that nobody works on any more; records that cannot be read are logged."""
        old = (each for each in self._all(RESTORE) if age_ms(each) > PATIENCE_MS)
        return _readable(old)

    def restores(self) -> list[Restoring]:
        """Every restore that is under way, or was when its service was killed; as in killed()."""
        return _readable(self._all(RESTORE))

    def _all(self, kind: str) -> Iterator[dict[str, Any]]:
        if self._records.exist():
            self._records.mend()
            yield from (each for each in self._records.all() if each["kind"] == kind)

    def _put(self, kind: str, memory: str, name: str, state: str, body: dict[str, Any]) -> None:
        fields = {"kind": kind, "memory": memory, "name": name, "state": state}
        self._records.write(_key(kind, memory, name), fields | {"body": json.dumps(body)})


def _key(*parts: str) -> str:
    return "/".join(parts)


def _readable(records: Iterable[dict[str, Any]]) -> list[Restoring]:
    """What can be read: a service of another version may have written the others."""
    found = []
    for fields in records:
        try:
            found.append(_restoring(fields))
        except SnapshotInvalid as error:
            log.warning("%s; it is left as it is", error)
    return found


def _fresh(fields: dict[str, Any]) -> bool:
    """Whether a record is that of work under way."""
    return fields["state"] == UNFINISHED and age_ms(fields) <= PATIENCE_MS


def _earlier(fields: dict[str, Any]) -> EarlierSnapshot:
    try:
        found = [each["file"] for each in json.loads(fields["body"])["layers"]]
        files = tuple((str(each["collection"]), str(each["name"])) for each in found)
    except (ValueError, KeyError, TypeError) as error:
        log.warning("which files it has: %s", _damaged(fields, error))
        files = ()
    return EarlierSnapshot(fields["memory"], fields["name"], files)


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
