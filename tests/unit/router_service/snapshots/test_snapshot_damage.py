"""Whatever happens to the files of a snapshot, verify and restore say which and change nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from router_service.backends.disk import read_content
from router_service.errors import NewerSnapshot, RoutingServiceError, SnapshotInvalid
from router_service.memories.memory import RoutingMemory
from router_service.memories.store import MemoryStore
from router_service.snapshots import local
from router_service.snapshots import manifest as snapshot_manifest
from tests.unit.router_service.numbered_memory import answers


def one_file_of_each_kind(directory: Path) -> list[str]:
    """By the file's name and whether its layer is indexed."""
    kinds: dict[str, str] = {}
    for path in sorted(snapshot_manifest.read_manifest(directory).files):
        layer, _, rest = path.partition("/")
        kinds.setdefault(f"{layer} {'tail' if 'mutable' in rest else ''} {Path(rest).name}", path)
    return sorted(kinds.values())


@contextmanager
def cut(file: Path) -> Iterator[None]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(size - 1)
        last = opened.read()
    os.truncate(file, size - 1)
    yield
    with file.open("ab") as opened:
        opened.write(last)


@contextmanager
def flipped(file: Path, offset: int) -> Iterator[None]:
    with file.open("r+b", buffering=0) as opened:
        before = os.pread(opened.fileno(), 1, offset)
        os.pwrite(opened.fileno(), bytes([before[0] ^ 64]), offset)
        yield
        os.pwrite(opened.fileno(), before, offset)


@contextmanager
def gone(file: Path) -> Iterator[None]:
    away = Path(str(file.parent).split("snapshots")[0]) / "away"
    file.rename(away)
    yield
    away.rename(file)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(SnapshotInvalid) as caught:
        local.verify(path)
    for word in words:
        assert word in str(caught.value)


