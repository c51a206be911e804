"""Makes a shard anew when its search keys have to change: the engine cannot add a vector to a shard that has entries.

Runs in the process that optimizes a copy, which nobody else reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from router_service.arrays import F32
from router_service.backends.base import CollectionSpec, Compression, Metric
from router_service.backends.disk import fsync_tree, remove_tree, storage_call
from router_service.backends.edge.engine import EngineShard, forget_configuration
from router_service.backends.edge.ledger import Sums
from router_service.backends.edge.search_keys import FILE, SAMPLE, SearchKeys, fitted
from router_service.children import die_with_parent_thread

_FLOATS_PER_PAGE = 1 << 20


def rebuild_if_needed(directory: Path, spec: CollectionSpec, compression: Compression) -> None:
    """Leaves in `directory` a shard of the same entries whose search keys are those of `compression`."""
    present = SearchKeys.load(directory) if (directory / FILE).exists() else None
    if present is None and not compression.apart:
        return
    shard = EngineShard.load_as_it_is(directory, spec)
    entries = shard.counts(0).entries
    shard.close()
    if present is not None and compression.apart and present.serves(compression, entries):
        return
    _rebuild(directory, spec, compression, entries)


def _rebuild(directory: Path, spec: CollectionSpec, compression: Compression, entries: int) -> None:
    set_aside = directory.with_name(f"{directory.name}.before")
    directory.rename(set_aside)
    old = EngineShard.load_as_it_is(set_aside, spec)
    search_keys = None
    if compression.apart:
        search_keys = fitted(_sample(old, spec, entries), compression, entries)
    new = EngineShard.create(directory, spec, search_keys)
    for records in old.pages(_page(spec), payloads=True):
        new.put(records)
    new.flush()
    new.close()
    old.close()
    remove_tree(set_aside)


def _sample(shard: EngineShard, spec: CollectionSpec, entries: int) -> F32:
    """Up to SAMPLE keys, evenly spread over the ids."""
    step, seen, rows = max(1, -(-entries // SAMPLE)), 0, []
    for page in shard.pages(_page(spec), payloads=False):
        rows += [record.key for number, record in enumerate(page, seen) if number % step == 0]
        seen += len(page)
    return np.array(rows, np.float32).reshape(len(rows), spec.dimension)


def _page(spec: CollectionSpec) -> int:
    return max(16, min(2048, _FLOATS_PER_PAGE // spec.dimension))


def main(directory: str, dimension: str, metric: str, label: str, segments: str) -> None:
    """Indexes the shard in `directory`, which no other process has open, and makes the result durable."""
    die_with_parent_thread()  # a killed service must not leave a child that writes where its successor works
    spec = CollectionSpec(int(dimension), Metric(metric), value_width=0)
    path, compression = Path(directory), Compression.parse(label)
    rebuild_if_needed(path, spec, compression)
    forget_configuration(path)
    shard = EngineShard.load(path, spec, compression, int(segments))
    shard.optimize()
    shard.flush()
    shard.close()
    with storage_call(f"sync {path}"):
        fsync_tree(path)
    sums = path.with_name("sums.json")  # see ledger
    Sums.of(path, Sums.load(sums)).save(sums)


if __name__ == "__main__":
    main(*sys.argv[1:])
