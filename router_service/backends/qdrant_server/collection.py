"""A layer's collection on a server: searched, written, read, and quantized as the server itself can."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from typing_extensions import override

from router_service.arrays import (
    F32,
    U64,
    Entries,
    ExampleRef,
    Neighbours,
    Provenance,
    combined_digests,
    digests_of,
)
from router_service.backends.base import (
    INT8_QUANTILE,
    Collection,
    CollectionInfo,
    CollectionSpec,
    Compression,
    Quantization,
    Report,
    SearchOptions,
    Shared,
    Versions,
    as_stored,
    numbers_of_scan,
    pages_with_digests,
    per_query,
    say_nothing,
)
from router_service.backends.points import VALUE, provenance_of
from router_service.backends.qdrant_server import messages
from router_service.backends.qdrant_server.connection import (
    ADMIN_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    Connection,
)
from router_service.backends.qdrant_server.failures import classified, error_of
from router_service.backends.qdrant_server.options import WriteOrdering
from router_service.backends.qdrant_server.unfinished_writes import (
    TIME_ONLY,
    UnfinishedWrites,
    Version,
    deletion,
    version_of,
)
from router_service.backends.qdrant_server.wire import q
from router_service.errors import (
    BackendMisconfigured,
    Busy,
    CollectionClosed,
    InvalidField,
)

_TURBO_BITS = {
    Quantization.TURBO4: q.TurboQuantBitSize.Bits4,
    Quantization.TURBO2: q.TurboQuantBitSize.Bits2,
    Quantization.TURBO1: q.TurboQuantBitSize.Bits1,
}
OWN = (
    Quantization.NONE,
    Quantization.INT8,
    *_TURBO_BITS,
    Quantization.BINARY,
    Quantization.PRODUCT,
)


def require_own(compression: Compression) -> None:
    """Raises InvalidField for search keys that are stored beside the keys."""
    if compression.apart:
        expected = (
            f"one of {', '.join(OWN)}: a Qdrant server has these, the others need --backend edge"
        )
        raise InvalidField("compression", compression.label, expected)


def quantization_diff(quantization: Quantization) -> Any:
    """What makes a collection change to a quantization, held in RAM."""
    if quantization is Quantization.NONE:
        return q.QuantizationConfigDiff(disabled=q.Disabled())
    if quantization is Quantization.INT8:
        return q.QuantizationConfigDiff(
            scalar=q.ScalarQuantization(
                type=q.QuantizationType.Int8, quantile=INT8_QUANTILE, always_ram=True
            )
        )
    if quantization is Quantization.BINARY:
        return q.QuantizationConfigDiff(binary=q.BinaryQuantization(always_ram=True))
    if quantization is Quantization.PRODUCT:
        product = q.ProductQuantization(compression=q.CompressionRatio.x16, always_ram=True)
        return q.QuantizationConfigDiff(product=product)
    turbo = q.TurboQuantization(bits=_TURBO_BITS[quantization], always_ram=True)
    return q.QuantizationConfigDiff(turboquant=turbo)


def compression_from(config: Any) -> Compression:
    """The compression that a collection's configuration (CollectionConfig) asks for."""
    match config.quantization_config.WhichOneof("quantization"):
        case "scalar":
            return Compression(Quantization.INT8)
        case "binary":
            return Compression(Quantization.BINARY)
        case "product":
            return Compression(Quantization.PRODUCT)
        case "turboquant":
            bits = config.quantization_config.turboquant.bits
            found = [each for each, size in _TURBO_BITS.items() if size == bits]
            return Compression(found[0] if found else Quantization.TURBO4)
    return Compression()


# Queries per request; those of one lookup are under way together, for the server has more than one core.
_QUERIES_PER_CALL = 64
_FLOATS_PER_UPDATE = 1 << 19
_FLOATS_PER_PAGE = 1 << 20
_MOST_PER_CALL = 1024
_MOST_LISTED = 4096
_POLL_S = 0.2
_BUT_VALUES = q.WithPayloadSelector(exclude=q.PayloadExcludeSelector(fields=[VALUE]))
# Of a layer that is scanned (2,048 x 2,048), for the codes of a small one miss neighbours (docs/recall.md).
_NUMBERS_OF_SMALL = 1 << 22
# Other services write too: how old a number of entries may be that says whether a layer is small.
_COUNT_AGE_S = 5.0
_ORDERINGS = {
    WriteOrdering.WEAK: q.WriteOrderingType.Weak,
    WriteOrdering.MEDIUM: q.WriteOrderingType.Medium,
    WriteOrdering.STRONG: q.WriteOrderingType.Strong,
}