def test_every_kind_of_file_cut_flipped_or_gone(monday: Path) -> None:
    kinds = one_file_of_each_kind(monday)
    assert len(kinds) > 30
    files = snapshot_manifest.read_manifest(monday).files
    for path in kinds:
        file, content = monday / path, files[path]
        with gone(file):
            refused(monday, path, "is missing")
        if content.size_bytes:
            with cut(file):
                refused(monday, path, f"expected {content.size_bytes}")
            with flipped(file, content.content_bytes // 2):
                refused(monday, path, "other content")
    file = next(path for path in kinds if files[path].content_bytes < files[path].size_bytes)
    with flipped(monday / file, files[file].size_bytes - 1):  # a zero that is none
        refused(monday, file, "other content")
    assert local.verify(monday).entries == 620


def test_a_restore_refuses_what_verify_refuses(
    store: MemoryStore, memory: RoutingMemory, monday: Path, fast_dir: Path
) -> None:
    before = sorted(p.name for p in (fast_dir / "data").iterdir())
    file = monday / "layer-000" / "gen-000000" / "values.npz"
    for damage in (gone(file), cut(file), flipped(file, 100)):
        with damage, pytest.raises(SnapshotInvalid, match=r"monday.*values\.npz"):
            local.restore(store, monday, "bible", replacing=True, min_free_bytes=0)
    assert sorted(p.name for p in (fast_dir / "data").iterdir()) == before
    answers(store.get("bible"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: (p / "layer-000" / "extra").write_text("x"), "layer-000/extra is not in the"),
        (lambda p: (p / "layer-000" / "link").symlink_to("/etc/passwd"), "link is not in the"),
        (lambda p: (p / "layer-000" / "way").symlink_to(p / "layer-001"), "way is not in the"),
        (lambda p: swap_for_link(p / "layer-000" / "CURRENT"), "CURRENT is not a plain file"),
        (lambda p: swap_for_pipe(p / "layer-000" / "CURRENT"), "CURRENT is not a plain file"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text(""), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff{"), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_strange_files(
    store: MemoryStore, monday: Path, make: Callable[[Path], object], words: str
) -> None:
    make(monday)
    refused(monday, words)
    with pytest.raises(SnapshotInvalid, match=words):
        local.restore(store, monday, "copy", min_free_bytes=0)


def swap_for_link(file: Path) -> None:
    kept = file.rename(file.parents[3] / "kept")
    file.symlink_to(kept)


def swap_for_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


Body = dict[str, Any]


def set_path(body: Body, path: object) -> None:
    body["files"][0]["path"] = path


BROKEN_MANIFESTS: list[Callable[[Body], object]] = [
    lambda b: set_path(b, "/etc/passwd"),
    lambda b: set_path(b, "layer-000/../../x"),
    lambda b: set_path(b, "../layer-000/x"),
    lambda b: set_path(b, "layer-000//x"),
    lambda b: set_path(b, "layer-000"),
    lambda b: set_path(b, "layer-002/x"),
    lambda b: set_path(b, "x/y"),
    lambda b: set_path(b, "layer-000/a\0b"),
    lambda b: set_path(b, 7),
    lambda b: set_path(b, b["files"][1]["path"]),
    lambda b: b["files"][0].update(size_bytes=-1),
    lambda b: b["files"][0].update(content_bytes=2**40),
    lambda b: b["files"][0].update(sha256="x"),
    lambda b: b["files"][0].pop("sha256"),
    lambda b: b.update(files={}),
    lambda b: b["layers"].pop(),
    lambda b: b["layers"].reverse(),
    lambda b: b["layers"][0].update(entries=True),
    lambda b: b["layers"][0].update(entries=1),
    lambda b: b["total"].update(entries=1),
    lambda b: b.pop("total"),
    lambda b: b["memory"].update(name="../x"),
    lambda b: b.update(name="a/b"),
    lambda b: b.update(created_unix_ms="soon"),
    lambda b: b["memory"]["fingerprint"].update(num_layers=1),
    lambda b: b["memory"]["fingerprint"].update(hidden_size=8.0),
    lambda b: b["memory"]["fingerprint"].update(colour="blue"),
    lambda b: b["memory"]["settings"].update(neighbours=0),
    lambda b: b["memory"]["settings"].update(gamma=["x"]),
    lambda b: b["memory"]["settings"].update(kind="other"),
    lambda b: b.update(memory=None),
    lambda b: b.update(format="1"),
]


def test_manifests_that_say_something_else(monday: Path) -> None:
    file = monday / "manifest.json"
    text = file.read_text()
    for change in BROKEN_MANIFESTS:
        body = json.loads(text)
        change(body)
        file.write_text(json.dumps(body))
        refused(monday, "manifest.json is damaged")  # its own sum does not fit
        del body["sha256"]
        file.write_text(json.dumps(body | {"sha256": snapshot_manifest._checksum(body)}))
        refused(monday, "manifest.json is damaged")
    file.write_text(text)
    local.verify(monday)


def test_a_newer_format_is_refused_with_the_remedy(
    store: MemoryStore, monday: Path, snapshot_store: Path
) -> None:
    body = {"format": 2, "service_version": "9.8.7"}
    (monday / "manifest.json").write_text(json.dumps(body))
    words = r"format 2, written by router-service '9\.8\.7'; this version, .*, reads up to 1"
    for refused_call in (local.verify, lambda p: local.restore(store, p, "copy")):
        with pytest.raises(NewerSnapshot, match=words):
            refused_call(monday)
    (info,) = local.list_snapshots(snapshot_store)
    assert re.search(words, info.problem)
    assert (info.memory, info.name) == ("bible", "monday")


def test_a_wrong_count_is_found_when_the_layers_are_opened(
    store: MemoryStore, monday: Path, fast_dir: Path
) -> None:
    manifest = snapshot_manifest.read_manifest(monday)
    wrong = snapshot_manifest.SnapshotManifest(
        **{n: getattr(manifest, n) for n in manifest.__slots__} | {"entries": (310, 311)}
    )
    snapshot_manifest.write_manifest(monday, wrong)
    local.verify(monday)
    with pytest.raises(SnapshotInvalid, match="layer 1 has 310 entries, expected 311"):
        local.restore(store, monday, "copy", min_free_bytes=0)
    assert store.names() == []
    assert not (fast_dir / "data" / "copy").exists()


def test_damage_that_the_sums_do_not_show_is_found_when_the_layers_are_opened(
    store: MemoryStore, memory: RoutingMemory, monday: Path
) -> None:
    """As from a service with a defect: the manifest fits, the engine's files do not."""
    path = next(p for p in snapshot_manifest.read_manifest(monday).files if "segment.json" in p)
    (monday / path).write_text("{}")
    manifest = snapshot_manifest.read_manifest(monday)
    files = dict(manifest.files)
    files[path] = read_content(monday / path)
    fitting = {n: getattr(manifest, n) for n in manifest.__slots__} | {"files": files}
    snapshot_manifest.write_manifest(monday, snapshot_manifest.SnapshotManifest(**fitting))
    with pytest.raises(RoutingServiceError, match="cannot be opened"):
        local.restore(store, monday, "bible", replacing=True, min_free_bytes=0)
    answers(store.get("bible"))
