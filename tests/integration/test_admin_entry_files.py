"""Files of entries through `router-admin upsert` and `export`: round trips, and errors that name the row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from knnmoe import tensors
from knnmoe.entry_ids import entry_id
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from safetensors import safe_open
from typer.testing import CliRunner

from router_service.cli.admin import app
from tests.sidecar import (
    ASSIGNMENT,
    DENSE_VALUES,
    HIDDEN,
    LOGIT_DELTA,
    LOGITS,
    Sidecar,
    exported,
    random_entries,
)

FORMATS = pytest.mark.parametrize("suffix", ["jsonl", "parquet", "safetensors"])
KINDS = pytest.mark.parametrize(
    "kind", [ASSIGNMENT, LOGIT_DELTA, LOGITS], ids=["assignment", "logit_delta", "logits"]
)
Admin = Callable[..., Any]


@pytest.fixture
def service(ram_sidecar: Sidecar) -> Sidecar:
    """The service that the commands talk to."""
    return ram_sidecar


@pytest.fixture
def admin(service: Sidecar) -> Admin:
    """Runs `router-admin --json`; returns the document, or stderr when it is expected to fail."""

    def run(*arguments: object, code: int = 0) -> Any:
        words = ["--json", "--target", service.target, *map(str, arguments)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if code == 0 else result.stderr

    return run


def _columns(parts: list[admin_pb.Entries]) -> dict[str, Any]:
    """Exported entries, column by column."""
    kind = parts[0].WhichOneof("values")
    columns: dict[str, Any] = {
        "ids": [part.ids for part in parts],
        "keys": [part.keys for part in parts],
    }
    if kind in DENSE_VALUES.values():
        columns["values"] = [getattr(part, kind) for part in parts]
    else:
        columns["experts"] = [part.assignments.experts for part in parts]
        columns["weights"] = [part.assignments.weights for part in parts]
    columns = {
        n: np.concatenate([tensors.to_array(t) for t in c]).tolist() for n, c in columns.items()
    }
    return columns | {"provenance": [origin for part in parts for origin in part.provenance]}


@KINDS
@FORMATS
def test_round_trip(
    service: Sidecar, admin: Admin, name: str, kind: int, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"entries.{suffix}"
    service.create(name, kind=kind)
    service.upsert(name, 0, random_entries(kind, 30))
    service.upsert(name, 2, random_entries(kind, 20, seed=3))
    before = [_columns(exported(service, name, layer)) for layer in (0, 2)]
    done = admin("export", name, file)
    assert (done["entries"], done["format"]) == (50, suffix)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    service.admin.DeleteMemory(admin_pb.DeleteMemoryRequest(memory=name))
    service.create(name, kind=kind)
    done = admin("upsert", name, file, "--fsync")
    assert done["layers"] == [{"layer": 0, "entries": 30}, {"layer": 2, "entries": 20}]
    assert done["durability"] == "fsync"
    assert [_columns(exported(service, name, layer)) for layer in (0, 2)] == before
    admin("upsert", name, file)
    assert admin("count", name)["total"] == 50

    one_layer = tmp_path / f"one.{suffix}"
    assert admin("export", name, one_layer, "--layer", 2)["entries"] == 20
    assert admin("upsert", name, one_layer, "--layer", 2)["entries"] == 20
    assert "no entries of layer 1" in admin("upsert", name, one_layer, "--layer", 1, code=2)


def test_export_replaces_a_file_only_when_told(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "entries.parquet"
    file.write_text("precious")
    service.create(name, model={"num_layers": 1})
    assert "already there; pass --force" in admin("export", name, file, code=2)
    assert file.read_text() == "precious"
    assert admin("export", name, file, "--force")["entries"] == 0
    assert pq.read_table(file).num_rows == 0
    admin("export", name, tmp_path / "x.csv", code=2)
    admin("export", name, tmp_path / "no" / "x.parquet", code=2)
    admin("export", name, tmp_path / "y.parquet", "--layer", 7, code=1)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_an_exported_safetensors_file_is_one(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    service.create(name, model={"num_layers": 1})
    service.upsert(name, 0, random_entries(LOGIT_DELTA, 10))
    admin("export", name, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert file.get_tensor("layers.0.keys").shape == (10, HIDDEN)
        origins = json.loads(file.metadata()["layers.0.provenance"])
    assert sorted(origins["position"]) == list(range(10))


def _row(**changes: Any) -> dict[str, Any]:
    row = {"layer": 0, "key": [0.5] * HIDDEN, "value": [0.25] * 8}
    return row | {"source": "a.txt", "example": "e", "position": 0} | changes


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ids_are_made_from_the_place(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    service.create(name, model={"num_layers": 1})
    file = _write(tmp_path / "rows.jsonl", [_row(position=p) for p in range(3)])
    admin("upsert", name, file)
    admin("upsert", name, file)
    [part] = exported(service, name, 0)
    wanted = sorted(entry_id("a.txt", "e", position) for position in range(3))
    assert tensors.to_array(part.ids).tolist() == wanted
    assert all(entry < 2**63 for entry in wanted)


def test_rows_without_a_layer(service: Sidecar, admin: Admin, name: str, tmp_path: Path) -> None:
    service.create(name)
    row = _row()
    del row["layer"]
    file = _write(tmp_path / "rows.jsonl", [row])
    refused = admin("upsert", name, file, code=2)
    assert f"{file}: line 1: layer: missing" in refused
    assert admin("upsert", name, file, "--layer", 1)["layers"] == [{"layer": 1, "entries": 1}]
    file = _write(file, [_row(layer=9)])
    assert "layer: got 9, expected 0 to 2" in admin("upsert", name, file, code=1)


def test_the_service_refuses_a_row(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    """The first batch is acknowledged; the row of the second one is named by its line."""
    service.create(name, model={"num_layers": 1})
    rows = [_row(position=p) for p in range(600)]
    rows[555]["source"] = "x" * 2000
    file = _write(tmp_path / "rows.jsonl", rows)
    refused = admin("upsert", name, file, code=2)
    assert (
        f"router-admin: {file}: line 556: entries.provenance[43].source: got '2000 characters'"
        in refused
    )
    assert "512 entries were acknowledged before" in refused
    assert admin("count", name)["total"] == 512


def test_the_same_id_twice(service: Sidecar, admin: Admin, name: str, tmp_path: Path) -> None:
    service.create(name, model={"num_layers": 1})
    file = _write(tmp_path / "rows.jsonl", [_row(id=7), _row(id=8), _row(id=7)])
    assert f"{file}: line 3: id: 7 is there twice in layer 0" in admin("upsert", name, file, code=2)
    assert admin("count", name)["total"] == 0


def test_a_file_that_is_not_there(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    service.create(name, model={"num_layers": 1})
    assert "x.jsonl: no such file" in admin("upsert", name, tmp_path / "x.jsonl", code=2)
    assert "unknown format" in admin("upsert", name, tmp_path / "x.csv", code=2)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "no entries" in admin("upsert", name, empty, code=2)
    assert "not found" in admin("upsert", "nope", empty, code=1)
