"""The policies once more, one pair of entries at a time and everything in RAM: what the streamed ones must equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from router_service.arrays import Entries
from router_service.memories.settings import Kind
from router_service.retention.plan import Agreement, NearDuplicates
from router_service.retention.scores import LayerReading


def dense(row: np.ndarray, reading: LayerReading) -> list[float]:
    if reading.settings.kind is Kind.LOGIT_DELTA:
        return [float(v) for v in row]
    if reading.settings.kind is Kind.LOGITS:
        return [float(v) - float(sum(row)) / len(row) for v in row]
    half = len(row) // 2
    weights = [0.0] * reading.num_experts
    for expert, weight in zip(row[:half], row[half:], strict=True):
        weights[int(expert)] += float(weight)
    return weights


def agreement(one: Sequence[float], other: Sequence[float], reading: LayerReading) -> float:
    if reading.settings.kind is Kind.ASSIGNMENT:
        pairs = zip(one, other, strict=True)
        return sum(min(a / (sum(one) or 1), b / (sum(other) or 1)) for a, b in pairs)
    if list(one) == list(other):
        return 1.0
    norms = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / norms if norms else 0.0


def similarity(entries: Entries, a: int, b: int, reading: LayerReading) -> float:
    difference = entries.keys[a].astype(float) - entries.keys[b].astype(float)
    return math.exp(-reading.settings.gamma_of(reading.layer) * float(difference @ difference))


def duplicates_of(
    entries: Entries, kept: list[int], reading: LayerReading, policy: NearDuplicates
) -> set[int]:
    """Rows that go: from the highest gain down, whoever is linked to one that stays."""
    values = [dense(row, reading) for row in entries.values]
    staying: list[int] = []
    for row in sorted(kept, key=lambda r: (-entries.provenance[r].gain, r)):
        if not any(
            similarity(entries, row, other, reading) >= policy.similarity
            and agreement(values[row], values[other], reading) >= policy.agreement
            for other in staying
        ):
            staying.append(row)
    return set(kept) - set(staying)


def leave_one_out(
    entries: Entries, kept: list[int], reading: LayerReading, policy: Agreement
) -> dict[int, float]:
    """Agreement of each kept row with the kernel average of its neighbours; inf: not judged."""
    values = [dense(row, reading) for row in entries.values]
    found = {}
    for row in kept:
        near = _others(entries, row, kept, reading)[: policy.neighbours]
        weights = [similarity(entries, row, other, reading) for other in near]
        if not near or weights[0] < policy.min_similarity:
            found[row] = math.inf
            continue
        average = np.average([values[other] for other in near], axis=0, weights=weights)
        found[row] = agreement(values[row], average.tolist(), reading)
    return found


def _others(entries: Entries, row: int, kept: list[int], reading: LayerReading) -> list[int]:
    """Kept rows of other examples, nearest first, equals by row."""
    own = entries.provenance[row]
    others = [
        other
        for other in kept
        if (entries.provenance[other].source, entries.provenance[other].example)
        != (own.source, own.example)
    ]
    return sorted(others, key=lambda other: (-similarity(entries, row, other, reading), other))


def lowest(scores: Callable[[int], float], kept: list[int], size: int) -> set[int]:
    """Rows that go when `size` stay: the lowest, of equals the one with the larger id."""
    worst_first = sorted(kept, key=lambda row: (scores(row), -row))
    return set(worst_first[: max(0, len(kept) - size)])
