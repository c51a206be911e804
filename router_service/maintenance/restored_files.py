"""Where the layers of a memory lie on disk.

    DATA/memories/NAME/memory.json            the manifest; replacing it is the moment of a change
    DATA/memories/NAME/layer-LLL              the layers of a memory that was created here
    DATA/memories/NAME/restored-MS/layer-LLL  those of one that was restored; MS is its created_unix_ms in memory.json
    DATA/memories/NAME/restored-MS/CAME-FROM  while they take the place of others: see moved_memories
    .../hits-LLL.npz                          beside a layer: how often its entries were retrieved

What the manifest does not lead to is what a crash left behind, or what was replaced.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from router_service.backends.disk import remove_durably, remove_tree
from router_service.routing_memory import MemoryRecord

# In layers that are moved into the place of others, until they have arrived: where they came from.
CAME_FROM = "CAME-FROM"


def restored_directory(memories: Path, record: MemoryRecord) -> Path:
    """Where the layers of a memory lie if it was restored."""
    return memories / record.name / f"restored-{record.created_unix_ms}"


def home_of(memories: Path | None, record: MemoryRecord) -> str:
    """What the names of a memory's collections begin with."""
    if memories is None or not (restored := restored_directory(memories, record)).is_dir():
        return record.name
    return f"{record.name}/{restored.name}"


def hits_file(layer: int) -> str:
    """Name of the file of a layer's hit counts, which lies beside its directory."""
    return f"hits-{layer:03d}.npz"


def stamped(memories: Path, record: MemoryRecord, present: MemoryRecord | None) -> MemoryRecord:
    """The record with a creation time of its own: now, and none that leads to layers that are there."""
    created = time.time_ns() // 1_000_000
    if present is not None:
        created = max(created, present.created_unix_ms + 1)
    record = replace(record, created_unix_ms=created)
    while restored_directory(memories, record).exists():
        record = replace(record, created_unix_ms=record.created_unix_ms + 1)
    return record


def is_stray(path: Path, restored: Path) -> bool:
    """Whether layers at `path` are nobody's: neither those in force nor on their way, see moved_memories."""
    return path != restored and not (path / CAME_FROM).exists()


def remove_strays(memories: Path, record: MemoryRecord) -> None:
    """Removes every layer of a memory that its manifest does not lead to; none of them may be open."""
    restored = restored_directory(memories, record)
    strays = [path for path in restored.parent.glob("restored-*") if is_stray(path, restored)]
    if restored.is_dir():
        strays += restored.parent.glob("layer-*")
        for path in restored.parent.glob("hits-*.npz"):
            remove_durably(path)
    for path in strays:
        remove_tree(path)
