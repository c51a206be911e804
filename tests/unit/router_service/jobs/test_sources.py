"""Sources are counted exactly, page by page; those beyond the most are counted together."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from router_service.arrays import Entries, HitCounts, Provenance
from router_service.backends.exact import ExactBackend
from router_service.errors import Cancelled
from router_service.fingerprint import ModelFingerprint
from router_service.jobs import sources
from router_service.jobs.sources import Source, sources_of
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore

MODEL = ModelFingerprint("tiny", 2, 4, 5, 2, "ab")


def _memory(origins: list[list[Provenance]]) -> RoutingMemory:
    memory = MemoryStore(ExactBackend(), None).create("m", MODEL, MemorySettings())
    for layer, provenance in enumerate(origins):
        ids = np.arange(len(provenance), dtype=np.uint64)
        keys, values = (np.ones((len(ids), width), np.float32) for width in (4, 5))
        memory.upsert(layer, MODEL.digest(), Entries(ids, keys, values, provenance))
    return memory


def test_against_a_plain_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PENDING", 10)  # examples come again after they were counted
    rng = np.random.default_rng(0)
    origins = [
        [
            Provenance(f"s{rng.integers(7)}", f"e{rng.integers(40)}", n, -1, 0.0, 1 + int(time))
            for n, time in enumerate(rng.integers(10_000, size=rows))
        ]
        for rows in (1000, 300)
    ]
    memory = _memory(origins)
    hits = [{n: int(rng.integers(5)) for n in range(0, len(layer), 3)} for layer in origins]
    for layer, counts in zip(memory.layers, hits, strict=True):
        layer.hits.add_report("c", 1, HitCounts.of(counts))
    expected: dict[str, Source] = {}
    examples = defaultdict(set)
    for layer, counts in zip(origins, hits, strict=True):
        for n, origin in enumerate(layer):
            row = expected.setdefault(origin.source, Source(origin.source))
            row.entries, row.hits = row.entries + 1, row.hits + counts.get(n, 0)
            row.first_unix_ms = min(row.first_unix_ms, origin.created_unix_ms)
            row.last_unix_ms = max(row.last_unix_ms, origin.created_unix_ms)
            examples[origin.source].add(origin.example)
            row.examples = len(examples[origin.source])
    reports: list[tuple[str, int, int]] = []
    found = sources_of(memory.layers, lambda *now: reports.append(now))
    assert found.sources == [expected[name] for name in sorted(expected)]
    assert found.unlisted_entries == 0
    assert reports[0] == ("layer 0: read", 1000, 1300)
    assert reports[-1] == ("layer 1: read", 1300, 1300)


def test_sources_beyond_the_most_are_counted_together() -> None:
    memory = _memory([[Provenance(f"s{n % 5}", "e", n) for n in range(100)]])
    found = sources_of(memory.layers, lambda *_: None, most=3)
    assert [(one.source, one.entries) for one in found.sources] == [
        ("s0", 20),
        ("s1", 20),
        ("s2", 20),
    ]
    assert found.unlisted_entries == 40


def test_it_ends_when_it_is_cancelled() -> None:
    memory, pages = _memory([[Provenance("s", "e", n) for n in range(3000)]]), []

    def report(stage: str, done: int, total: int) -> None:
        pages.append(done)
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        sources_of(memory.layers, report)
    assert pages == [1024]


def test_an_empty_memory_has_none() -> None:
    assert sources_of(_memory([]).layers, lambda *_: None).sources == []
