"""What a token that learns may write: entries of its own sources, so many, and none that pushes further than it may."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from router_service import checks
from router_service.arrays import Entries
from router_service.backends.base import pages
from router_service.errors import PermissionDenied, shorten
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import Kind

_PAGE_ENTRIES = 1024


@dataclass(frozen=True, slots=True)
class WriteLimits:
    """Of one token.

    Attributes:
        token: its name.
        sources: those of the entries that it writes; of others it overwrites none. Empty: any.
        max_entries: of these sources in one layer, whoever wrote them.
        max_step: the longest logit delta (Euclidean, in the units of router logits).

    """

    token: str
    sources: frozenset[str] = frozenset()
    max_entries: int | None = None
    max_step: float | None = None


@dataclass(slots=True)
class _Held:
    """At most how many entries of a token's sources a layer holds."""

    memory: RoutingMemory | None = None
    entries: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class WriteGuard:
    """Holds writes to the limits of their tokens."""

    def __init__(self, limits_of: Callable[[Any], WriteLimits | None]) -> None:
        """`limits_of` a call's context: see Authority."""
        self._limits_of = limits_of
        self._held: defaultdict[tuple[str, str, int], _Held] = defaultdict(_Held)

    def require(self, context: Any, memory: RoutingMemory, layer: int, entries: Entries) -> None:
        """Before a call writes entries. Raises PermissionDenied, which names the token and the entry.

        Calls of one token at the same moment may together go beyond `max_entries` by what they are writing just then.
        """
        limits = self._limits_of(context)
        if limits is not None:
            checks.require_ids("entries.ids", entries.ids)
            self._require(limits, memory, memory.layer(layer), entries)

    def _require(
        self, limits: WriteLimits, memory: RoutingMemory, layer: LayerMemory, entries: Entries
    ) -> None:
        _require_step(limits, memory.record.settings.kind, entries)
        if limits.sources:
            new = _require_own(limits, layer, entries)
            self._require_room(limits, memory, layer, new)

    def _require_room(
        self, limits: WriteLimits, memory: RoutingMemory, layer: LayerMemory, new: int
    ) -> None:
        """Counts anew where the bound would be passed, since entries may have been deleted."""
        most = limits.max_entries
        if most is None:
            return
        held = self._held[limits.token, memory.record.name, layer.layer]
        with held.lock:
            if held.memory is not memory or held.entries + new > most:
                held.memory, held.entries = memory, _count(layer, limits.sources)
            if held.entries + new > most:
                raise PermissionDenied(
                    f"token {limits.token!r} may keep {most} entries in a layer; layer {layer.layer} of "
                    f"{memory.record.name!r} has {held.entries} of its sources, and this would add {new}: "
                    "delete some, or ask the operator for a larger max_entries"
                )
            held.entries += new


def _require_step(limits: WriteLimits, kind: Kind, entries: Entries) -> None:
    if limits.max_step is None:
        return
    if kind is not Kind.LOGIT_DELTA:
        raise PermissionDenied(
            f"token {limits.token!r} has a max_step, which bounds logit deltas; this memory holds {kind.plural}"
        )
    lengths = np.linalg.norm(np.atleast_2d(entries.values).astype(np.float64), axis=-1)
    if (too_long := np.flatnonzero(lengths > limits.max_step)).size:
        row = int(too_long[0])
        raise PermissionDenied(
            f"entries.logit_deltas[{row}]: length {lengths[row]:.4g}, and token {limits.token!r} may write "
            f"{limits.max_step:g} at most (max_step)"
        )


def _require_own(limits: WriteLimits, layer: LayerMemory, entries: Entries) -> int:
    """How many of the entries are new to the layer."""
    allowed = ", ".join(sorted(limits.sources))
    for row, origin in enumerate(entries.provenance):
        if origin.source not in limits.sources:
            raise PermissionDenied(
                f"entries.provenance[{row}].source: got {shorten(origin.source)}, and token {limits.token!r} "
                f"writes of {allowed}"
            )
    there = layer.provenance_of(entries.ids)
    for number, origin in there.items():
        if origin.source not in limits.sources:
            raise PermissionDenied(
                f"id {number} is an entry of {shorten(origin.source)}, and token {limits.token!r} overwrites "
                f"those of {allowed} alone"
            )
    return len(np.unique(entries.ids)) - len(there)


def _count(layer: LayerMemory, sources: frozenset[str]) -> int:
    return sum(
        origin.source in sources
        for page in pages(layer.collection, _PAGE_ENTRIES, with_keys=False)
        for origin in page.provenance
    )
