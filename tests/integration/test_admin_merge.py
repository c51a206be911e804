"""`router-admin merge`: the union of two memories, whatever is in both, and twice the same as once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from typer.testing import CliRunner

from router_service.cli.admin import app
from tests.integration.admin_runs import Admin, admin_of, content_of
from tests.sidecar import ASSIGNMENT, COSINE, LOGIT_DELTA, Sidecar, exported, random_entries

LONG_AGO_MS, NOW_MS = 1_000, 2_000


@pytest.fixture
def service(ram_sidecar: Sidecar) -> Sidecar:
    """The service that the commands talk to."""
    return ram_sidecar


@pytest.fixture
def admin(service: Sidecar) -> Admin:
    """Runs `router-admin --json`."""
    return admin_of(service.target)


def entries_made(
    first: int, count: int, created_ms: int, seed: int, kind: int = LOGIT_DELTA
) -> admin_pb.Entries:
    """Entries number first, first + 1, ... of random values, made at a time."""
    entries = random_entries(kind, count, seed=seed, first_id=first)
    for origin in entries.provenance:
        origin.created_unix_ms = created_ms
    return entries


def made_of(service: Sidecar, name: str, layer: int = 0) -> dict[int, int]:
    """When each entry was made, by id."""
    return {
        entry: origin.created_unix_ms
        for part in exported(service, name, layer)
        for entry, origin in zip(tensors.to_array(part.ids).tolist(), part.provenance, strict=True)
    }


@pytest.fixture
def pair(service: Sidecar, name: str) -> tuple[str, str]:
    """FROM with entries 1 to 1500, the first half newer; INTO with 1000 to 2600, all between."""
    ours, into = f"{name}-from", f"{name}-into"
    service.create(ours, gamma=[0.5])
    service.create(into, gamma=[0.25])
    service.upsert(ours, 0, entries_made(1, 1250, NOW_MS, 1))
    service.upsert(ours, 0, entries_made(1251, 250, LONG_AGO_MS, 2))
    service.upsert(ours, 2, entries_made(1, 10, NOW_MS, 3))
    service.upsert(into, 0, entries_made(1001, 1600, 1_500, 4))
    return ours, into


@pytest.mark.parametrize(
    ("policy", "replaced", "kept"), [("keep", 0, 500), ("replace", 500, 0), ("newer", 250, 250)]
)
def test_conflicts(
    service: Sidecar,
    admin: Admin,
    pair: tuple[str, str],
    policy: str,
    replaced: int,
    kept: int,
) -> None:
    ours, into = pair
    source, before = made_of(service, ours), made_of(service, into)
    source_content = content_of(service, ours)
    done = admin("merge", ours, into, "--on-conflict", policy)
    assert (done["added"], done["replaced"], done["kept"]) == (1010, replaced, kept)
    assert [layer["layer"] for layer in done["layers"]] == [0, 2]
    merged = made_of(service, into)
    assert merged.keys() == source.keys() | before.keys()
    for entry, made in merged.items():
        sides = [side[entry] for side in (source, before) if entry in side]
        wanted = {"keep": sides[-1], "replace": sides[0], "newer": max(sides)}
        assert made == wanted[policy]
    assert admin("memory", "show", into)["settings"]["gamma"] == [0.25]
    assert content_of(service, ours) == source_content

    after = content_of(service, into)
    again = admin("merge", ours, into, "--on-conflict", policy)
    assert again["added"] == 0
    assert policy == "replace" or again["replaced"] == 0
    assert content_of(service, into) == after


@pytest.mark.parametrize("policy", ["keep", "replace", "newer"])
def test_ids_of_other_texts_are_said(service: Sidecar, name: str, policy: str) -> None:
    """As memories have them whose ids do not tell two texts of one name apart."""
    ours, into = f"{name}-from", f"{name}-into"
    for memory in (ours, into):
        service.create(memory)
    entries = entries_made(1, 20, NOW_MS, 1)
    service.upsert(ours, 0, entries)
    for number, change in ((3, {"source": "other.txt"}), (4, {"example": "x"}), (5, {"token": 1})):
        for field, value in change.items():
            setattr(entries.provenance[number], field, value)
    service.upsert(into, 0, entries)
    words = ["--json", "--target", service.target, "merge", ours, into, "--on-conflict", policy]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, json.loads(done.stdout)["other_text"]) == (0, 3)
    said = done.stderr
    assert f"3 entries of {ours} have the id of another text's in {into}, where" in said
    numbers = [n for n in tensors.to_array(entries.ids).tolist() if f"e.g. id {n}: " in said]
    assert len(numbers) == 1
    for expected in (0 if policy == "replace" else 3, 0):  # the same texts from then on
        again = CliRunner().invoke(app, [*words[:-1], "replace"])
        assert json.loads(again.stdout)["other_text"] == expected


def test_newer_is_the_default(admin: Admin, pair: tuple[str, str]) -> None:
    assert admin("merge", *pair)["on_conflict"] == "newer"


def test_copies_are_exact(service: Sidecar, admin: Admin, name: str) -> None:
    for kind, options in ((ASSIGNMENT, {}), (LOGIT_DELTA, {"similarity": COSINE})):
        ours, into = f"{name}-{kind}", f"{name}-{kind}-into"
        settings: dict[str, Any] = {"kind": kind, **options}
        service.create(ours, **settings)
        service.create(into, **settings)
        service.upsert(ours, 1, random_entries(kind, 40))
        admin("merge", ours, into)
        assert content_of(service, into) == content_of(service, ours)


def test_between_two_services(
    service: Sidecar, admin: Admin, edge_sidecar: Sidecar, name: str
) -> None:
    """The other service keeps its entries on disk."""
    edge_sidecar.create(name)
    edge_sidecar.upsert(name, 1, random_entries(LOGIT_DELTA, 30))
    service.create(name)
    done = admin("merge", name, name, "--from-target", edge_sidecar.target)
    assert done["added"] == 30
    assert content_of(service, name) == content_of(edge_sidecar, name)


def test_refusals_name_both_sides(
    service: Sidecar, admin: Admin, name: str, tmp_path: Path
) -> None:
    service.create(name)
    service.upsert(name, 0, random_entries(LOGIT_DELTA, 5))
    service.create(f"{name}-model", model={"num_experts": 9})
    service.create(f"{name}-kind", kind=ASSIGNMENT)
    service.create(f"{name}-cosine", similarity=COSINE)
    refused = admin("merge", name, f"{name}-model", code=2)
    assert f"num_experts: memory {name} 8, memory {name}-model 9" in refused
    refused = admin("merge", name, f"{name}-kind", code=2)
    assert f"kind: memory {name} 'logit_delta', memory {name}-kind 'assignment'" in refused
    assert "similarity: " in admin("merge", name, f"{name}-cosine", code=2)
    assert "the same memory" in admin("merge", name, name, code=2)
    assert "'nope' not found" in admin("merge", name, "nope", code=1)
    assert "'nope' not found" in admin("merge", "nope", name, code=1)
    nobody = f"unix:{tmp_path}/s"
    assert nobody in admin("merge", name, name, "--from-target", nobody, code=3)
    for other in ("model", "kind", "cosine"):
        assert admin("count", f"{name}-{other}")["total"] == 0


def test_a_merge_that_ended_early_is_finished_by_the_next(
    service: Sidecar, admin: Admin, name: str
) -> None:
    """INTO has got the first batch of FROM; the rest is added."""
    service.create(name)
    service.create(f"{name}-into")
    entries = entries_made(1, 1500, NOW_MS, 1)
    service.upsert(name, 0, entries)
    first = next(iter(exported(service, name, 0)))
    service.upsert(f"{name}-into", 0, first)
    done = admin("merge", name, f"{name}-into")
    copied = len(first.provenance)
    assert (done["added"], done["kept"]) == (1500 - copied, copied)
    assert content_of(service, f"{name}-into") == content_of(service, name)
