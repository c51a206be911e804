"""What the page shows, read through the calls of `router-admin`; what is costly to find is kept until it changes."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
from knnmoe import tensors
from knnmoe.client import AdminClient, ServiceError, ServiceRefused
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import operations_pb2, snapshots_pb2

from router_service.cli.output import plain
from router_service.dashboard.history import Document, History, Sampler, quantile_s
from router_service.dashboard.projection import principal_plane

log = logging.getLogger(__name__)

T = TypeVar("T")

# Several open pages share one answer that is no older.
_FRESH_S = 1.0
# Between samples of the history: while a page is open, which asks every few seconds, and else.
SAMPLE_S, _IDLE_SAMPLE_S, _LOOKED_AT_S = 5.0, 30.0, 15.0
# Entries of a map: 2,000, or as many as have 32 MiB of keys.
MAP_ENTRIES, _MAP_BYTES = 2000, 32 << 20
# Maps and lists of sources that are kept.
_KEPT = 32


class Kept:
    """Results by what they were made of; whoever asks for one that is being made waits for it."""

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, Any] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make`, which is called once per key while that is among the last 32."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            if key not in self._found:
                self._found[key] = make()
            with self._lock:
                self._making.pop(key, None)
                while len(self._found) > _KEPT:
                    self._found.popitem(last=False)
                found: T = self._found[key]
        return found


class View:
    """A service, as the page sees it. Methods raise ServiceError."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._history, self._kept = History(), Kept()
        self._overview: tuple[float, Document] | None = None
        self._asked, self._noted = float("-inf"), 0.0
        self._lock = threading.Lock()
        self._sampler = Sampler(self._sample, self._sample_wait_s)

    def start(self) -> None:
        """Begins the history."""
        self._sampler.start()

    def stop(self) -> None:
        """Ends the history."""
        self._sampler.stop()

    def overview(self) -> Document:
        """Statistics, memories and operations: `stats`, `memory list` and `operations list`."""
        self._asked = time.monotonic()
        with self._lock:
            if self._overview is None or time.monotonic() - self._overview[0] > _FRESH_S:
                self._overview = time.monotonic(), self._read_overview()
            return self._overview[1]

    def history(self, memory: str) -> Document:
        """Rates of one memory over time."""
        return {"rates": self._history.rates(memory)}

    def snapshots(self) -> Document:
        """`snapshot list`, or the remark of a service that keeps none."""
        request = snapshots_pb2.ListSnapshotsRequest()
        try:
            reply = self._client.unary(self._client.snapshots.ListSnapshots, request, repeat=True)
        except ServiceRefused as refused:
            return {"snapshots": [], "remark": refused.message}
        return plain(reply) | {"remark": ""}

    def sources(self, memory: str) -> Document:
        """`sources`, of the memory's present version."""
        described = self._client.describe(memory)
        key = ("sources", memory, described.epoch, described.version)
        return self._kept.get(key, lambda: self._read_sources(memory, described.version))

    def map(self, memory: str, layer: int) -> Document:
        """A sample of a layer's keys in two dimensions, of the memory's present version."""
        described = self._client.describe(memory)
        key = ("map", memory, layer, described.epoch, described.version)
        dimension = described.fingerprint.hidden_size
        most = min(MAP_ENTRIES, max(100, _MAP_BYTES // (4 * dimension)))
        return self._kept.get(key, lambda: self._read_map(memory, layer, most, described.version))

    def explain(self, memory: str, layer: int, entry: int) -> Document:
        """An entry, and the entries of other examples that a token like it would find."""
        request = pb.ExplainEntryRequest(memory=memory, layer=layer, id=entry)
        found = plain(self._client.unary(self._client.admin.ExplainEntry, request, repeat=True))
        found["token"] = _shown_token(found["token"])
        return found

    def recent(self, memory: str, layer: int) -> Document:
        """The tokens that the service looked up last in a layer."""
        request = pb.RecentLookupsRequest(memory=memory, layer=layer)
        found = plain(self._client.unary(self._client.admin.RecentLookups, request, repeat=True))
        return {"tokens": [_shown_token(token) for token in found["tokens"]]}

    def _read_stats(self) -> Document:
        return plain(self._client.unary(self._client.admin.Stats, pb.StatsRequest(), repeat=True))

    def _read_overview(self) -> Document:
        stats = self._read_stats()
        self._note(stats)
        memories = self._client.unary(
            self._client.admin.ListMemories, pb.ListMemoriesRequest(), repeat=True
        )
        operations = self._client.unary(
            self._client.operations.ListOperations,
            operations_pb2.ListOperationsRequest(),
            repeat=True,
        )
        bounds = stats["duration_bounds_s"]
        return {
            "target": self._client.target,
            "at_unix_ms": int(1000 * time.time()),
            "stats": stats,
            "memories": plain(memories)["memories"],
            "operations": plain(operations)["operations"],
            "stages": {each["memory"]: _stages(each, bounds) for each in stats["memories"]},
        }

    def _read_sources(self, memory: str, version: int) -> Document:
        call = self._client.admin.ListSources(pb.ListSourcesRequest(memory=memory))
        found: list[Document] = []
        unlisted = 0
        for reply in self._client.replies(call, long=True):
            found += [plain(source) for source in reply.page.sources]
            unlisted += reply.page.unlisted_entries
        found.sort(key=lambda source: -source["entries"])
        return {"version": version, "sources": found, "unlisted_entries": unlisted}

    def _read_map(self, memory: str, layer: int, most: int, version: int) -> Document:
        request = pb.ExportRequest(memory=memory, layer=layer, sample=most)
        parts = [
            reply.entries for reply in self._client.replies(self._client.admin.Export(request))
        ]
        ids = [number for part in parts for number in tensors.to_array(part.ids).tolist()]
        origins = [plain(origin) for part in parts for origin in part.provenance]
        keys = [tensors.to_array(part.keys) for part in parts]
        plane, share = principal_plane(np.concatenate(keys)) if keys else (np.empty((0, 2)), 0.0)
        points = [
            {"id": str(number), "x": round(x, 5), "y": round(y, 5), "provenance": origin}
            for number, (x, y), origin in zip(ids, plane.tolist(), origins, strict=True)
        ]
        return {"version": version, "variance_share": share, "points": points}

    def _sample(self) -> None:
        if time.monotonic() - self._asked < _LOOKED_AT_S:
            return  # pages that are open bring them
        try:
            self._note(self._read_stats())
        except ServiceError as error:
            log.warning("no sample for the history: %s", error)

    def _note(self, stats: Document) -> None:
        now = time.time()
        if now - self._noted > SAMPLE_S - _FRESH_S:
            self._noted = now
            self._history.add(now, stats)

    def _sample_wait_s(self) -> float:
        looked_at = time.monotonic() - self._asked < _LOOKED_AT_S
        return SAMPLE_S if looked_at else _IDLE_SAMPLE_S


def _stages(memory: Document, bounds_s: list[float]) -> list[Document]:
    return [
        {
            "stage": stage["stage"],
            "lookups": sum(stage["counts"]),
            "mean_ms": 1000 * stage["sum_s"] / max(1, sum(stage["counts"])),
            "p50_ms": _in_ms(quantile_s(stage["counts"], bounds_s, 0.5)),
            "p99_ms": _in_ms(quantile_s(stage["counts"], bounds_s, 0.99)),
        }
        for stage in memory["stages"]
    ]


def _in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _shown_token(token: Document) -> Document:
    """Ids as text: a browser's numbers end at 2^53."""
    cases = [case | {"id": str(case["id"])} for case in token["cases"]]
    return token | {"cases": cases}
