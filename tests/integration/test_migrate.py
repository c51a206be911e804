"""`router-admin migrate`: the same memory at another endpoint, to the last bit, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import retention_pb2, retention_pb2_grpc
from typer.testing import CliRunner

from router_service.cli.admin import app
from tests.engines import clean_server, url_of
from tests.integration.admin_runs import Admin, admin_of, content_of
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    COSINE,
    LOGIT_DELTA,
    LOGITS,
    RBF,
    Sidecar,
    exported,
    random_entries,
    running_sidecar,
)

Endpoint = tuple[str, ...]
KINDS = pytest.mark.parametrize(
    ("kind", "similarity"),
    [(ASSIGNMENT, COSINE), (LOGIT_DELTA, RBF), (LOGITS, RBF)],
    ids=["cosine", "rbf", "logits"],
)


@pytest.fixture
def service(ram_sidecar: Sidecar) -> Sidecar:
    """The service that the commands talk to."""
    return ram_sidecar


@pytest.fixture
def admin(service: Sidecar) -> Admin:
    """Runs `router-admin --json`."""
    return admin_of(service.target)


@pytest.fixture(
    params=["directory", "standin", pytest.param("server", marks=pytest.mark.docker)],
)
def endpoint(
    request: pytest.FixtureRequest, data: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Endpoint]:
    """Another home: what --from or --to are given, and the flags that go with it."""
    if request.param == "directory":
        yield (str(data),)
        return
    with clean_server(url_of(request.param, request)) as options:
        if options.api_key is not None:
            monkeypatch.setenv("ROUTER_SERVICE_QDRANT_API_KEY", options.api_key)
        yield options.url, "--qdrant-prefix", options.prefix


def filled(service: Sidecar, name: str, kind: int = LOGIT_DELTA, **settings: Any) -> str:
    """A memory with two filled layers, and settings that are no defaults."""
    service.create(name, kind=kind, gamma=[0.1, 0.2, 0.3], layers=[0, 2], neighbours=7, **settings)
    service.upsert(name, 0, random_entries(kind, 1200))
    service.upsert(name, 2, random_entries(kind, 20, seed=3))
    return name


def delete_first(service: Sidecar, name: str, count: int) -> None:
    """Deletes the first entries of layer 0."""
    first = tensors.to_array(exported(service, name, 0)[0].ids)[:count]
    request = retention_pb2.DeleteRequest(memory=name, layer=0, ids=tensors.to_tensor(first))
    retention_pb2_grpc.RetentionServiceStub(service.channel).Delete(request, timeout=CALL_TIMEOUT_S)


@KINDS
def test_there_and_back(
    service: Sidecar, admin: Admin, name: str, endpoint: Endpoint, kind: int, similarity: int
) -> None:
    before = content_of(service, filled(service, name, kind, similarity=similarity))
    there = admin("migrate", name, "--from", "embedded", "--to", *endpoint)
    back = admin("migrate", name, "--to", "embedded", "--as", f"{name}-b", "--from", *endpoint)
    assert there["verified"]
    assert back["verified"]
    for done in (there, back):
        [memory] = done["memories"]
        assert memory["made"]
        assert [layer["added"] for layer in memory["layers"]] == [1200, 0, 20]
        assert [layer["target"]["entries"] for layer in memory["layers"]] == [1200, 0, 20]
    assert content_of(service, name) == content_of(service, f"{name}-b") == before
    one, other = admin("memory", "show", name), admin("memory", "show", f"{name}-b")
    assert one["settings"] == other["settings"]
    assert one["fingerprint"] == other["fingerprint"]


def test_the_next_run_brings_what_changed(
    service: Sidecar, admin: Admin, name: str, endpoint: Endpoint
) -> None:
    """Settings too; what the source no longer has only with --delete."""
    words = ("migrate", filled(service, name), "--from", "embedded", "--to", *endpoint)
    admin(*words)
    service.upsert(name, 0, random_entries(LOGIT_DELTA, 5, seed=9, first_id=1190))
    service.upsert(name, 1, random_entries(LOGIT_DELTA, 5))
    delete_first(service, name, 2)
    admin("memory", "set", name, "--neighbours", 9)
    refused = admin(*words, code=1)
    assert "holds 2 entries that the source lacks (layer 0: 2)" in refused
    assert "pass --delete to remove them, or --as NAME" in refused

    would = admin(*words, "--delete", "--dry-run")["memories"][0]
    assert (would["added"], would["replaced"], would["deleted"]) == (0, 0, 2)
    done = admin(*words, "--delete")["memories"][0]
    assert (done["added"], done["replaced"], done["deleted"]) == (0, 0, 2)
    back = admin("migrate", name, "--to", "embedded", "--as", f"{name}-b", "--from", *endpoint)
    assert back["memories"][0]["added"] == 1200 - 2 + 5 + 20
    assert content_of(service, f"{name}-b") == content_of(service, name)
    assert admin("memory", "show", f"{name}-b")["settings"]["neighbours"] == 9


def test_a_dry_run_writes_nothing(service: Sidecar, admin: Admin, name: str, data: Path) -> None:
    words = ("migrate", filled(service, name), "--from", "embedded", "--to", data)
    would = admin(*words, "--dry-run")
    assert would["dry_run"]
    assert [layer["added"] for layer in would["memories"][0]["layers"]] == [1200, 0, 20]
    assert not data.exists()
    service.create(f"{name}-b", neighbours=3)
    assert admin("count", f"{name}-b")["total"] == 0


def test_all_memories_of_a_directory(service: Sidecar, admin: Admin, name: str, data: Path) -> None:
    one, other = filled(service, f"{name}-1"), filled(service, f"{name}-2", ASSIGNMENT)
    admin("migrate", one, other, "--from", "embedded", "--to", data)
    for memory in (one, other):
        admin("memory", "delete", memory, "--yes")
    words = ["--target", service.target, "migrate", "--from", str(data), "--to", "embedded"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert f"{one}, verified" in told.stdout
    assert f"{other}, verified" in told.stdout
    assert "the same" in told.stdout
    assert admin("count", one)["total"] == admin("count", other)["total"] == 1220


def test_settings_that_the_target_has_otherwise(
    service: Sidecar, admin: Admin, name: str, data: Path
) -> None:
    """A memory for all layers, into one for some; the user is told."""
    service.create(name, gamma=[0.5], neighbours=7)
    admin("migrate", name, "--from", "embedded", "--to", data)
    admin("memory", "set", name, "--layers", "1", "--gamma", 2)
    words = ["--target", service.target, "migrate", name, "--from", str(data), "--to", "embedded"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert f"{name}: settings brought from the source: gamma, layers" in told.stderr
    settings = admin("memory", "show", name)["settings"]
    assert (settings["gamma"], settings["layers"]) == ([0.5], [0, 1, 2])
    again = admin("migrate", name, "--from", data, "--to", "embedded")
    assert again["memories"][0]["changed_settings"] == []


def test_search_keys_move_along(service: Sidecar, admin: Admin, name: str, data: Path) -> None:
    admin("quantize", filled(service, name), "--method", "int8", "--layer", 2)
    words = ("migrate", name, "--from", "embedded", "--to", data)
    layers = admin(*words, "--no-optimize")["memories"][0]["layers"]
    assert [layer["compression"] for layer in layers] == ["none", "none", "none"]
    layers = admin(*words)["memories"][0]["layers"]
    assert [layer["compression"] for layer in layers] == ["none", "none", "int8"]
    assert [layer["optimized"] for layer in layers] == [False, False, True]
    with running_sidecar(data) as there:
        described = there.describe(name).layers
        assert [layer.quantization for layer in described] == ["none", "none", "int8"]
        assert content_of(there, name) == content_of(service, name)


def test_search_keys_that_a_server_cannot_have(
    service: Sidecar, name: str, standin_url: str
) -> None:
    with clean_server(standin_url) as options:
        filled(service, name)
        admin_of(service.target)("quantize", name, "--method", "float16", "--layer", 0)
        words = ["--target", service.target, "migrate", name, "--from", "embedded"]
        words += ["--to", options.url, "--qdrant-prefix", options.prefix]
        told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert f"{name}: the target cannot have search keys float16 (layers 0; " in told.stderr
    assert "they stay none" in told.stderr
    assert f"{name}, verified" in told.stdout


def test_a_service_that_stands_before_the_server(
    service: Sidecar, admin: Admin, name: str, standin_url: str, data: Path
) -> None:
    """What was moved to a server is served from there, with the same nearest entries."""
    with clean_server(standin_url) as options:
        flags = ["--qdrant-prefix", options.prefix, "--qdrant-timeout-s", "30"]
        to_server = ("--to", options.url, "--qdrant-prefix", options.prefix)
        admin("migrate", filled(service, name), "--from", "embedded", *to_server)
        with running_sidecar(data, backend=options.url, flags=flags) as there:
            assert content_of(there, name) == content_of(service, name)
            assert there.describe(name).settings == service.describe(name).settings


def test_what_a_long_source_name_and_odd_numbers_become(
    service: Sidecar, admin: Admin, name: str, endpoint: Endpoint
) -> None:
    service.create(name)
    entries = random_entries(LOGIT_DELTA, 3)
    keys = np.array([[-0.0, 1e-45, 1e18, 1 / 3] * 4] * 3, np.float32)
    entries.keys.CopyFrom(tensors.to_tensor(keys))
    origin = entries.provenance[1]
    origin.source, origin.example, origin.gain = "ö" * 1024, 'x"\n', -0.1
    origin.position, origin.token, origin.created_unix_ms = 2**32 - 1, -1, 2**42
    service.upsert(name, 0, entries)
    assert admin("migrate", name, "--from", "embedded", "--to", *endpoint)["verified"]
    admin("migrate", name, "--to", "embedded", "--as", f"{name}-b", "--from", *endpoint)
    copied: list[admin_pb.Entries] = exported(service, f"{name}-b", 0)
    assert copied == exported(service, name, 0)
