"""`router-admin snapshot`: copies that are made, checked, moved and restored; those that are refused change nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from router_service.cli.admin import app
from tests.sidecar import LOGIT_DELTA, Sidecar, make_fingerprint, random_entries

Admin = Callable[..., Any]


@pytest.fixture
def admin(edge_sidecar: Sidecar) -> Admin:
    """Runs `router-admin` on a service with files; `code` is the expected exit code."""

    def run(*arguments: str, code: int = 0, answer: str | None = None) -> Any:
        command = ["--target", edge_sidecar.target, *arguments]
        result = CliRunner().invoke(app, command, input=answer)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def memory(edge_sidecar: Sidecar, name: str) -> str:
    """40 entries in layer 0, 20 in layer 1; half of each of either source."""
    edge_sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05], model={"num_layers": 2})
    edge_sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 40))
    edge_sidecar.upsert(name, 1, random_entries(LOGIT_DELTA, 20, seed=2, first_id=100))
    return name


def _document(result: Any) -> Any:
    """The JSON document that is all of stdout."""
    return json.loads(result.stdout)


def _count(admin: Admin, name: str) -> int:
    return int(_document(admin("--json", "count", name))["total"])


def test_snapshots(admin: Admin, memory: str, edge_sidecar: Sidecar, tmp_path: Path) -> None:
    made = _document(admin("--json", "snapshot", "create", memory, "--as", "monday"))
    assert (made["memory"], made["name"], made["entries"]) == (memory, "monday", 60)
    assert "monday" in admin("snapshot", "list", memory).stdout
    assert "whole:" in admin("snapshot", "verify", memory, "monday").stdout
    archive = edge_sidecar.data / "packs" / f"{memory}.tar"
    packed = _document(admin("--json", "snapshot", "pack", memory, "monday", archive.name))
    assert packed["archive"] == str(archive)
    assert "new file" in admin("snapshot", "pack", memory, "monday", str(archive), code=1).stderr
    outside = admin("snapshot", "pack", memory, "monday", str(tmp_path / "x.tar"), code=1)
    assert "--pack-dir" in outside.stderr
    assert str(archive.parent) in outside.stderr
    verified = _document(admin("--json", "snapshot", "verify", memory, str(archive)))
    assert verified["path"] == str(archive)

    admin("delete", memory, "--source", "text-0", "--yes")
    taken = admin("snapshot", "restore", memory, "monday", code=1)
    assert "already exists" in taken.stderr
    copy = _document(
        admin("--json", "snapshot", "restore", memory, str(archive), "--as", f"{memory}-b")
    )
    assert copy["name"] == f"{memory}-b"
    assert _count(admin, f"{memory}-b") == 60
    assert (
        "pass --yes" in admin("snapshot", "restore", memory, "monday", "--replace", code=2).stderr
    )
    assert _count(admin, memory) == 30
    admin("snapshot", "restore", memory, made["path"], "--replace", "--yes")
    assert _count(admin, memory) == 60

    assert "pass --yes" in admin("snapshot", "delete", memory, "monday", code=2).stderr
    assert "deleted" in admin("snapshot", "delete", memory, "monday", "--yes").stdout
    assert _document(admin("--json", "snapshot", "list", memory)) == {"snapshots": []}
    gone = admin("snapshot", "delete", memory, "monday", "--yes", code=1)
    assert "snapshot 'monday' not found" in gone.stderr


def test_snapshots_that_are_refused(
    admin: Admin, memory: str, edge_sidecar: Sidecar, tmp_path: Path
) -> None:
    path = Path(_document(admin("--json", "snapshot", "create", memory, "--as", "ok"))["path"])
    before = edge_sidecar.describe(memory)
    restore = ("snapshot", "restore", memory)
    packed = _document(admin("--json", "snapshot", "pack", memory, "ok", f"{memory}.tar"))[
        "archive"
    ]
    archive = tmp_path / "ok.tar"
    archive.write_bytes(Path(packed).read_bytes()[:-200_000])
    damaged = tmp_path / "damaged"
    shutil.copytree(path, damaged)
    victim = next(damaged.glob("layer-000/*/shard/**/*.json"))
    victim.write_bytes(b" " * victim.stat().st_size)
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.tar").write_bytes(b"noise" * 1000)
    for bad, words in {
        str(archive): "is refused",
        str(damaged): "content",
        str(tmp_path / "empty"): "manifest.json cannot be read",
        str(tmp_path / "noise.tar"): "is refused",
        str(tmp_path / "nowhere"): "nothing there, on the service's machine",
        "relative/path": "an absolute path on the service's machine",
        "nope": "snapshot 'nope' not found",
    }.items():
        assert words in admin(*restore, bad, "--as", f"{memory}-x", code=1).stderr
        assert words in admin(*restore, bad, "--replace", "--yes", code=1).stderr
    assert edge_sidecar.describe(memory) == before
    assert "expected the name of a snapshot" in admin(*restore, "", code=2).stderr
    assert "name" in admin(*restore, "ok", "--as", "a/b", code=1).stderr
    snapshot_store = edge_sidecar.data / "snapshots"
    assert not list(snapshot_store.glob(".*"))


def test_a_snapshot_of_another_model_does_not_take_the_place(
    admin: Admin, memory: str, edge_sidecar: Sidecar
) -> None:
    other = f"{memory}-other"
    edge_sidecar.create(other, model={"num_layers": 2, "router_hash": "0ther" * 12})
    path = _document(admin("--json", "snapshot", "create", other))["path"]
    refused = admin("snapshot", "restore", memory, path, "--replace", "--yes", code=1)
    assert "made for another model" in refused.stderr
    assert edge_sidecar.describe(memory).fingerprint == make_fingerprint(num_layers=2)


def test_a_missing_memory(admin: Admin) -> None:
    assert "memory 'nope' not found" in admin("snapshot", "create", "nope", code=1).stderr
    assert _document(admin("--json", "snapshot", "list", "nope")) == {"snapshots": []}
    assert "memory" in admin("snapshot", "list", "../x", code=1).stderr


def test_snapshots_need_files(ram_sidecar: Sidecar, name: str) -> None:
    ram_sidecar.create(name)
    for command in (["create", name], ["list"], ["verify", name, "x"], ["restore", name, "x"]):
        result = CliRunner().invoke(app, ["--target", ram_sidecar.target, "snapshot", *command])
        assert result.exit_code == 1
        assert "start the service with --backend edge" in result.stderr
