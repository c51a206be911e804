"""What a memory must hold after a crash: what was acknowledged; of work that was under way, the before or the after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

DIMENSION, EXPERTS = 32, 8


@dataclass(frozen=True)
class Fact:
    """One entry: what was last written under its id."""

    stamp: int
    source: str


Layer = dict[int, Fact]


def key_of(ids: Iterable[int], stamps: Iterable[int]) -> NDArray[np.float32]:
    """Keys [n, d] that follow from id and stamp, so that a mixed-up one shows; no two are close."""
    seeds = np.array(
        [(i * 2_654_435_761 + s * 40_503) % 2**31 for i, s in zip(ids, stamps, strict=True)]
    )
    columns = np.arange(1, DIMENSION + 1)
    return np.sin(seeds[:, None] * 0.001 * columns + columns).astype(np.float32)


def value_of(ids: Iterable[int], stamps: Iterable[int]) -> NDArray[np.float32]:
    """Value rows [n, N]: the stamp, and the id's low bits."""
    rows = [[s, i % 1009, *([1.0] * (EXPERTS - 2))] for i, s in zip(ids, stamps, strict=True)]
    return np.array(rows, np.float32).reshape(-1, EXPERTS)


@dataclass
class Expectation:
    """Acknowledged entries per layer, and what unacknowledged work may have changed."""

    layers: list[Layer]
    # (layer, id) -> what may be there instead of the acknowledged fact; None: nothing.
    open: dict[tuple[int, int], set[Fact | None]] = field(default_factory=dict)
    # A restore under way: all of this may be there instead, whole.
    instead: list[Layer] | None = None

    def begin(self, layer: int, changes: dict[int, Fact | None]) -> None:
        """Work was sent that will change these entries."""
        for number, fact in changes.items():
            self.open.setdefault((layer, number), set()).add(fact)

    def acknowledge(self, layer: int, changes: dict[int, Fact | None]) -> None:
        """The work was acknowledged; later work decides alone."""
        for number, fact in changes.items():
            self.open.pop((layer, number), None)
            if fact is None:
                self.layers[layer].pop(number, None)
            else:
                self.layers[layer][number] = fact

    def settle(self, found: list[dict[int, int]]) -> list[str]:
        """Takes what was found, id -> stamp per layer, as the truth; returns what must not be."""
        if self.instead is not None and found == [_stamps(layer) for layer in self.instead]:
            self.layers, self.open, self.instead = self.instead, {}, None
            return []
        problems = []
        for layer, facts in enumerate(self.layers):
            for number in facts.keys() | found[layer].keys():
                problems += self._settle_one(layer, number, found[layer].get(number))
        self.open, self.instead = {}, None
        return problems

    def _settle_one(self, layer: int, number: int, stamp: int | None) -> list[str]:
        acknowledged = self.layers[layer].get(number)
        allowed = {acknowledged} | self.open.get((layer, number), set())
        for fact in allowed:
            if (None if fact is None else fact.stamp) == stamp:
                if fact is None:
                    self.layers[layer].pop(number, None)
                else:
                    self.layers[layer][number] = fact
                return []
        return [f"layer {layer}, entry {number}: found {stamp}, expected one of {allowed}"]


def _stamps(layer: Layer) -> dict[int, int]:
    return {number: fact.stamp for number, fact in layer.items()}
