"""qdrant.Collections on the store."""

from __future__ import annotations

import time
from typing import Any

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin import checks
from tests.qdrant_standin.configs import new_config
from tests.qdrant_standin.errors import ApiError
from tests.qdrant_standin.store import Store


class CollectionsService(pb.CollectionsServicer):
    """Handlers; refusals are ApiErrors."""

    def __init__(self, store: Store, indexing_threshold_kb: int) -> None:
        self._store, self._indexing_threshold_kb = store, indexing_threshold_kb

    def Get(self, request: pb.GetCollectionInfoRequest, context: Any) -> Any:  # noqa: N802
        started = time.perf_counter()
        checks.collection_name(request.collection_name)
        info = self._store.get(request.collection_name).info()
        return pb.GetCollectionInfoResponse(result=info, time=time.perf_counter() - started)

    def List(self, request: pb.ListCollectionsRequest, context: Any) -> Any:  # noqa: N802
        found = (pb.CollectionDescription(name=name) for name in self._store.names())
        return pb.ListCollectionsResponse(collections=found)

    def Create(self, request: pb.CreateCollection, context: Any) -> Any:  # noqa: N802
        started = time.perf_counter()
        checks.create_collection(request)
        config = new_config(request, self._indexing_threshold_kb, self._store.peers)
        self._store.create(request.collection_name, config, _timeout_s(request))
        return _done(True, started)

    def Update(self, request: pb.UpdateCollection, context: Any) -> Any:  # noqa: N802
        started = time.perf_counter()
        checks.update_collection(request)
        self._store.update(request)
        return _done(True, started)

    def Delete(self, request: pb.DeleteCollection, context: Any) -> Any:  # noqa: N802
        started = time.perf_counter()
        checks.collection_name(request.collection_name)
        checks.at_least(request, "timeout", 1)
        deleted = self._store.delete(request.collection_name, _timeout_s(request))
        return _done(deleted, started)

    def UpdateAliases(self, request: pb.ChangeAliases, context: Any) -> Any:  # noqa: N802
        started = time.perf_counter()
        checks.at_least(request, "timeout", 1)
        self._store.change_aliases(list(request.actions), _timeout_s(request))
        return _done(True, started)

    def ListAliases(self, request: pb.ListAliasesRequest, context: Any) -> Any:  # noqa: N802
        return _aliases(self._store.aliases())

    def ListCollectionAliases(self, request: pb.ListCollectionAliasesRequest, context: Any) -> Any:  # noqa: N802
        checks.collection_name(request.collection_name)
        return _aliases(self._store.aliases(request.collection_name))

    def CollectionExists(self, request: pb.CollectionExistsRequest, context: Any) -> Any:  # noqa: N802
        checks.collection_name(request.collection_name)
        try:
            self._store.get(request.collection_name)
        except ApiError:
            return pb.CollectionExistsResponse(result=pb.CollectionExists(exists=False))
        return pb.CollectionExistsResponse(result=pb.CollectionExists(exists=True))

    def CollectionClusterInfo(self, request: pb.CollectionClusterInfoRequest, context: Any) -> Any:  # noqa: N802
        checks.collection_name(request.collection_name)
        return self._store.cluster_info(request.collection_name)


def _timeout_s(request: Any) -> float | None:
    return float(request.timeout) if request.HasField("timeout") else None


def _done(result: bool, started: float) -> pb.CollectionOperationResponse:
    return pb.CollectionOperationResponse(result=result, time=time.perf_counter() - started)


def _aliases(pairs: list[tuple[str, str]]) -> pb.ListAliasesResponse:
    found = (pb.AliasDescription(alias_name=a, collection_name=c) for a, c in pairs)
    return pb.ListAliasesResponse(aliases=found)
