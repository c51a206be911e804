"""A rebuilt memory takes the place of another, on every engine, while model runners ask for it."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from typer.testing import CliRunner

from router_service.cli.admin import app
from tests.integration.admin_runs import admin_of
from tests.integration.replaced_memories import (
    NEW,
    OLD,
    answer,
    answers,
    asking,
    contents,
    fill,
    fill_both,
    names,
    replace,
    request_of,
    stats,
)
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    COSINE,
    LAYERS,
    LOGIT_DELTA,
    Sidecar,
    random_entries,
    refusal,
    running_sidecar,
)


@pytest.fixture
def by(sidecar: Sidecar, name: str) -> str:
    """The rebuilt memory; both are there."""
    fill_both(sidecar, name, f"{name}-2")
    return f"{name}-2"


def _delete(sidecar: Sidecar, name: str) -> int:
    request = admin_pb.DeleteMemoryRequest(memory=name)
    return int(sidecar.admin.DeleteMemory(request, timeout=CALL_TIMEOUT_S).entries)


def test_from_one_look_up_to_the_next(sidecar: Sidecar, name: str, by: str) -> None:
    """None fails, each is of one of the two; entries, settings and counts come along, versions rise."""
    expected, stored, counted = answers(sidecar, by), contents(sidecar, by), stats(sidecar, by)
    old, before, other = answers(sidecar, name)[0], sidecar.describe(name), sidecar.describe(by)
    with asking(sidecar, name) as end:
        done = replace(sidecar, name, by)
        after = answer(sidecar.route(request_of(sidecar, name)))
        replies = end()
    assert [each for each, _ in groupby(map(answer, replies))] in ([old, after], [after])
    assert after == expected[0] != old
    versions = [reply.memory_version for reply in replies]
    assert versions == sorted(versions)
    assert done.removed == OLD * LAYERS
    assert done.memory == sidecar.describe(name)
    assert done.memory.settings == other.settings
    assert done.memory.version > max(before.version, other.version)
    assert done.memory.created_unix_ms > before.created_unix_ms
    assert by not in names(sidecar)
    assert stats(sidecar, name)[1:] == counted[1:]  # layer 0 was asked meanwhile
    assert answers(sidecar, name) == expected
    assert contents(sidecar, name) == stored


def test_both_names_are_used_again(sidecar: Sidecar, name: str, by: str) -> None:
    """What is stored under a name that has been given away is nobody else's; another similarity is no obstacle."""
    third = f"{name}-3"
    fill(sidecar, third, 7, similarity=COSINE)
    asked, expected = answers(sidecar, third), contents(sidecar, third)
    replace(sidecar, name, third)
    fill(sidecar, third, 5)
    assert _delete(sidecar, third) == 5 * LAYERS
    assert answers(sidecar, name) == asked
    assert replace(sidecar, by, name).removed == NEW * LAYERS
    assert contents(sidecar, by) == expected
    assert not {name, third} & set(names(sidecar))
    sidecar.upsert(by, 0, random_entries(LOGIT_DELTA, 3, first_id=1000))
    assert _delete(sidecar, by) == 7 * LAYERS + 3
    fill(sidecar, name, 6)
    assert _delete(sidecar, name) == 6 * LAYERS


@pytest.mark.parametrize(
    ("other", "reason", "words"),
    [
        ("nope", "MEMORY_NOT_FOUND", "'nope' not found"),
        ("itself", "INVALID_FIELD", "another memory than the one that it replaces"),
        ("model", "MODEL_MISMATCH", "router_hash: memory"),
        ("kind", "KIND_MISMATCH", "holds assignments"),
    ],
)
def test_what_is_refused_changes_nothing(
    sidecar: Sidecar, name: str, other: str, reason: str, words: str
) -> None:
    fill(sidecar, name, OLD)
    sidecar.create(f"{name}-model", kind=LOGIT_DELTA, model={"router_hash": "ab" * 32})
    sidecar.create(f"{name}-kind", kind=ASSIGNMENT)
    by = {"itself": name, "nope": "nope"}.get(other, f"{name}-{other}")
    before = [sidecar.describe(each) for each in (name, f"{name}-model", f"{name}-kind")]
    request = admin_pb.ReplaceMemoryRequest(memory=name, by=by)
    error = refusal(sidecar.admin.ReplaceMemory, request)
    assert error.reason == f"ERROR_REASON_{reason}"
    assert words in error.message
    unknown = admin_pb.ReplaceMemoryRequest(memory="nope", by=name)
    assert refusal(sidecar.admin.ReplaceMemory, unknown).reason == "ERROR_REASON_MEMORY_NOT_FOUND"
    after = [sidecar.describe(each) for each in (name, f"{name}-model", f"{name}-kind")]
    assert after == before


def test_the_command(sidecar: Sidecar, name: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    admin, words = admin_of(sidecar.target), ("memory", "replace", name, "--by", by)
    assert "stdin is no terminal; pass --yes" in admin(*words, code=2)
    monkeypatch.setattr("router_service.cli.output.on_terminal", lambda: True)
    kept = CliRunner().invoke(app, ["--target", sidecar.target, *words], input="n\n")
    assert f"Delete memory {name} with {OLD * LAYERS} entries, and name {by} {name}?" in kept.stderr
    assert {name, by} <= set(names(sidecar))
    done = admin(*words, "--yes")
    assert done == {"memory": name, "by": by, "entries": NEW * LAYERS, "removed": OLD * LAYERS}
    assert f"memory '{by}' not found" in admin(*words, "--yes", code=1)


def test_on_disk_it_outlives_the_service(data: Path) -> None:
    with running_sidecar(data) as service:
        fill_both(service, "law", "law-2")
        expected, stored = answers(service, "law-2"), contents(service, "law-2")
        replace(service, "law", "law-2")
        counted = stats(service, "law")
    home = data / "memories" / "law"
    assert sorted(path.name for path in home.iterdir())[0] == "memory.json"
    assert len(list(home.iterdir())) == 2
    assert not (home.parent / "law-2").exists()
    with running_sidecar(data) as service:
        assert [layer[2] for layer in stats(service, "law")] == [each[2] for each in counted]
        assert answers(service, "law") == expected
        assert contents(service, "law") == stored
        assert names(service) == ["law"]
