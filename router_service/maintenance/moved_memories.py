"""A memory on disk that takes the place of another: its layers move as they are, and carry a mark until they arrived.

    DATA/memories/NAME/restored-MS/CAME-FROM   `OTHER`, or `OTHER/restored-MS` of one that was restored itself

Until NAME's manifest leads to them a start brings them back; from then on it removes what is left of the other memory.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from router_service.backends.boundary import storage_call
from router_service.backends.disk import (
    fsync_directory,
    remove_durably,
    remove_tree,
    write_atomically,
)
from router_service.catalogue import DOOMED
from router_service.errors import CorruptMemory
from router_service.maintenance.restored_files import CAME_FROM, restored_directory
from router_service.manifest import FILE_NAME, read_manifest
from router_service.routing_memory import MemoryRecord

log = logging.getLogger(__name__)

_ORIGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/restored-\d{1,20})?")


@dataclass(frozen=True, slots=True)
class Move:
    """Layers at `home` that came from `origin`, or have not left it yet."""

    home: Path
    origin: Path
    arrived: bool  # the manifest of the memory whose place they take leads to them


def mark(memories: Path, home: Path) -> None:
    """Lets the layers at `home` say where they lie, before they are moved. Raises StorageError."""
    text = home.relative_to(memories).as_posix().encode()
    write_atomically(home / CAME_FROM, lambda file: file.write(text))


def unmark(home: Path) -> None:
    """Undoes mark(), when the layers are where they were. Raises StorageError."""
    if home.is_dir():
        remove_durably(home / CAME_FROM)


def moves(memories: Path) -> Iterator[Move]:
    """Those that have not ended. Raises StorageError."""
    with storage_call(f"list {memories}"):
        marks = [
            path
            for pattern in (f"*/{CAME_FROM}", f"*/restored-*/{CAME_FROM}")
            for path in sorted(memories.glob(pattern))
            if not path.relative_to(memories).parts[0].endswith(DOOMED)
        ]
        for path in marks:
            origin = path.read_text(errors="replace")
            if _ORIGIN.fullmatch(origin):
                yield _move(path.parent, memories / origin)
            else:
                log.error("%s does not say where its layers came from; left as it is", path)


def settle(memories: Path) -> None:
    """Ends every move that a crash cut short; none of the layers may be open. Raises StorageError."""
    for move in moves(memories):
        if move.arrived:
            arrive(move)
        elif move.home == move.origin:
            unmark(move.home)
        elif move.origin.exists():
            log.error("%s came from %s, which is there again; both are kept", *_names(move))
        else:
            _bring_back(move)


def arrive(move: Move) -> None:
    """Removes what is left of the memory that moved, at last the mark. Raises StorageError."""
    rest = move.origin.parent
    if move.origin.name.startswith("restored-") and _record_of(rest, move.origin) is not None:
        doomed = rest.with_name(f"{rest.name}{DOOMED}")
        with storage_call(f"delete {rest}"):
            rest.rename(doomed)
            fsync_directory(doomed.parent)
        remove_tree(doomed)
    remove_durably(move.home / FILE_NAME)
    remove_durably(move.home / CAME_FROM)


def _bring_back(move: Move) -> None:
    log.warning("bringing %s back to %s: a replacement never ended", *_names(move))
    with storage_call(f"move {move.home} back"):
        move.home.rename(move.origin)
        fsync_directory(move.origin.parent)
        fsync_directory(move.home.parent)
    unmark(move.origin)


def _move(home: Path, origin: Path) -> Move:
    led_to = home.name.startswith("restored-") and _record_of(home.parent, home) is not None
    return Move(home, origin, led_to and home != origin)


def _record_of(directory: Path, restored: Path) -> MemoryRecord | None:
    """The record in a memory's directory, if it is that of the layers at `restored`."""
    try:
        record = read_manifest(directory)
    except CorruptMemory:
        return None
    return record if restored_directory(directory.parent, record) == restored else None


def _names(move: Move) -> tuple[Path, Path]:
    return move.home, move.origin
