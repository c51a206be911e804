"""A target that is only looked at: what a dry run writes to."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator

from router_service.arrays import U64, Entries
from router_service.backends.base import Compression, Report
from router_service.migration.sides import LayerState, Side


class Untouched:
    """A Side that lets nothing through to the one behind it; None: a memory that is not there yet."""

    def __init__(self, behind: Side | None) -> None:
        self._behind = behind

    def pages(self, layer: int) -> Generator[Entries, None, None]:
        """See Side.pages."""
        if self._behind is not None:
            yield from self._behind.pages(layer)

    def write(self, layer: int, batches: Iterable[Entries]) -> Iterator[int]:
        """Only counts."""
        return map(len, batches)

    def delete(self, layer: int, ids: U64) -> int:
        """Only counts."""
        return len(ids)

    def state(self, layer: int) -> LayerState:
        """See Side.state."""
        if self._behind is None:
            return LayerState(0, 0, Compression())
        return self._behind.state(layer)

    def optimize(self, layer: int, compression: Compression, report: Report) -> str:
        """Does nothing."""
        return ""
