"""The process that optimizes a copy of a shard: the engine would freeze every thread of the service for seconds.

Run as `python -m router_service.backends.optimize_child DIRECTORY DIMENSION METRIC COMPRESSION SEGMENTS`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from router_service.backends.base import CollectionSpec, Compression, Metric
from router_service.backends.boundary import storage_call
from router_service.backends.child_process import die_with_parent_thread
from router_service.backends.disk import fsync_tree
from router_service.backends.edge_engine import EngineShard, forget_configuration
from router_service.backends.search_key_rebuild import rebuild_if_needed


def main(directory: str, dimension: str, metric: str, label: str, segments: str) -> None:
    """Indexes the shard in `directory`, which no other process has open, and makes the result durable."""
    die_with_parent_thread()  # a killed service must not leave a child that writes where its successor works
    if int(segments) > 1:  # nobody waits for what the service does on its own account
        _leave_half_of_the_cores()
    spec = CollectionSpec(int(dimension), Metric(metric), value_width=0)
    path, compression = Path(directory), Compression.parse(label)
    rebuild_if_needed(path, spec, compression)
    forget_configuration(path)
    shard = EngineShard.load(path, spec, compression, 1, int(segments))
    shard.optimize()
    shard.flush()
    shard.close()
    with storage_call(f"sync {path}"):
        fsync_tree(path)


def _leave_half_of_the_cores() -> None:
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[len(cores) // 2 :])


if __name__ == "__main__":
    main(*sys.argv[1:])
