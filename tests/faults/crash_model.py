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
    """Keys [n, d], uniform in [-1, 1), that follow from id and stamp, so that a mixed-up one shows."""
    seeds = np.array([i << 32 | s for i, s in zip(ids, stamps, strict=True)], np.uint64)
    mixed = seeds[:, None] * np.uint64(64) + np.arange(DIMENSION, dtype=np.uint64)
    for shift, factor in (
        (30, 0xBF58476D1CE4E5B9),
        (27, 0x94D049BB133111EB),
        (31, 1),
    ):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - 1).reshape(
        -1, DIMENSION
    )


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
