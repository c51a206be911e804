"""A Qdrant server on storage where searches find nothing: what fills a memory says so, and nothing is handed over.

Of the stand-in only: a real server does so on FUSE file systems.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.admin_runs import Admin, admin_of
from tests.integration.replaced_memories import NEW, OLD, answers, fill_both, names
from tests.integration.test_admin_doctor import doctor
from tests.qdrant_standin import QdrantStandIn
from tests.sidecar import LAYERS, LOGIT_DELTA, Sidecar, random_entries, running_sidecar


@pytest.fixture
def server(data: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(data.parent / "qdrant") as running:
        yield running


@pytest.fixture
def service(server: QdrantStandIn, data: Path) -> Iterator[Sidecar]:
    """With `law` and `law-2`."""
    with running_sidecar(data, backend=server.url, flags=["--qdrant-timeout-s", "30"]) as running:
        fill_both(running, "law", "law-2")
        yield running


@pytest.fixture
def admin(service: Sidecar) -> Admin:
    return admin_of(service.target)


def test_replace_leaves_both_as_they_are(
    server: QdrantStandIn, service: Sidecar, admin: Admin
) -> None:
    before = answers(service, "law")
    server.blind("*~law-2~layer-001*")
    refused = admin("memory", "replace", "law", "--by", "law-2", "--yes", code=1)
    assert f"layer 1 of memory 'law-2': a search of all entries does not find {NEW}" in refused
    assert "ext4 or xfs" in refused
    assert names(service) == ["law", "law-2"]
    assert answers(service, "law") == before


def test_doctor_names_each_layer(server: QdrantStandIn, service: Sidecar) -> None:
    assert [each for each in doctor(target=service.target) if each["severity"] == "error"] == []
    server.blind("*~law~*")
    found = doctor(target=service.target, code=1)
    errors = [each for each in found if each["severity"] == "error"]
    assert [each["check"] for each in errors] == ["law"] * LAYERS
    assert all("FUSE" in each["what"] for each in errors)


def test_migrate_removes_what_it_made(
    server: QdrantStandIn, data: Path, ram_sidecar: Sidecar, name: str
) -> None:
    ram_sidecar.create(name)
    ram_sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, OLD))
    admin, to = admin_of(ram_sidecar.target), ("--from", "embedded", "--to", server.url)
    server.blind("*")
    refused = admin("migrate", name, *to, code=1)
    assert f"does not find {OLD} of {OLD} keys" in refused
    assert "it was removed again" in refused
    with running_sidecar(data, backend=server.url) as there:
        assert names(there) == []
        server.faults.lift()
        assert admin("migrate", name, *to)["verified"]
        server.blind("*")
        refused = admin("migrate", name, *to, code=1)
        assert "what was written stays" in refused
        assert there.describe(name).layers[0].entries == OLD


def test_merge_looks_before_and_after(
    server: QdrantStandIn, service: Sidecar, admin: Admin
) -> None:
    service.create("into", gamma=[0.1])
    server.blind("*~into~layer-001*")
    refused = admin("merge", "law", "into", code=1)
    assert f"({LAYERS * OLD} entries of law were written to into, and stay)" in refused
    refused = admin("merge", "law-2", "into", code=1)
    assert "(nothing was written)" in refused
    assert [layer.entries for layer in service.describe("into").layers] == [OLD] * LAYERS
