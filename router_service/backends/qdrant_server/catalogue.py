"""Which memories a server holds: a point for each in the collection PREFIX~memories, which services share."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

from qdrant_client import grpc as q

from router_service.backends.qdrant_server.connection import (
    ADMIN_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    Connection,
)
from router_service.catalogue import Catalogued
from router_service.errors import Busy, CorruptMemory, MemoryExists
from router_service.manifest import record_from_json, record_to_json
from router_service.routing_memory import MemoryRecord

READY, CREATING, DELETING = "ready", "creating", "deleting"
# A creation or deletion that takes longer was killed.
_PATIENCE_MS = 120_000
_PAGE = 256


class ServerCatalogue:
    """See Catalogue. A state beside each record takes the place of the marks that the embedded backend makes."""

    def __init__(self, connection: Connection) -> None:
        """Makes the collection of records when it is not there. Raises StorageError."""
        self._connection = connection
        options = connection.options
        self._name = f"{options.prefix}~memories"
        self.place = f"Qdrant {connection.version} at {options.url}, collections {options.prefix}~*"
        exists = q.CollectionExistsRequest(collection_name=self._name)
        reply = connection.call("collections", "CollectionExists", exists, WRITE_TIMEOUT_S)
        if not reply.result.exists:
            self._create()

    def read(self) -> Catalogued:
        """See Catalogue.read."""
        found = Catalogued([], {}, [])
        for payload in self._payloads():
            name = payload.get("name", "")
            try:
                record = record_from_json(payload.get("record", ""), name, self._where(name))
            except CorruptMemory as error:
                found.broken[name] = str(error)
                continue
            if payload.get("state") == READY:
                found.records.append(record)
            elif _age_ms(payload) > _PATIENCE_MS:
                found.leftovers.append(record)
        return found

    def begin(self, record: MemoryRecord) -> None:
        """See Catalogue.begin. Raises Busy while another service makes or removes a memory of that name."""
        if (payload := self._payload(record.name)) is not None:
            if payload.get("state") == READY:
                raise MemoryExists(record.name)
            if _age_ms(payload) <= _PATIENCE_MS:
                problem = f"another service is {payload.get('state')} memory {record.name!r}"
                raise Busy(f"{problem}; try again in {_PATIENCE_MS // 1000} s at the latest")
        self._write(record, CREATING)

    def commit(self, record: MemoryRecord) -> None:
        """See Catalogue.commit."""
        self._write(record, READY)

    def retire(self, record: MemoryRecord) -> None:
        """See Catalogue.retire."""
        self._write(record, DELETING)

    def remove(self, record: MemoryRecord) -> None:
        """See Catalogue.remove."""
        request = q.DeletePoints(
            collection_name=self._name,
            wait=True,
            points=q.PointsSelector(points=q.PointsIdsList(ids=[_point_id(record.name)])),
            ordering=q.WriteOrdering(type=q.WriteOrderingType.Strong),
        )
        self._connection.call("points", "Delete", request, WRITE_TIMEOUT_S)

    def _create(self) -> None:
        options = self._connection.options
        nothing = q.VectorParams(
            size=1, distance=q.Distance.Euclid
        )  # records have no vector of use
        request = q.CreateCollection(
            collection_name=self._name,
            vectors_config=q.VectorsConfig(params=nothing),
            shard_number=None if options.shard_number is None else 1,
            replication_factor=options.replication_factor,
            write_consistency_factor=options.write_consistency_factor,
        )
        self._connection.call("collections", "Create", request, ADMIN_TIMEOUT_S, repeat=False)

    def _write(self, record: MemoryRecord, state: str) -> None:
        payload = {
            "name": q.Value(string_value=record.name),
            "state": q.Value(string_value=state),
            "record": q.Value(string_value=record_to_json(record)),
            "changed": q.Value(integer_value=time.time_ns() // 1_000_000),
        }
        vector = q.Vectors(vector=q.Vector(dense=q.DenseVector(data=[1.0])))
        request = q.UpsertPoints(
            collection_name=self._name,
            wait=True,
            points=[q.PointStruct(id=_point_id(record.name), vectors=vector, payload=payload)],
            ordering=q.WriteOrdering(type=q.WriteOrderingType.Strong),
        )
        self._connection.call("points", "Upsert", request, WRITE_TIMEOUT_S)

    def _payload(self, name: str) -> dict[str, Any] | None:
        request = q.GetPoints(
            collection_name=self._name,
            ids=[_point_id(name)],
            with_payload=q.WithPayloadSelector(enable=True),
        )
        found = self._connection.call("points", "Get", request, WRITE_TIMEOUT_S).result
        return _plain(found[0]) if found else None

    def _payloads(self) -> Iterator[dict[str, Any]]:
        offset = None
        while True:
            request = q.ScrollPoints(
                collection_name=self._name,
                offset=offset,
                limit=_PAGE,
                with_payload=q.WithPayloadSelector(enable=True),
            )
            page = self._connection.call("points", "Scroll", request, WRITE_TIMEOUT_S)
            yield from map(_plain, page.result)
            if not page.HasField("next_page_offset"):
                return
            offset = page.next_page_offset

    def _where(self, name: str) -> str:
        return f"the record of memory {name!r} in collection {self._name!r}"


def _point_id(name: str) -> Any:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return q.PointId(num=int.from_bytes(digest, "big") >> 1)


def _plain(point: Any) -> dict[str, Any]:
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in point.payload.items()}


def _age_ms(payload: dict[str, Any]) -> int:
    return time.time_ns() // 1_000_000 - int(payload.get("changed", 0))
