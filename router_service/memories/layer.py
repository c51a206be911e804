"""The memory of one MoE layer: looks up, blends or abstains, counts. Knows nothing of the wire or of other layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from router_service import blending, kernels
from router_service.arrays import (
    F32,
    NO_ID,
    U8,
    U64,
    Assignment,
    Entries,
    ExampleRef,
    Neighbours,
    Provenance,
)
from router_service.backends.base import (
    Collection,
    CollectionInfo,
    Compression,
    Report,
    Versions,
    say_nothing,
    stays,
)
from router_service.errors import DeadlineTooShort
from router_service.memories.changes import ChangeLog
from router_service.memories.counters import Abstain, LayerCounters, LookedUp, RecentTokens
from router_service.memories.hit_counts import HitCounter
from router_service.memories.settings import Kind, MemorySettings, Similarity
from router_service.memories.write_gate import WriteGate


@dataclass(frozen=True, slots=True)
class RouteQuery:
    """One layer's tokens and the model's own routing of them."""

    router_inputs: F32  # [T, d]
    own: Assignment | F32  # [T, k] or logits [T, N]
    neighbours: int | None = None  # overrides K
    exclude: Sequence[ExampleRef] = ()
    deadline: float | None = None  # of time.monotonic()
    left: Callable[[], bool] = stays  # see SearchOptions


@dataclass(frozen=True, slots=True)
class RouteAnswer:
    """The blended routing; `blended` is None when every token abstained."""

    blended: Assignment | F32 | None
    lambdas: F32  # [T]
    abstained: U8  # [T], Abstain
    neighbours: Neighbours
    similarities: F32  # [T, K]
    search_ns: int
    blend_ns: int
    version: int = 0  # of the memory, whose entries and settings made it


class LayerMemory:
    """Entries of one MoE layer and how they are read."""

    def __init__(
        self,
        layer: int,
        collection: Collection,
        num_experts: int,
        top_k: int,
        hits: HitCounter | None = None,
    ) -> None:
        self.layer = layer
        self.collection = collection
        self.counters, self.recent = LayerCounters(), RecentTokens()
        self.hits = hits or HitCounter()
        self.gate = WriteGate()
        self.changes = ChangeLog(collection.versions)  # the memory's, see RoutingMemory
        self._num_experts, self._top_k = num_experts, top_k

    def route(self, query: RouteQuery, settings: MemorySettings) -> RouteAnswer:
        """Looks the tokens up and blends. Raises StorageError when the engine fails."""
        started = time.perf_counter_ns()
        k = query.neighbours or settings.neighbours
        if settings.speaks_for(self.layer):
            found = self._search(query, k, settings)
        else:
            nothing, version = Neighbours.empty(len(query.router_inputs), k), self.versions.now
            found = replace(nothing, version=version)
        answer = self._blend(query.own, found, settings, started)
        self.counters.add(answer.lambdas, answer.abstained, answer.search_ns)
        self.hits.note(found.ids, answer.similarities, answer.abstained == Abstain.NO)
        if self.recent.wanted and len(answer.lambdas):
            self.recent.note(_last_token(answer))
        return answer

    def explained(self, number: int, shown: int, settings: MemorySettings) -> LookedUp | None:
        """An entry looked up by its own key among those of other examples, counted nowhere; None: it is not there.

        `shown`: nearest entries in the answer, of which the first K of the settings make its lambda.
        """
        entries = self.collection.scroll(number - 1 if number else None, 1)
        if not len(entries) or int(entries.ids[0]) != number:
            return None
        own = [ExampleRef(p.source, p.example) for p in entries.provenance if p.source or p.example]
        options, k = settings.search(shown, self.layer), settings.neighbours
        found = self.collection.search(entries.keys, shown, options, own)
        similarities = self._similarities(found.distances, settings)
        lambdas = settings.lambdas(similarities[:, :k])
        abstained = self._abstentions(found, lambdas, settings)
        lambdas = np.where(abstained == Abstain.NO, lambdas, np.float32(0))
        return _last_token(RouteAnswer(None, lambdas, abstained, found, similarities, 0, 0))

    @property
    def versions(self) -> Versions:
        """What the layers of a memory share."""
        return self.collection.versions

    @versions.setter
    def versions(self, of_memory: Versions) -> None:
        self.collection.versions = of_memory

    def upsert(self, entries: Entries, *, fsync: bool = False) -> None:
        """Writes validated entries; see Collection.upsert."""
        with self.gate.writing(entries.ids), self.changes.changing(self.layer, entries.ids):
            self.collection.upsert(entries, fsync=fsync)

    def info(self) -> CollectionInfo:
        """Exact state of the collection."""
        return self.collection.info()

    def delete(self, ids: U64, *, fsync: bool = False) -> int:
        """Removes entries; see Collection.delete."""
        with self.changes.changing(self.layer, ids):
            deleted = self.collection.delete(ids, fsync=fsync)
        self.hits.forget(ids)
        return deleted

    def optimize(
        self, compression: Compression | None = None, report: Report = say_nothing
    ) -> CollectionInfo:
        """Builds index and search keys, with the present compression for None; returns the state afterwards."""
        self.collection.optimize(compression, report)
        return self.collection.info()

    def provenance_of(self, ids: U64) -> dict[int, Provenance]:
        """Where entries came from, by id; ids that are gone (or NO_ID) are left out."""
        wanted = np.unique(ids)
        return self.collection.provenance(wanted[wanted != NO_ID])

    def count_of(self, ids: U64) -> int:
        """How many of these ids the layer holds."""
        return len(self.collection.provenance(ids))

    def _search(self, query: RouteQuery, k: int, settings: MemorySettings) -> Neighbours:
        """All tokens in one call: how many an engine gets at a time is the backend's to say."""
        if query.deadline is not None and time.monotonic() >= query.deadline:
            raise DeadlineTooShort("the deadline passed before the lookup began")
        options = replace(settings.search(k, self.layer), deadline=query.deadline, left=query.left)
        return self.collection.search(query.router_inputs, k, options, query.exclude)

    def _blend(
        self, own: Assignment | F32, found: Neighbours, settings: MemorySettings, started: int
    ) -> RouteAnswer:
        """`started`: the search, in time.perf_counter_ns()."""
        searched = time.perf_counter_ns()
        similarities = self._similarities(found.distances, settings)
        lambdas = settings.lambdas(similarities)
        abstained = self._abstentions(found, lambdas, settings)
        answered = abstained == Abstain.NO
        if not answered.all():
            lambdas = np.where(answered, lambdas, np.float32(0))
        blended = None
        if answered.any():
            blended = self._blended(own, found, similarities, lambdas, settings)
        return RouteAnswer(
            blended,
            lambdas,
            abstained,
            found,
            similarities,
            searched - started,
            time.perf_counter_ns() - searched,
            found.version,
        )

    def _similarities(self, distances: F32, settings: MemorySettings) -> F32:
        if settings.similarity is Similarity.RBF:
            return kernels.rbf_similarity(distances, settings.gamma_of(self.layer))
        return kernels.cosine_similarity(distances)

    def _abstentions(self, found: Neighbours, lambdas: F32, settings: MemorySettings) -> U8:
        if not settings.speaks_for(self.layer):
            return np.full(len(lambdas), Abstain.LAYER_OFF, dtype=np.uint8)
        too_far = lambdas <= settings.min_lambda
        if not too_far.any():  # a token without a neighbour has lambda 0
            return np.full(len(lambdas), Abstain.NO, dtype=np.uint8)
        empty = np.isinf(found.distances).all(axis=1)
        far_or_not = np.where(too_far, np.uint8(Abstain.TOO_FAR), np.uint8(Abstain.NO))
        return np.where(empty, np.uint8(Abstain.EMPTY), far_or_not)

    def _blended(
        self,
        own: Assignment | F32,
        found: Neighbours,
        similarities: F32,
        lambdas: F32,
        settings: MemorySettings,
    ) -> Assignment | F32:
        if isinstance(own, Assignment):
            neighbours = Assignment(
                found.values[..., : self._top_k].astype(np.int32), found.values[..., self._top_k :]
            )
            return blending.blend_assignments(
                own, neighbours, similarities, lambdas, self._num_experts, settings.support
            )
        if settings.kind is Kind.LOGITS:
            return blending.blend_stored_logits(own, found.values, similarities, lambdas)
        return blending.blend_logits(
            own,
            found.values,
            similarities,
            settings.null_weight,
            settings.step_size_of(self.layer),
            lambdas > 0,
        )


def _last_token(answer: RouteAnswer) -> LookedUp:
    found = answer.neighbours
    of_last = (found.ids, found.distances, answer.similarities, found.values)
    return LookedUp(
        time.time_ns() // 1_000_000,
        len(answer.lambdas),
        float(answer.lambdas[-1]),
        int(answer.abstained[-1]),
        *(each[-1].copy() for each in of_last),
    )
