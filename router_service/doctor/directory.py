"""The data directory itself: there, readable and writable, room on its disk, held by one service."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from shlex import quote

from router_service.backends.boundary import storage_call
from router_service.backends.disk import FreeSpace
from router_service.doctor.findings import Finding, Findings, error, fine, warning
from router_service.errors import DiskFull

_MOST_NAMED = 3


def lock_holder(memories: Path) -> str | None:
    """The process that serves the directory; None when there is none. Raises StorageError."""
    path = memories / "LOCK"
    if not path.exists():
        return None
    with storage_call(f"read {path}"), path.open() as file:
        try:
            # Shared and let go at once: nothing is written, and two doctors do not mind each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(20).strip() or "unknown"
    return None


def check_lock(data: Path, holder: str | None) -> Finding:
    """Whether a service runs on the directory."""
    if holder is None:
        return fine("lock", f"{data} is served by no process")
    return warning(
        "lock",
        f"{data} is served by process {holder}: what it is working on is not checked, nor what it holds in RAM",
        "router-admin doctor",
    )


def check_space(directory: Path, min_free_bytes: int | None) -> Finding:
    """Free disk against the minimum below which writes are refused."""
    free = f"{shutil.disk_usage(directory).free / 2**30:.1f} GiB free"
    try:
        FreeSpace(directory, min_free_bytes).require()
    except DiskFull as full:
        return error("disk", f"writes are refused: {full}", f"df -h {quote(str(directory))}")
    return fine("disk", f"{directory}: {free}")


def check_access(data: Path) -> Findings:
    """Whether this user can read every file and write to every directory."""
    remedy = f"chown -R $(id -un) {quote(str(data))}"
    directories, files = [data], list[Path]()
    for parent, below, names in os.walk(data):
        directories += [Path(parent, name) for name in below]
        files += [Path(parent, name) for name in names]
    closed = [path for path in directories if _denied(path, os.R_OK | os.X_OK)]
    closed += [path for path in files if _denied(path, os.R_OK)]
    fixed = [path for path in (*directories, *files) if _denied(path, os.W_OK)]
    if closed:
        yield error("access", f"cannot be read: {_named(closed)}", remedy)
    if fixed:
        yield error("access", f"cannot be written to: {_named(fixed)}", remedy)
    if not closed and not fixed:
        yield fine("access", f"{len(files)} files can be read and written")


def _denied(path: Path, mode: int) -> bool:
    """Files come and go while a service runs: one that is gone is not denied."""
    return not os.access(path, mode) and os.path.lexists(path)


def _named(paths: Iterable[Path]) -> str:
    names = [str(path) for path in paths]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
