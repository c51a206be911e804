"""qdrant.Points on the store."""

from __future__ import annotations

import time
from typing import Any

import qdrant_edge as qe

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin import checks
from tests.qdrant_standin.collection import Collection
from tests.qdrant_standin.errors import bad_input, empty_update, invalid, unimplemented, validation
from tests.qdrant_standin.faults import Faults
from tests.qdrant_standin.field_indexes import index_schema
from tests.qdrant_standin.filters import optional_filter
from tests.qdrant_standin.queries import query_request, scroll_request, selected
from tests.qdrant_standin.store import Store
from tests.qdrant_standin.values import (
    id_message,
    payload,
    payload_message,
    point_id,
    point_ids,
    vectors,
    vectors_message,
    with_payload,
    with_vectors,
)
from tests.qdrant_standin.writes import Write, for_all

_MODES = {
    pb.Upsert: qe.UpdateMode.Upsert,
    pb.InsertOnly: qe.UpdateMode.InsertOnly,
    pb.UpdateOnly: qe.UpdateMode.UpdateOnly,
}


class PointsService(pb.PointsServicer):
    """Handlers; refusals are ApiErrors."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self._store, self._faults = store, faults

    def Upsert(self, request: pb.UpsertPoints, context: Any) -> Any:  # noqa: N802
        started, collection = self._begin(request)
        if not request.points:
            raise empty_update()
        condition = optional_filter(request, "update_filter")
        points = [_point(collection, message) for message in request.points]
        mode = _MODES[request.update_mode] if request.HasField("update_mode") else None
        upsert = qe.UpdateOperation.upsert_points
        write = Write(
            lambda some: upsert(some, condition, mode), points, [point.id for point in points]
        )
        return self._write(collection, write, request, started)

    def Delete(self, request: pb.DeletePoints, context: Any) -> Any:  # noqa: N802
        return self._select(request, "points", "delete_points")

    def SetPayload(self, request: pb.SetPayloadPoints, context: Any) -> Any:  # noqa: N802
        key = request.key if request.HasField("key") else None
        fields = payload(request.payload)
        return self._select(request, "points_selector", "set_payload", fields, key)

    def OverwritePayload(self, request: pb.SetPayloadPoints, context: Any) -> Any:  # noqa: N802
        fields = payload(request.payload)
        return self._select(request, "points_selector", "overwrite_payload", fields)

    def DeletePayload(self, request: pb.DeletePayloadPoints, context: Any) -> Any:  # noqa: N802
        return self._select(request, "points_selector", "delete_payload", list(request.keys))

    def ClearPayload(self, request: pb.ClearPayloadPoints, context: Any) -> Any:  # noqa: N802
        return self._select(request, "points", "clear_payload")

    def CreateFieldIndex(self, request: pb.CreateFieldIndexCollection, context: Any) -> Any:  # noqa: N802
        started, collection = self._begin(request)
        operation = qe.UpdateOperation.create_field_index(_field(request), index_schema(request))
        self._store.change_fields(request, operation)
        return self._write(collection, for_all(operation), request, started)

    def DeleteFieldIndex(self, request: pb.DeleteFieldIndexCollection, context: Any) -> Any:  # noqa: N802
        started, collection = self._begin(request)
        operation = qe.UpdateOperation.delete_field_index(_field(request))
        self._store.change_fields(request, operation)
        return self._write(collection, for_all(operation), request, started)

    def Get(self, request: pb.GetPoints, context: Any) -> Any:  # noqa: N802
        started, collection = self._begin(request)
        ids, payloads = point_ids(request.ids), False
        if request.HasField("with_payload"):
            payloads = with_payload(request.with_payload)
        wanted = with_vectors(request.with_vectors)
        found = collection.call(lambda shard: shard.retrieve(ids, payloads, wanted))
        return pb.GetResponse(result=map(_record, found), time=_since(started))

    def Scroll(self, request: pb.ScrollPoints, context: Any) -> Any:  # noqa: N802
        checks.at_least(request, "limit", 1)
        started, collection = self._begin(request)
        page = scroll_request(request)
        found, following = collection.call(lambda shard: shard.scroll(page))
        offset = None if following is None else id_message(following)
        return pb.ScrollResponse(
            result=map(_record, found), next_page_offset=offset, time=_since(started)
        )

    def Count(self, request: pb.CountPoints, context: Any) -> Any:  # noqa: N802
        started, collection = self._begin(request)
        exact = request.exact if request.HasField("exact") else True
        wanted = qe.CountRequest(exact=exact, filter=optional_filter(request))
        count = collection.call(lambda shard: shard.count(wanted))
        return pb.CountResponse(result=pb.CountResult(count=count), time=_since(started))

    def Query(self, request: pb.QueryPoints, context: Any) -> Any:  # noqa: N802
        checks.query(request)
        started, collection = self._begin(request)
        wanted = query_request(collection, request)
        found = collection.call(lambda shard: shard.query(wanted))
        found = [] if self._faults.blinds(collection.name) else found
        return pb.QueryResponse(result=map(_scored, found), time=_since(started))

    def QueryBatch(self, request: pb.QueryBatchPoints, context: Any) -> Any:  # noqa: N802
        for each in request.query_points:
            checks.query(each)
        started, collection = self._begin(request)
        wanted = [query_request(collection, each) for each in request.query_points]
        batch = qe.QueryBatchRequest(wanted)
        found = collection.call(lambda shard: shard.query_batch(batch))
        found = [[]] * len(found) if self._faults.blinds(collection.name) else found
        results = (pb.BatchResult(result=map(_scored, hits)) for hits in found)
        return pb.QueryBatchResponse(result=results, time=_since(started))

    def _begin(self, request: Any) -> tuple[float, Collection]:
        started = time.perf_counter()
        checks.collection_name(request.collection_name)
        if request.DESCRIPTOR.fields_by_name.get("shard_key_selector") and request.HasField(
            "shard_key_selector"
        ):
            raise unimplemented("shard keys")
        return started, self._store.get(request.collection_name).bound(request)

    def _select(self, request: Any, field: str, name: str, *rest: Any) -> Any:
        """Writes to the points that a field selects, by the engine's operation of this name."""
        if not request.HasField(field):
            missing = {"points": "PointSelector is missing"}
            raise invalid(missing.get(field, f"{field} is expected"))
        started, collection = self._begin(request)
        info = collection.info()
        if info.config.strict_mode_config.enabled:
            checks.strict_update(info, getattr(request, field).filter)
        write = selected(getattr(request, field), name, *rest)
        return self._write(collection, write, request, started)

    def _write(
        self, collection: Collection, write: Write, request: Any, started: float
    ) -> pb.PointsOperationResponse:
        """Applies an operation before it answers, also without `wait`: what is acknowledged survives a kill."""
        number = collection.write(write)
        self._store.written(collection)
        status = pb.Completed if request.wait else pb.Acknowledged
        result = pb.UpdateResult(operation_id=number, status=status)
        return pb.PointsOperationResponse(result=result, time=_since(started))


