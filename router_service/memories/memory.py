"""One memory: the identity of its model, its settings, and a LayerMemory per MoE layer.

What comes from outside is checked here, against the memory's model; layers and backends get arrays that are sound.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from router_service import checks
from router_service.arrays import F32, U64, AnyArray, Assignment, Entries
from router_service.backends.base import Collection, CollectionSpec, Versions, pages
from router_service.errors import (
    InvalidField,
    InvalidTensor,
    KindMismatch,
    LayerNotFound,
    StorageError,
)
from router_service.fingerprint import ModelFingerprint
from router_service.memories import settings as memory_settings
from router_service.memories.calibration import LayerCalibration, Queries, calibrated
from router_service.memories.changes import SETTINGS, ChangeLog
from router_service.memories.layer import LayerMemory, RouteAnswer, RouteQuery
from router_service.memories.settings import MemorySettings, Similarity

log = logging.getLogger(__name__)

# Numbers in the neighbours' values of one request: T x K x W, 512 MiB in f32.
MAX_VALUES = 2**27
_IDS_PER_PAGE = 4096
_CLOSED_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """What is written down about a memory beside its entries."""

    name: str
    fingerprint: ModelFingerprint
    settings: MemorySettings
    created_unix_ms: int
    # Own names of the layers' collections, where the names made of the memory's may come to lead elsewhere.
    collections: tuple[str, ...] = ()

    @property
    def value_width(self) -> int:
        """Width W of a value row; see Kind."""
        return self.settings.kind.value_width(self.fingerprint.num_experts, self.fingerprint.top_k)


def collection_name(home: str, layer: int) -> str:
    """Of a layer; `home` as in manifest.home_of()."""
    return f"{home}/layer-{layer:03d}"


def collection_names(record: MemoryRecord, home: str = "") -> list[str]:
    """Of all layers, in their order; where no home is given they are under the memory's own name."""
    numbers = range(record.fingerprint.num_layers)
    return [collection_name(home or record.name, number) for number in numbers]


def spec_of(record: MemoryRecord) -> CollectionSpec:
    """What the collections of a memory hold."""
    return CollectionSpec(
        record.fingerprint.hidden_size, record.settings.similarity.metric, record.value_width
    )


def are_read_alike(one: MemoryRecord, other: MemoryRecord) -> bool:
    """Whether open collections can stay as they are when the record of their memory becomes another."""
    alike = one.fingerprint == other.fingerprint and spec_of(one) == spec_of(other)
    return alike and one.collections == other.collections


@dataclass(frozen=True, slots=True)
class _Reading:
    """A record, and the first version that is read by its settings."""

    record: MemoryRecord
    since: int


