"""Which versions are at work, and which formats of files they read."""

from __future__ import annotations

from importlib import metadata

from router_service import __version__, manifest
from router_service.doctor.findings import Finding, Findings, error, fine
from router_service.maintenance import snapshot_manifest

_ENGINE = "qdrant-edge-py"


def check_versions() -> Findings:
    """Of this program, of its engine, and the formats that it reads."""
    yield fine("versions", f"knn-moe {__version__}")
    yield _engine()
    formats = f"memory.json {manifest.FORMAT}, snapshots {snapshot_manifest.FORMAT}"
    yield fine("versions", f"reads and writes the formats: {formats}")


def _engine() -> Finding:
    try:
        return fine("versions", f"{_ENGINE} {metadata.version(_ENGINE)}")
    except metadata.PackageNotFoundError:
        return error("versions", f"{_ENGINE} is not installed", "pip install --upgrade knn-moe")
