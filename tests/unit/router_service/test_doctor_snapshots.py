"""The doctor of real snapshots: a changed byte is found with `deep`, a missing file without."""

from __future__ import annotations

from pathlib import Path

import pytest

from router_service.doctor import Severity, check_snapshots, diagnose_directory
from router_service.snapshots import files, local
from tests.unit.router_service.numbered_memory import MODEL, SETTINGS, fill, open_store


def _errors(data: Path, *, deep: bool) -> list[str]:
    found = diagnose_directory(data, 0, deep=deep)
    return [finding.what for finding in found if finding.severity is Severity.ERROR]


def test_a_snapshot_that_was_changed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with open_store(data / "memories") as store:
        fill(store.create("bible", MODEL, SETTINGS), 0, 20)
        snapshot_store = data / "snapshots"
        path = local.create(store, "bible", snapshot_store, "monday", min_free_bytes=0).path
    assert _errors(data, deep=True) == []

    file = path / "layer-000" / "CURRENT"
    text = file.read_bytes()
    file.write_bytes(text[:-1] + b"]")
    assert _errors(data, deep=False) == []
    assert "layer-000/CURRENT has other content" in _errors(data, deep=True)[0]

    file.unlink()
    assert "layer-000/CURRENT is missing" in _errors(data, deep=False)[0]


@pytest.mark.parametrize("deep", [False, True])
def test_a_snapshot_that_is_deleted_meanwhile(tmp_path: Path, deep: bool) -> None:
    data, snapshots = tmp_path / "data", tmp_path / "data" / "snapshots"
    with open_store(data / "memories") as store:
        fill(store.create("bible", MODEL, SETTINGS), 0, 20)
        for name in ("monday", "tuesday", "wednesday"):
            local.create(store, "bible", snapshots, name, min_free_bytes=0)
    findings = check_snapshots(snapshots, deep=deep, in_use=True)
    checks = [next(findings).check]
    files.remove(snapshots / "bible" / "tuesday")
    found = list(findings)
    assert [*checks, *(each.check for each in found)] == [
        "snapshot bible/monday",
        "snapshot bible/wednesday",
    ]
    assert all(each.severity is Severity.OK for each in found)