class RoutingMemory:
    """Validates what comes from outside against the memory's model, then asks the layer."""

    def __init__(
        self,
        record: MemoryRecord,
        layers: Sequence[LayerMemory],
        versions: Versions | None = None,
        changes: ChangeLog | None = None,
    ) -> None:
        """`versions`: where those of another memory go on; None: from 1. `changes`: of its layers; None: a new log."""
        self.layers = tuple(layers)
        self.versions = versions or Versions()
        self._reading = _Reading(record, self.versions.now)
        self.changes = changes or ChangeLog(self.versions)
        for layer in self.layers:
            layer.versions, layer.changes = self.versions, self.changes

    @property
    def record(self) -> MemoryRecord:
        """As it is now."""
        return self._reading.record

    @property
    def version(self) -> int:
        """Rises with every change of entries or settings."""
        return self.versions.now

    def layer(self, number: int) -> LayerMemory:
        """Raises LayerNotFound."""
        if not 0 <= number < len(self.layers):
            raise LayerNotFound(number, len(self.layers))
        return self.layers[number]

    def chosen_layers(self, numbers: Sequence[int]) -> list[LayerMemory]:
        """The layers of these numbers, each once, or all when there are none. Raises LayerNotFound."""
        return [self.layer(number) for number in sorted(set(numbers))] or list(self.layers)

    def route(self, layer: int, model_digest: str, query: RouteQuery) -> RouteAnswer:
        """Blends T tokens of one layer. Raises what the checks raise, and StorageError."""
        self.record.fingerprint.require_digest(model_digest)
        memory = self.layer(layer)
        self._check_query(query)
        while True:
            reading = self._reading
            answer = memory.route(query, reading.record.settings)
            if self._reading is reading:
                since = reading.since  # settings that came between the last write and the search
                return answer if answer.version >= since else replace(answer, version=since)

    def upsert(
        self, layer: int, model_digest: str, entries: Entries, *, fsync: bool = False
    ) -> None:
        """Writes entries of one layer, all or (on an error before the first write) none."""
        self.record.fingerprint.require_digest(model_digest)
        memory = self.layer(layer)
        memory.upsert(self._checked_entries(entries), fsync=fsync)

    def delete(self, layer: int, ids: U64, *, fsync: bool = False) -> int:
        """Removes entries of one layer and returns how many were there."""
        return self.layer(layer).delete(ids, fsync=fsync)

    def change_settings(self, record: MemoryRecord) -> None:
        """Reads by other settings from the next Route on."""
        with self.changes.changing(SETTINGS), self.versions.changing() as number:
            self._reading = _Reading(record, number)

    def calibrate(
        self,
        layer: int,
        lambda0: float,
        quantile: float,
        inputs: F32 | None,
        sample: int,
        on_page: Callable[[int], None],
    ) -> LayerCalibration:
        """See calibrated(): from exact distances.

        inputs: router inputs [n, d] of held-out text; None: `sample` of the layer's own keys, each against the
        entries of other examples. Raises InvalidField when the layer has nothing to measure.
        """
        memory = self.layer(layer)
        self._require_bandwidth()
        if inputs is None:
            queries = Queries.of_own(sample_entries(memory, sample), memory.info().entries)
        else:
            self._check_inputs("inputs.router_inputs", inputs)
            queries = Queries(inputs)
        return calibrated(layer, memory.collection, queries, lambda0, quantile, on_page)

    def _require_bandwidth(self) -> None:
        if self.record.settings.similarity is not Similarity.RBF:
            raise InvalidField(
                "memory",
                f"similarity {self.record.settings.similarity}",
                "an rbf memory: cosine similarity has no bandwidth to calibrate",
            )

    def _check_query(self, query: RouteQuery) -> None:
        self._check_inputs("router_inputs", query.router_inputs)
        tokens = len(query.router_inputs)
        self._check_neighbours(query.neighbours, tokens)
        if len(query.exclude) not in (0, 1, tokens):
            raise InvalidField(
                "exclude", len(query.exclude), f"none, 1, or {tokens} (one per token)"
            )
        if isinstance(query.own, Assignment) == self.record.settings.kind.blends_logits:
            self._refuse_kind(
                "assignment" if isinstance(query.own, Assignment) else "router_logits"
            )
        if isinstance(query.own, Assignment):
            self._check_assignment("assignment", query.own, tokens)
        else:
            self._check_width("router_logits", query.own, tokens, "num_experts")
            checks.require_finite("router_logits", query.own)

    def _check_neighbours(self, asked: int | None, tokens: int) -> None:
        """K in range, and the neighbours' values of the whole request small enough to hold in RAM."""
        if asked is not None and not 1 <= asked <= memory_settings.MAX_NEIGHBOURS:
            raise InvalidField("neighbours", asked, f"1 to {memory_settings.MAX_NEIGHBOURS}")
        k = asked or self.record.settings.neighbours
        most = max(1, MAX_VALUES // (k * self.record.value_width))
        if tokens > most:
            raise InvalidField(
                "router_inputs", f"{tokens} tokens", f"at most {most} per request with K = {k}"
            )

    def _check_inputs(self, field: str, inputs: F32) -> None:
        self._check_width(field, inputs, None, "hidden_size")
        checks.require_finite(field, inputs)

    def _check_width(self, field: str, matrix: AnyArray, rows: int | None, width: str) -> None:
        """A matrix [rows, width]; `width` names a field of the model's fingerprint."""
        columns = getattr(self.record.fingerprint, width)
        checks.require_matrix(field, matrix, rows, columns, f"{width} of the memory's model")

    def _check_assignment(self, field: str, assignment: Assignment, rows: int) -> None:
        for name in ("experts", "weights"):
            self._check_width(f"{field}.{name}", getattr(assignment, name), rows, "top_k")
        checks.require_assignment(field, assignment, self.record.fingerprint.num_experts)

    def _refuse_kind(self, got: str) -> None:
        kind = self.record.settings.kind
        wanted = "router_logits" if kind.blends_logits else "assignment"
        raise KindMismatch(
            f"own: got {got}, expected {wanted} (memory {self.record.name!r} holds {kind.plural})"
        )

    def _checked_entries(self, entries: Entries) -> Entries:
        self._check_width("entries.keys", entries.keys, None, "hidden_size")
        rows = len(entries.keys)
        if entries.ids.shape != (rows,):
            raise InvalidTensor(
                "entries.ids",
                f"shape {list(entries.ids.shape)}",
                f"shape [{rows}] (one id per key)",
            )
        checks.require_ids("entries.ids", entries.ids)
        checks.require_finite("entries.keys", entries.keys)
        self._check_values(entries.values, rows)
        checks.require_provenance(entries.provenance, rows)
        now = time.time_ns() // 1_000_000
        stamped = [
            p if p.created_unix_ms else replace(p, created_unix_ms=now) for p in entries.provenance
        ]
        return replace(entries, provenance=stamped)

    def _check_values(self, values: F32, rows: int) -> None:
        kind = self.record.settings.kind
        if kind.blends_logits:
            self._check_width(f"entries.{kind.plural}", values, rows, "num_experts")
            checks.require_finite(f"entries.{kind.plural}", values)
            return
        half = values.shape[-1] // 2
        # 2^31 - 1 is 2^31 in f32 and wraps: refused below all the same.
        with np.errstate(invalid="ignore"):
            experts = values[..., :half].astype(np.int32)
        assignment = Assignment(experts, values[..., half:])
        self._check_assignment("entries.assignments", assignment, rows)


def sample_entries(memory: LayerMemory, sample: int, seed: int = 0) -> Entries:
    """Up to `sample` entries, spread evenly over the layer's ids (ids are hashes, so this is a random sample).

    Where they are not, and few are found so, each entry is as likely as any other.
    """
    rng = np.random.default_rng(seed)
    starts = np.sort(rng.integers(0, 2**63 - 1, size=max(1, sample // 64), dtype=np.int64))
    parts = [memory.collection.scroll(int(start), 64) for start in starts]
    found = np.unique(np.concatenate([part.ids for part in parts]))
    if 2 * len(found) < sample:
        parts = _picked(memory.collection, sample, rng)
    entries = Entries.concat([part for part in parts if len(part)] or parts[:1])
    return entries.take(np.unique(entries.ids, return_index=True)[1])  # starts may overlap


def _picked(collection: Collection, sample: int, rng: np.random.Generator) -> list[Entries]:
    """`sample` entries one by one, or all if there are no more."""
    numbers = [page.ids for page in pages(collection, _IDS_PER_PAGE, with_keys=False)]
    ids = np.concatenate([np.empty(0, np.uint64), *numbers])
    if len(ids) <= sample:
        return [collection.scroll(None, sample)]
    chosen = np.sort(rng.choice(ids, sample, replace=False))
    return [collection.scroll(number - 1 if number else None, 1) for number in chosen.tolist()]


def forget_hits(layers: Sequence[LayerMemory]) -> None:
    """The layers of their names hold other entries now: what was counted goes, and its files."""
    for layer in layers:
        try:
            layer.hits.remove()
        except StorageError:
            log.exception("hit counts of what layer %d held are still there", layer.layer)


def close_all(layers: Sequence[LayerMemory]) -> list[StorageError]:
    """Closes every layer's collection; those that fail, and are returned, do not keep the others open."""

    def close(layer: LayerMemory) -> StorageError | None:
        try:
            layer.hits.save()
            layer.collection.close()
        except StorageError as error:
            log.exception("closing layer %d failed", layer.layer)
            return error
        return None

    if not layers:
        return []
    # Side by side: they wait for the disk, and some perhaps for an engine that does not answer.
    with ThreadPoolExecutor(min(len(layers), _CLOSED_TOGETHER), thread_name_prefix="close") as pool:
        return [error for error in pool.map(close, layers) if error is not None]
