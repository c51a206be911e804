"""The service's counters in the words of Prometheus. What they mean: docs/monitoring.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from router_service import __version__
from router_service.backends.base import CollectionInfo, Engines
from router_service.backends.disk import FreeSpace
from router_service.errors import RoutingServiceError
from router_service.memories.counters import (
    DURATION_BOUNDS,
    LAMBDA_RANGES,
    Abstain,
    Counts,
    Durations,
)
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory
from router_service.memories.store import MemoryStore
from router_service.operations import Operations, State
from router_service.telemetry.readiness import Readiness

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Of the bounds and ranges that are counted every other one is shown: a series each per memory and stage, or layer.
_EVERY = 2
_BOUNDS = [f"{bound:g}" for bound in DURATION_BOUNDS[::_EVERY]] + ["+Inf"]
_LAMBDAS = [f"{(n + _EVERY) / LAMBDA_RANGES:g}" for n in range(0, LAMBDA_RANGES, _EVERY)]
_REASONS = [reason.name.lower() for reason in list(Abstain)[1:]]
_LAYER = ["memory", "layer"]


M = TypeVar("M", bound=Metric)


class Copy(Protocol):
    """A replica that is kept in step."""

    @property
    def memory(self) -> RoutingMemory:
        """Whose copy it is."""
        ...

    @property
    def staleness_s(self) -> float:
        """What it has was the memory so many seconds ago."""
        ...


@dataclass(frozen=True)
class Service:
    """What is looked at."""

    store: MemoryStore
    operations: Operations
    free_space: FreeSpace | None  # None: nothing is kept on a disk
    readiness: Callable[[], Readiness]
    engines: Callable[[], Engines]
    copies: Callable[[], Sequence[Copy]]
    at_work: Callable[[], Mapping[str, int]]  # calls, by plane
    refused: Callable[[], Mapping[tuple[str, str], int]]  # calls, by method and reason
    failed_flushes: Callable[[], int]


class Metrics(Collector):
    """Reads the counters when it is asked, so that between two scrapes it costs nothing."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def text(self) -> bytes:
        """All of it, in the text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: names of others are not among them."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Of one scrape."""
        memories = self._service.store.memories()
        read = [(layer, name, layer.counters.read()) for name, layer in _layers(memories)]
        yield from self._of_the_service(memories)
        yield from self._of_calls()
        yield from _lookups([(name, layer.layer, counts) for layer, name, counts in read])
        yield from _stages([(name, counts) for _, name, counts in read])
        yield from self._holdings([(name, layer) for layer, name, _ in read])

    def _of_the_service(self, memories: Sequence[RoutingMemory]) -> Iterator[Metric]:
        service, engines = self._service, self._service.engines()
        build = GaugeMetricFamily("knnmoe_build_info", "The service's version", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        yield _gauge(
            "ready",
            "Whether lookups are answered, as /readyz",
            int(service.readiness() is Readiness.READY),
        )
        yield _gauge("memories", "Memories that are served", len(memories))
        aside = len(service.store.broken)
        yield _gauge("memories_set_aside", "Memories that cannot be read, see doctor", aside)
        yield _gauge("engine_processes", "Engine processes that run", engines.running)
        what = "Engine processes that died and were started again"
        yield _count("engine_restarts", what, engines.restarts)
        what = "Background flushes that failed; they are tried again"
        yield _count("flush_failures", what, service.failed_flushes())
        if service.free_space is not None:
            free, minimum = service.free_space.measured()
            yield _gauge("disk_free_bytes", "Free on the disk of --data", free)
            yield _gauge("disk_min_free_bytes", "Below which writes are refused", minimum)
        yield from self._replicas(memories)

    def _replicas(self, memories: Sequence[RoutingMemory]) -> Iterator[Metric]:
        number = _family(GaugeMetricFamily, "replicas", "Replicas that are kept in step", "memory")
        stale = _family(
            *(GaugeMetricFamily, "replica_staleness_seconds"),
            *("Since the replica that is furthest behind was last in step", "memory"),
        )
        copies = self._service.copies()
        for memory in memories:
            name = memory.record.name
            ages = [copy.staleness_s for copy in copies if copy.memory.record.name == name]
            number.add_metric([name], len(ages))
            stale.add_metric([name], max(ages, default=0))
        yield from (number, stale)

    def _of_calls(self) -> Iterator[Metric]:
        at_work = _family(GaugeMetricFamily, "calls_in_flight", "Calls at work", "plane")
        for plane, number in self._service.at_work().items():
            at_work.add_metric([plane], number)
        what = "Calls that ended in an error"
        refused = _family(CounterMetricFamily, "refused", what, "method", "reason")
        for (method, reason), number in sorted(self._service.refused().items()):
            refused.add_metric([method.rpartition("/")[2], reason], number)
        yield from (at_work, refused)
        operations = self._service.operations
        runs = Counter(each.kind for each in operations.list() if each.state is State.RUNNING)
        ended = operations.ended()
        what = "Operations that run"
        running = _family(GaugeMetricFamily, "operations_running", what, "kind")
        for kind in sorted({*runs, *(kind for kind, _ in ended)}):
            running.add_metric([kind], runs[kind])
        what = "Operations that have ended"
        operated = _family(CounterMetricFamily, "operations", what, "kind", "state")
        for (kind, state), number in sorted(ended.items()):
            operated.add_metric([kind, state], number)
        yield from (running, operated)

    def _holdings(self, layers: Sequence[tuple[str, LayerMemory]]) -> Iterator[Metric]:
        """A memory of which one layer cannot be read now is not asked for the others."""
        entries = _family(GaugeMetricFamily, "entries", "Entries", *_LAYER)
        size = _family(GaugeMetricFamily, "disk_bytes", "Bytes on the disk of --data", *_LAYER)
        unreadable = _family(
            *(GaugeMetricFamily, "unreadable", "Whether its entries cannot be counted now"),
            "memory",
        )
        away = self._service.readiness() is Readiness.BACKEND_AWAY
        failed = {name for name, _ in layers if away}
        for name, layer in layers:
            if name in failed or (info := _info(layer)) is None:
                failed.add(name)
                continue
            entries.add_metric([name, str(layer.layer)], info.entries)
            if info.disk_bytes is not None:
                size.add_metric([name, str(layer.layer)], info.disk_bytes)
        for name in dict.fromkeys(name for name, _ in layers):
            unreadable.add_metric([name], int(name in failed))
        yield from (entries, size, unreadable)


def _layers(memories: Sequence[RoutingMemory]) -> Iterator[tuple[str, LayerMemory]]:
    for memory in memories:
        for layer in memory.layers:
            yield memory.record.name, layer


def _info(layer: LayerMemory) -> CollectionInfo | None:
    try:
        return layer.info()
    except RoutingServiceError:  # shown as `unreadable`; whoever needs the layer is told why
        return None


def _lookups(read: Sequence[tuple[str, int, Counts]]) -> Iterator[Metric]:
    """By where they were answered: in the service, or in a replica beside a model, which reports later."""
    where = [*_LAYER, "where"]
    lookups = _family(CounterMetricFamily, "lookups", "Lookups", *where)
    tokens = _family(CounterMetricFamily, "lookup_tokens", "Tokens that were looked up", *where)
    abstained = _family(
        *(CounterMetricFamily, "abstained", "Tokens that kept the model's own routing"),
        *(*_LAYER, "reason"),
    )
    lambdas = _family(
        *(HistogramMetricFamily, "lambda", "Weight of the memory, of tokens that it answered"),
        *_LAYER,
    )
    for name, number, counts in read:
        layer = [name, str(number)]
        lookups.add_metric([*layer, "service"], counts.requests - counts.found_requests)
        lookups.add_metric([*layer, "replica"], counts.found_requests)
        tokens.add_metric([*layer, "service"], counts.tokens - counts.found_tokens)
        tokens.add_metric([*layer, "replica"], counts.found_tokens)
        for reason, abstentions in zip(_REASONS, counts.abstained, strict=True):
            abstained.add_metric([*layer, reason], abstentions)
        abstained.add_metric([*layer, "in_replica"], counts.found_abstained)
        sums = list(accumulate(counts.lambda_counts))[_EVERY - 1 :: _EVERY]
        buckets = [*zip(_LAMBDAS, map(float, sums), strict=True), ("+Inf", float(sums[-1]))]
        lambdas.add_metric(layer, buckets, counts.lambda_sum)
    yield from (lookups, tokens, abstained, lambdas)


def _stages(read: Sequence[tuple[str, Counts]]) -> Iterator[Metric]:
    sums: dict[tuple[str, str], Durations] = {}
    for name, counts in read:
        for stage, durations in counts.durations.items():
            sums.setdefault((name, stage), Durations()).add_all(durations)
    what = "How long lookups took in the service"
    seconds = _family(HistogramMetricFamily, "lookup_seconds", what, "memory", "stage")
    for (name, stage), durations in sums.items():
        below = list(accumulate(durations.counts))
        shown = map(float, [*below[:-1:_EVERY], below[-1]])
        seconds.add_metric([name, stage], list(zip(_BOUNDS, shown, strict=True)), durations.sum_s)
    yield seconds


def _family(kind: Callable[..., M], name: str, what: str, *labels: str) -> M:
    return kind(f"knnmoe_{name}", what, labels=labels)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"knnmoe_{name}", what, value=value)


def _count(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"knnmoe_{name}", what, value=value)