class ServerCollection(Collection, Shared):
    """Ties in distance come in the server's order. A version has what this service had written before it at the least.

    What is under way, and what other services write, may be in it too.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        alias: str,
        spec: CollectionSpec,
        unfinished: UnfinishedWrites,
    ) -> None:
        """`name`: its own, by which it is asked. `alias`: what leads to it while it may be written to."""
        self._connection, self._name, self._spec = connection, name, spec
        self._unfinished = unfinished
        self.alias = alias
        self._options = connection.options
        self._closed = False
        self.versions = Versions()
        self._optimizing = threading.Lock()
        self._entries: int | None = None  # at the last count, which lookups begin
        self._recount_at = -math.inf

    @property
    def name(self) -> str:
        """Its own."""
        return self._name

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @override
    def search(
        self, queries: F32, k: int, options: SearchOptions, exclude: Sequence[ExampleRef] = ()
    ) -> Neighbours:
        self._require_open()
        stored = as_stored(queries, self._spec.metric, "queries")
        excluded = per_query(exclude, len(queries))
        version = self.versions.now
        if not options.exact and self._small(options):
            options = replace(options, exact=True)
        wanted = messages.queries_of(self._name, stored, k, options, excluded)
        results = self._query(wanted, options) if wanted else []
        found = messages.neighbours_from(results, k, self._spec.metric, self._spec.value_width)
        return replace(found, version=version)

    def _small(self, options: SearchOptions) -> bool:
        """Whether a scan costs little, by the number of entries at the last count.

        Only the first lookup waits for a count. Those that find it old, or that follow a change, begin another one
        beside them; when that fails, so do they, and the number stays.
        """
        if self._entries is None or time.monotonic() >= self._recount_at:
            self._recount_at = time.monotonic() + _COUNT_AGE_S
            request = q.CountPoints(collection_name=self._name, exact=False)
            timeout_s = self._time_left(options)
            if self._entries is None:
                reply = self._connection.call("points", "Count", request, timeout_s)
                self._entries = int(reply.result.count)
            else:
                count = self._connection.begin("points", "Count", request, timeout_s)
                count.add_done_callback(self._counted)
        return numbers_of_scan(self._entries, self._spec.dimension) <= _NUMBERS_OF_SMALL

    def _counted(self, count: Any) -> None:
        if not count.cancelled() and count.exception() is None:
            self._entries = int(count.result().result.count)

    def _query(self, queries: Sequence[Any], options: SearchOptions) -> list[Any]:
        timeout_s = self._time_left(options)
        parts = [
            q.QueryBatchPoints(
                collection_name=self._name, query_points=queries[start : start + _QUERIES_PER_CALL]
            )
            for start in range(0, len(queries), _QUERIES_PER_CALL)
        ]
        if len(parts) == 1:
            replies = [self._connection.call("points", "QueryBatch", parts[0], timeout_s)]
        else:
            replies = self._connection.together("points", "QueryBatch", parts, timeout_s)
        return [result for reply in replies for result in reply.result]

    def _time_left(self, options: SearchOptions) -> float:
        """Seconds for a lookup. Raises DeadlineTooShort, and Cancelled when nobody waits for it."""
        options.require_time()
        if options.deadline is None:
            return self._options.timeout_s
        return min(max(0.001, options.deadline - time.monotonic()), self._options.timeout_s)

    @override
    def upsert(self, entries: Entries, *, fsync: bool = False) -> None:  # the server's matter
        """What a return means is the server's write consistency, not fsync."""
        self._require_open()
        requests = self._upserts(entries, wait=self._options.wait)
        with self._changing(), self._unfinished.writing(requests) as acknowledged:
            for request in requests:
                self._connection.call("points", "Upsert", request, WRITE_TIMEOUT_S)
                acknowledged()

    def fill(self, entries: Entries) -> None:
        """Writes entries before any name leads here: nobody goes on with what fails, for the collection goes then."""
        self._require_open()
        for request in self._upserts(entries, wait=True):
            self._connection.call("points", "Upsert", request, WRITE_TIMEOUT_S)

    def _upserts(self, entries: Entries, *, wait: bool) -> list[Any]:
        """Requests that write entries, of repeated ids the last. Raises InvalidField on a zero vector under cosine."""
        keys = as_stored(entries.keys, self._spec.metric, "keys")
        _, last = np.unique(entries.ids[::-1], return_index=True)
        kept = np.sort(len(entries) - 1 - last)
        points = messages.points_of(replace(entries, keys=keys).take(kept))
        step = min(max(_FLOATS_PER_UPDATE // self._spec.dimension, 8), _MOST_PER_CALL)
        return [
            q.UpsertPoints(
                collection_name=self._name,
                wait=wait,
                points=points[start : start + step],
                ordering=self._ordering,
            )
            for start in range(0, len(points), step)
        ]

    @override
    def delete(self, ids: U64, *, fsync: bool = False) -> int:  # the server's matter
        """What a return means is the server's write consistency, not fsync."""
        self._require_open()
        deleted, wanted = 0, np.unique(ids)
        for start in range(0, len(wanted), _MOST_PER_CALL):
            ids = wanted[start : start + _MOST_PER_CALL]
            # Some replicas may have them, whatever the one says that is asked.
            unfinished = self._unfinished.versions_of(self._name, set(ids.tolist()))
            found = self._get(ids, TIME_ONLY)
            if versions := [*map(version_of, found), *unfinished]:
                with self._changing():
                    self._delete(versions)
                deleted += len(found)
        if not deleted:
            self.require_led_to()
        return deleted

    def _delete(self, versions: Sequence[Version]) -> None:
        ids = [q.PointId(num=number) for number in sorted({number for number, _ in versions})]
        request = q.DeletePoints(
            collection_name=self._name,
            wait=self._options.wait,
            points=q.PointsSelector(points=q.PointsIdsList(ids=ids)),
            ordering=self._ordering,
        )
        noted = deletion(self._name, versions, self._ordering)
        with self._unfinished.writing([noted]) as acknowledged:
            self._connection.call("points", "Delete", request, WRITE_TIMEOUT_S)
            acknowledged()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a change that another service must not have made in vain: it may put another collection in the place.

        Raises CollectionClosed when that has happened before the change was done.
        """
        try:
            yield
        finally:
            self.versions.advance()  # what fails may have been done all the same
            self._recount_at = -math.inf
        self.require_led_to()

    def require_led_to(self) -> None:
        """Raises CollectionClosed when another collection has come into its place."""
        request = q.ListCollectionAliasesRequest(collection_name=self._name)
        found = self._connection.call(
            "collections", "ListCollectionAliases", request, WRITE_TIMEOUT_S
        )
        if self.alias not in {each.alias_name for each in found.aliases}:
            raise CollectionClosed(f"collection {self._name!r}, which was {self.alias!r},")

    @override
    def scroll(self, after: int | None, limit: int, *, with_keys: bool = True) -> Entries:
        self._require_open()
        dimension = self._spec.dimension if with_keys else 0
        most = max(_FLOATS_PER_PAGE // max(dimension, self._spec.value_width), 16)
        pages: list[Entries] = []
        while limit > 0:
            size = min(limit, most, _MOST_PER_CALL)
            page = self._page(after, size, dimension)
            pages.append(page)
            limit -= size
            if len(page) < size:
                break
            after = int(page.ids[-1])
        return Entries.concat(pages, dimension, self._spec.value_width)

    def _page(self, after: int | None, size: int, dimension: int) -> Entries:
        found = self._scrolled(after, size, keys=bool(dimension))
        return messages.entries_from(found, dimension, self._spec.value_width)

    def _scrolled(self, after: int | None, size: int, *, keys: bool) -> list[Any]:
        request = q.ScrollPoints(
            collection_name=self._name,
            offset=None if after is None else q.PointId(num=after + 1),
            limit=size,
            with_payload=q.WithPayloadSelector(enable=True),
            with_vectors=q.WithVectorsSelector(enable=keys),
        )
        return list(self._connection.call("points", "Scroll", request, WRITE_TIMEOUT_S).result)

    @override
    def all_entries(self, page_entries: int) -> Iterator[tuple[Entries, U64]]:
        return pages_with_digests(self, page_entries)

    @override
    def entries(self, ids: U64) -> Entries:
        step = self.entries_per_page
        found = [self.copied_ids(ids[n : n + step])[0] for n in range(0, len(ids), step)]
        entries = Entries.concat(found, self._spec.dimension, self._spec.value_width)
        return entries.take(np.argsort(entries.ids))

    @override
    def digests(self, after: int | None, limit: int) -> tuple[U64, U64]:
        """Reads the keys: the server knows no digests."""
        page = self.scroll(after, limit)
        return page.ids, combined_digests(digests_of(page))

    def copied(self, after: int | None) -> tuple[Entries, U64]:
        """The next page of entries above an id, and their digests; empty after the last."""
        self._require_open()
        return self._digested(self._scrolled(after, self.entries_per_page, keys=True))

    def copied_ids(self, ids: U64) -> tuple[Entries, U64]:
        """Those of these ids that are there, in any order, and their digests; as many as a page has at most."""
        self._require_open()
        return self._digested(self._get(ids, q.WithPayloadSelector(enable=True), keys=True))

    @override
    def listed(self, after: int | None) -> tuple[U64, U64]:
        """An eighth of the time of scroll() without keys."""
        self._require_open()
        most = max(_FLOATS_PER_PAGE // self._spec.value_width, 16)
        found = self._scrolled(after, min(most, _MOST_LISTED), keys=False)
        ids = np.fromiter((point.id.num for point in found), np.uint64, len(found))
        return ids, messages.digests_from(found)

    @property
    def entries_per_page(self) -> int:
        """Of copied()."""
        wide = max(self._spec.dimension, self._spec.value_width)
        return min(max(_FLOATS_PER_PAGE // wide, 16), _MOST_PER_CALL)

    def _digested(self, points: Sequence[Any]) -> tuple[Entries, U64]:
        entries = messages.entries_from(points, self._spec.dimension, self._spec.value_width)
        return entries, messages.digests_from(points)

    @override
    def provenance(self, ids: U64) -> dict[int, Provenance]:
        self._require_open()
        found: dict[int, Provenance] = {}
        for start in range(0, len(ids), _MOST_PER_CALL):
            for point in self._get(ids[start : start + _MOST_PER_CALL], _BUT_VALUES):
                found[point.id.num] = provenance_of(messages.payload_from(point))
        return found

    def _get(self, ids: U64, payload: Any, *, keys: bool = False) -> list[Any]:
        """Points of these ids with some of their payload (WithPayloadSelector)."""
        request = q.GetPoints(
            collection_name=self._name,
            ids=messages.point_ids(ids),
            with_payload=payload,
            with_vectors=q.WithVectorsSelector(enable=keys),
        )
        return list(self._connection.call("points", "Get", request, WRITE_TIMEOUT_S).result)

    @override
    def info(self) -> CollectionInfo:
        """`disk_bytes` is None: the server does not say."""
        self._require_open()
        state = self._state()
        count = q.CountPoints(collection_name=self._name, exact=True)
        entries = int(self._connection.call("points", "Count", count, WRITE_TIMEOUT_S).result.count)
        indexed = min(int(state.indexed_vectors_count), entries)
        unfinished = self._unfinished.of(self._name)
        return CollectionInfo(
            entries, indexed, compression_from(state.config), None, unfinished=unfinished
        )

    @override
    def optimize(
        self, compression: Compression | None = None, report: Report = say_nothing
    ) -> None:
        """Asks the server for what is wanted, and waits until it is done.

        Raises InvalidField for search keys apart, which a server does not have.
        """
        self._require_open()
        if not self._optimizing.acquire(blocking=False):
            raise Busy(f"{self._name} is being optimized; try again when that is done")
        try:
            if compression is not None and not self.quantize(compression):
                raise BackendMisconfigured(
                    f"Qdrant {self._connection.version} at {self._options.url} does not know {compression.label}; "
                    "upgrade it, or choose another quantization"
                )
            self._wait_until_optimized(report)
        finally:
            self._optimizing.release()

    def quantize(self, wanted: Compression) -> bool:
        """Tells the server what is wanted; False when it does not know it.

        Raises InvalidField for search keys apart.
        """
        require_own(wanted)
        if compression_from(self._state().config) == wanted:
            return True
        diff = quantization_diff(wanted.quantization)
        request = q.UpdateCollection(collection_name=self._name, quantization_config=diff)
        self._connection.call("collections", "Update", request, ADMIN_TIMEOUT_S)
        # An older server skips what it does not know
        return compression_from(self._state().config) == wanted

    def _wait_until_optimized(self, report: Report) -> None:
        """Until the server says so twice: it may not have begun at the first time."""
        greens = 0
        while greens < 2:
            state = self._state()
            if not state.optimizer_status.ok and state.optimizer_status.error:
                raise error_of(
                    classified("INTERNAL", state.optimizer_status.error),
                    self._options,
                    ADMIN_TIMEOUT_S,
                )
            if state.status == q.CollectionStatus.Grey:
                self._wake_optimizers()
            greens = greens + 1 if state.status == q.CollectionStatus.Green else 0
            report("optimize", int(state.indexed_vectors_count), int(state.points_count))
            if greens < 2:
                time.sleep(_POLL_S)
                self._require_open()

    def _wake_optimizers(self) -> None:
        """After a restart the server leaves its optimizers asleep until the collection is changed."""
        nothing = q.OptimizersConfigDiff()
        request = q.UpdateCollection(collection_name=self._name, optimizers_config=nothing)
        self._connection.call("collections", "Update", request, ADMIN_TIMEOUT_S)

    @override
    def flush(self) -> None:
        """A server has no such call, its own write-ahead log and flushes do that."""
        self._require_open()

    @override
    def close(self) -> None:
        """Nothing is left here that the server does not have."""
        self._closed = True

    @property
    def _ordering(self) -> Any:
        return q.WriteOrdering(type=_ORDERINGS[self._options.ordering])

    def _state(self) -> Any:
        request = q.GetCollectionInfoRequest(collection_name=self._name)
        return self._connection.call("collections", "Get", request, WRITE_TIMEOUT_S).result

    def _require_open(self) -> None:
        if self._closed:
            raise CollectionClosed(self._name)