def _field(request: Any) -> str:
    if not request.field_name:
        text = 'value "" invalid, must be at least 1 characters'
        raise validation("field_name", text)
    return str(request.field_name)


def _point(collection: Collection, message: pb.PointStruct) -> Any:
    if not message.HasField("vectors"):
        raise invalid("Expected some vectors")
    if not message.HasField("id"):
        raise invalid("Empty ID is not allowed")
    given = vectors(message.vectors)
    for name, vector in given.items():
        if name not in collection.vectors:
            raise bad_input(f"Not existing vector name error: {name}")
        if len(vector) != collection.vectors[name].size:
            expected = collection.vectors[name].size
            raise bad_input(f"Vector dimension error: expected dim: {expected}, got {len(vector)}")
    return qe.Point(point_id(message.id), given, payload(message.payload) or None)


def _record(found: Any) -> pb.RetrievedPoint:
    return pb.RetrievedPoint(
        id=id_message(found.id),
        payload=payload_message(found.payload),
        vectors=vectors_message(found.vector),
    )


def _scored(found: Any) -> pb.ScoredPoint:
    return pb.ScoredPoint(
        id=id_message(found.id),
        payload=payload_message(found.payload),
        score=found.score,
        version=found.version,
        vectors=vectors_message(found.vector),
    )


def _since(started: float) -> float:
    return time.perf_counter() - started
