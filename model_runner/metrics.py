"""What RoutingMemory counts, for programs that show it to Prometheus. Names: docs/monitoring.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from model_runner.memory import RoutingMemory


class MemoryMetrics(Collector):
    """A collector of prometheus_client: `REGISTRY.register(MemoryMetrics(memory))`.

    Reads the reports when it is asked. Each memory once: those of one name would be the same series.
    """

    def __init__(self, *memories: RoutingMemory) -> None:
        self._memories = memories

    def describe(self) -> list[Metric]:
        """Nothing: names of others are not among them."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Of one scrape."""
        lookups = CounterMetricFamily(
            "knnmoe_model_lookups", "Lookups that the model made", labels=["memory"]
        )
        fallbacks = CounterMetricFamily(
            "knnmoe_fallback",
            "Lookups after which the model's own router stood",
            labels=["memory", "reason"],
        )
        for memory in self._memories:
            report = memory.report
            lookups.add_metric([memory.memory], report.lookups)
            for reason, number in sorted(report.fallbacks.items()):
                fallbacks.add_metric([memory.memory, reason], number)
        yield from (lookups, fallbacks)
