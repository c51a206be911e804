"""The snapshots of a data directory: manifests and listings, and with `deep` every byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from router_service.backends.boundary import storage_call
from router_service.doctor.findings import Finding, Findings, error, fine, warning
from router_service.errors import SnapshotInvalid
from router_service.maintenance import snapshots
from router_service.maintenance.snapshot_files import check_listing
from router_service.maintenance.snapshot_manifest import NAME, read_manifest


def check_snapshots(directory: Path, *, deep: bool, in_use: bool) -> Findings:
    """Every snapshot; ones that were never finished are not looked for `in_use`, when one may be under way.

    Raises StorageError.
    """
    with storage_call(f"read {directory}"):
        yield from _check_all(directory, deep, in_use)


def _check_all(directory: Path, deep: bool, in_use: bool) -> Findings:
    homes = sorted(path for path in directory.glob("*") if path.is_dir())
    for home in homes:
        found = sorted(path for path in home.iterdir() if path.is_dir())
        yield from (_check(path, deep) for path in found if NAME.fullmatch(path.name))
        if not in_use:
            yield from _unfinished(home)


def _check(path: Path, deep: bool) -> Finding:
    topic = f"snapshot {path.parent.name}/{path.name}"
    try:
        if deep:
            entries = snapshots.verify(path).entries
        else:
            manifest = read_manifest(path)
            check_listing(path, manifest)
            entries = sum(manifest.entries)
    except SnapshotInvalid as invalid:
        return error(topic, str(invalid), f"rm -r {quote(str(path))}")
    return fine(
        topic, f"{entries} entries; " + ("every sum is right" if deep else "all files there")
    )


def _unfinished(home: Path) -> Iterator[Finding]:
    for path in home.glob(".partial-*"):
        yield warning(
            f"snapshot {home.name}",
            f"{path} was never finished; the next snapshot or list removes it",
            f"router-admin snapshot list {quote(home.name)}",
        )
