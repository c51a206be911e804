"""`router-admin import`: files that describe themselves, made into memories that are equal bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import types_pb2 as types_pb
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.integration.admin_runs import Admin, admin_of, content_of
from tests.integration.server_snapshots import until
from tests.message_gate import MessageGate
from tests.sidecar import (
    ASSIGNMENT,
    COSINE,
    EXPERTS,
    HIDDEN,
    LOGIT_DELTA,
    LOGITS,
    RBF,
    Sidecar,
    random_entries,
)

KINDS = pytest.mark.parametrize(
    "kind", [ASSIGNMENT, LOGIT_DELTA, LOGITS], ids=["assignment", "logit_delta", "logits"]
)
DESCRIBED = pytest.mark.parametrize("suffix", ["parquet", "safetensors"])


@pytest.fixture
def service(ram_sidecar: Sidecar) -> Sidecar:
    """The service that the commands talk to."""
    return ram_sidecar


@pytest.fixture
def admin(service: Sidecar) -> Admin:
    """Runs `router-admin --json`."""
    return admin_of(service.target)


def filled(service: Sidecar, name: str, kind: int = LOGIT_DELTA, **settings: Any) -> str:
    """A memory with two filled layers, and settings that are no defaults."""
    service.create(name, kind=kind, gamma=[0.1, 0.2, 0.3], layers=[0, 2], neighbours=7, **settings)
    service.upsert(name, 0, random_entries(kind, 30))
    service.upsert(name, 2, random_entries(kind, 20, seed=3))
    return name


@DESCRIBED
@KINDS
@pytest.mark.parametrize("similarity", [RBF, COSINE], ids=["rbf", "cosine"])
def test_a_file_makes_the_same_memory(
    service: Sidecar,
    admin: Admin,
    name: str,
    kind: int,
    suffix: str,
    similarity: int,
    tmp_path: Path,
) -> None:
    filled(service, name, kind, similarity=similarity)
    file = tmp_path / f"x.{suffix}"
    admin("export", name, file)
    done = admin("import", file, "--as", f"{name}-b")
    assert (done["made"], done["entries"]) == (True, 50)
    one, other = admin("memory", "show", name), admin("memory", "show", f"{name}-b")
    assert one["settings"] == other["settings"]
    assert one["fingerprint"] == other["fingerprint"]
    assert content_of(service, f"{name}-b") == content_of(service, name)

    again = admin("import", file, "--as", f"{name}-b")
    assert (again["made"], again["entries"]) == (False, 50)
    assert content_of(service, f"{name}-b") == content_of(service, name)


def test_the_name_is_that_of_the_exported_memory(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    filled(service, name)
    before = content_of(service, name)
    admin("export", name, tmp_path / "x.parquet")
    admin("memory", "delete", name, "--yes")
    assert admin("import", tmp_path / "x.parquet")["memory"] == name
    assert content_of(service, name) == before


def test_an_empty_memory(service: Sidecar, admin: Admin, name: str, tmp_path: Path) -> None:
    service.create(name)
    for suffix in ("parquet", "safetensors"):
        admin("export", name, tmp_path / f"x.{suffix}")
        done = admin("import", tmp_path / f"x.{suffix}", "--as", f"{name}-{suffix}")
        assert (done["made"], done["entries"]) == (True, 0)


def test_jsonl_needs_a_fingerprint_or_a_memory(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    filled(service, name, ASSIGNMENT)
    file, shown = tmp_path / "x.jsonl", tmp_path / "x.json"
    admin("export", name, file)
    refused = admin("import", file, "--as", f"{name}-b", code=2)
    assert "--into NAME" in refused
    assert "--fingerprint FILE.json" in refused
    shown.write_text(json.dumps(admin("memory", "show", name)))
    admin("import", file, "--as", f"{name}-b", "--fingerprint", shown)
    assert content_of(service, f"{name}-b") == content_of(service, name)
    service.create(f"{name}-c", kind=ASSIGNMENT)
    assert admin("import", file, "--into", f"{name}-c", "--fsync")["durability"] == "fsync"
    assert content_of(service, f"{name}-c") == content_of(service, name)


@DESCRIBED
def test_another_models_file(
    service: Sidecar, admin: Admin, name: str, suffix: str, tmp_path: Path
) -> None:
    filled(service, name)
    file = tmp_path / f"x.{suffix}"
    admin("export", name, file)
    service.create(f"{name}-b", model={"router_hash": "beef" * 16})
    refused = admin("import", file, "--into", f"{name}-b", code=2)
    assert f"router_hash: file {file} '{'5eed' * 16}', memory {name}-b '{'beef' * 16}'" in refused
    refused = admin("import", file, "--as", f"{name}-b", code=2)
    assert "different models" in refused
    service.create(f"{name}-c", kind=ASSIGNMENT)
    refused = admin("import", file, "--into", f"{name}-c", code=2)
    assert f"kind: file {file} 'logit_delta', memory {name}-c 'assignment'" in refused
    assert admin("count", f"{name}-b")["total"] == admin("count", f"{name}-c")["total"] == 0


def test_a_memory_with_something_else_is_only_added_to_when_told(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    filled(service, name)
    admin("export", name, tmp_path / "x.parquet")
    service.upsert(name, 1, random_entries(LOGIT_DELTA, 5, seed=9))
    before = content_of(service, name)
    refused = admin("import", tmp_path / "x.parquet", code=2)
    assert f"holds 5 entries that {tmp_path}/x.parquet does not have; pass --into {name}" in refused
    admin("import", tmp_path / "x.parquet", "--into", name)
    assert content_of(service, name) == before
    admin("memory", "set", name, "--gamma", "0.9")
    refused = admin("import", tmp_path / "x.parquet", code=2)
    assert "gamma: file" in refused
    assert "pass --into" in refused


def test_bad_usage(service: Sidecar, admin: Admin, name: str, tmp_path: Path) -> None:
    filled(service, name)
    file = tmp_path / "x.parquet"
    admin("export", name, file)
    assert "not both" in admin("import", file, "--as", "a", "--into", "b", code=2)
    assert "leave --fingerprint out" in admin("import", file, "--fingerprint", file, code=2)
    assert "no such file" in admin("import", tmp_path / "y.parquet", code=2)
    assert "'nope' not found" in admin("import", file, "--into", "nope", code=1)
    assert "name: got '../x'" in admin("import", file, "--as", "../x", code=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"fingerprint": None}, "expected an object"),
        ({"settings": {"kind": "chess"}}, "expected one of unspecified, assignment, logit_delta"),
        ({"settings": {}}, "kind or similarity missing"),
        ({"fingerprint": {"hidden_size": "wide"}}, "hidden_size"),
    ],
    ids=["format", "fingerprint", "kind", "settings", "type"],
)
def test_a_description_that_means_nothing(
    admin: Admin, name: str, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    whole = {"format": 1, "memory": name, "fingerprint": {}, "settings": {}}
    rows = {"layers.0.keys": np.zeros((1, HIDDEN), np.float32)}
    file = tmp_path / "x.safetensors"
    save_file(rows, file, metadata={"knnmoe": json.dumps(whole | changes)})
    refused = admin("import", file, code=2)
    assert f"{file}: metadata knnmoe: " in refused
    assert words in refused
    assert "not found" in admin("count", name, code=1)


def test_what_can_be_checked_is_checked_before_anything_is_made(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    filled(service, name)
    file = tmp_path / "x.parquet"
    admin("export", name, file)
    table = pq.read_table(file)
    narrow = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * 50, pa.float32()), 1)
    pq.write_table(table.set_column(2, "key", narrow), file)
    refused = admin("import", file, "--as", f"{name}-b", code=2)
    assert f"key: got 1, expected {HIDDEN} numbers" in refused
    assert "not found" in admin("count", f"{name}-b", code=1)


def test_an_import_that_was_killed_is_finished_by_the_same_command(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    service.create(name)
    for layer in range(3):
        service.upsert(name, layer, random_entries(LOGIT_DELTA, 4000, seed=layer))
    file = tmp_path / "x.jsonl"
    admin("export", name, file)
    shown = tmp_path / "x.json"
    shown.write_text(json.dumps(admin("memory", "show", name)))
    words = ["import", str(file), "--as", f"{name}-b", "--fingerprint", str(shown)]
    script = Path(sys.executable).with_name("router-admin")
    with MessageGate(service.target, "Upsert", passes=3) as gate:
        command = [script, "--target", gate.target, *words]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as killed:
            gate.wait_until_stopped(killed)
            until(lambda: _entries(service, f"{name}-b"))
            killed.kill()
    assert 0 < _entries(service, f"{name}-b") < 12000
    assert admin(*words)["entries"] == 12000
    assert content_of(service, f"{name}-b") == content_of(service, name)


def _entries(service: Sidecar, name: str) -> int:
    found = service.admin.ListMemories(admin_pb.ListMemoriesRequest()).memories
    return sum(layer.entries for memory in found if memory.name == name for layer in memory.layers)


def test_pyarrow_reads_an_exported_parquet_file(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    filled(service, name)
    admin("export", name, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet", columns=["key", "value", "source", "gain"])
    keys = np.stack(table.column("key").to_numpy())
    assert keys.shape == (50, HIDDEN)
    assert keys.dtype == np.float32
    assert table.schema.field("value").type == pa.list_(pa.float32(), EXPERTS)
    document = json.loads(pq.read_schema(tmp_path / "x.parquet").metadata[b"knnmoe"])
    assert document["fingerprint"]["hidden_size"] == HIDDEN
    assert document["settings"]["kind"] == "logit_delta"


def test_safetensors_reads_an_exported_file(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    filled(service, name, ASSIGNMENT)
    admin("export", name, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["layers.0.keys"].shape == (30, HIDDEN)
    assert loaded["layers.2.experts"].dtype == np.int32
    assert loaded["layers.2.ids"].dtype == np.uint64
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "knnmoe-entries-1"
    assert json.loads(metadata["knnmoe"])["memory"] == name
    origins = json.loads(metadata["layers.2.provenance"])
    assert len(origins["source"]) == 20


def test_awkward_provenance_survives(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    """Quotes, other scripts, the largest numbers, and a float that decimals do not hold."""
    service.create(name)
    entries = random_entries(LOGIT_DELTA, 1)
    entries.provenance[0].CopyFrom(
        types_pb.Provenance(
            source='a "b" \\ \n',
            example="ü 漢",
            position=2**32 - 1,
            token=-(2**31),
            gain=0.1,
            snippet='"\\ \t漢',
            token_end=4,
        )
    )
    service.upsert(name, 1, entries)
    for suffix in ("parquet", "safetensors"):
        admin("export", name, tmp_path / f"x.{suffix}")
        admin("import", tmp_path / f"x.{suffix}", "--as", f"{name}-{suffix}")
        assert content_of(service, f"{name}-{suffix}") == content_of(service, name)
