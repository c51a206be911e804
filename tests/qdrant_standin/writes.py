"""A write as it can be cut: all of it for one shard, or a part for each of several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Write:
    """`make` turns some of the items into an operation of the engine; `ids[n]` is the point that items[n] is for.

    Without ids it is for every shard as it is, such as a deletion by a filter.
    """

    make: Callable[[Sequence[Any]], Any]
    items: Sequence[Any]
    ids: Sequence[Any] | None

    def whole(self) -> Any:
        """The operation for a shard that has all points."""
        return self.make(self.items)

    def by_shard(self, shard_of: Callable[[Any], int], shards: int) -> dict[int, Any]:
        """The operations of the shards that it touches."""
        if self.ids is None:
            return dict.fromkeys(range(shards), self.whole())
        parts: dict[int, list[Any]] = defaultdict(list)
        for point, item in zip(self.ids, self.items, strict=True):
            parts[shard_of(point)].append(item)
        return {shard: self.make(items) for shard, items in sorted(parts.items())}


def for_all(operation: Any) -> Write:
    """A write that every shard applies as it is."""
    return Write(lambda _: operation, (), None)
