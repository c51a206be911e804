"""pack and unpack: the same snapshot on the other side, and nothing else ever."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from router_service.backends.disk import read_content
from router_service.errors import Busy, DiskFull, InvalidField, SnapshotInvalid, StorageError
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore
from router_service.snapshots import local
from router_service.snapshots.files import exclusive
from router_service.snapshots.local import SnapshotInfo
from router_service.snapshots.manifest import SnapshotManifest, write_manifest
from tests.unit.router_service.numbered_memory import (
    MODEL,
    answers,
    assert_same_answers,
)


@pytest.fixture
def small(fast_dir: Path) -> Path:
    """A snapshot that no engine could open, with a file of each shape: full, ending in zeros, all zeros, empty."""
    path = fast_dir / "small" / "monday"
    (path / "layer-000" / "gen-000000").mkdir(parents=True)
    for name, text, size in SMALL_FILES:
        (path / name).write_bytes(text)
        os.truncate(path / name, size)
    contents = {name: read_content(path / name) for name, _, _ in SMALL_FILES}
    record = MemoryRecord("bible", replace(MODEL, num_layers=1), MemorySettings(), 1)
    write_manifest(path, SnapshotManifest("monday", "1", 2, 3, record, (0,), contents))
    return path


SMALL_FILES = [
    ("layer-000/CURRENT", b"a small file", 12),
    ("layer-000/gen-000000/head", b"head" * 1000, 50_000),
    ("layer-000/gen-000000/zeros", b"", 30_000),
    ("layer-000/gen-000000/empty", b"", 0),
]


@pytest.fixture
def archive(small: Path, fast_dir: Path) -> Path:
    """The small snapshot, packed."""
    local.pack(small, fast_dir / "monday.tar")
    return fast_dir / "monday.tar"


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


def test_there_and_back_again(
    store: MemoryStore, prepared: SnapshotInfo, snapshot_store: Path
) -> None:
    archive = snapshot_store.with_name("monday.tar")
    local.pack(prepared.path, archive)
    assert archive.stat().st_size < 4 * 2**20  # 200 MiB with the zeros
    info = local.unpack(archive, snapshot_store, min_free_bytes=0)
    assert info.path == snapshot_store / "bible" / "monday"
    direct = local.restore(store, prepared.path, "direct", min_free_bytes=0)
    carried = local.restore(store, info.path, "carried", min_free_bytes=0)
    assert_same_answers(answers(carried), answers(direct))


def test_the_same_files_and_the_same_holes(
    small: Path, archive: Path, snapshot_store: Path
) -> None:
    info = local.unpack(archive, snapshot_store, min_free_bytes=0)
    assert files_of(info.path) == files_of(small)
    assert local.verify(info.path) == info
    assert (info.path / "layer-000/gen-000000/zeros").stat().st_blocks == 0
    with pytest.raises(InvalidField, match="not there"):
        local.unpack(archive, snapshot_store, min_free_bytes=0)
    with pytest.raises(InvalidField, match="new file"):
        local.pack(small, archive)


def test_gnu_tar_reads_it(small: Path, archive: Path, fast_dir: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar command here")
    subprocess.run(["tar", "-xf", archive, "-C", fast_dir], check=True)
    assert files_of(fast_dir / "monday") == files_of(small)


def test_a_damaged_snapshot_is_not_packed(small: Path, fast_dir: Path) -> None:
    (small / "layer-000" / "CURRENT").write_text("?")
    with pytest.raises(SnapshotInvalid, match="layer-000/CURRENT"):
        local.pack(small, fast_dir / "x.tar")
    assert not list(fast_dir.glob("x.tar*"))


def test_limits(archive: Path, snapshot_store: Path) -> None:
    with pytest.raises(DiskFull):
        local.unpack(archive, snapshot_store, min_free_bytes=2**60)
    with pytest.raises(SnapshotInvalid, match="raise the limit"):
        local.unpack(archive, snapshot_store, min_free_bytes=0, max_unpacked_bytes=80_000)
    with exclusive(snapshot_store / "bible"), pytest.raises(Busy):
        local.unpack(archive, snapshot_store, min_free_bytes=0)
    with pytest.raises(StorageError, match="cannot read"):
        local.unpack(snapshot_store / "no.tar", snapshot_store)
    assert local.list_snapshots(snapshot_store) == []


def member(name: str, **attributes: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


FOREIGN_MEMBERS = [
    member("/etc/passwd"),
    member("monday/../../x"),
    member("../x"),
    member("monday/layer-000/stranger"),
    member("monday/manifest.json"),
    member("monday/layer-000/CURRENT"),  # once too often
    member("layer-000/CURRENT"),
    member("monday/layer-000/x", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    member("monday/layer-000/x", type=tarfile.LNKTYPE, linkname="monday/layer-000/CURRENT"),
    member("monday/layer-000/x", type=tarfile.CHRTYPE),
    member("monday/layer-000/x", type=tarfile.FIFOTYPE),
    member("monday/layer-000", type=tarfile.DIRTYPE),
]


@pytest.mark.parametrize("foreign", FOREIGN_MEMBERS, ids=lambda m: f"{m.name}-{m.type.decode()}")
def test_what_the_manifest_does_not_name_is_refused(
    archive: Path, snapshot_store: Path, foreign: tarfile.TarInfo
) -> None:
    with tarfile.open(archive, "a") as tar:
        tar.addfile(foreign)
    with pytest.raises(SnapshotInvalid, match="is not a file of its manifest"):
        local.unpack(archive, snapshot_store, min_free_bytes=0)
    assert not list(snapshot_store.rglob("*layer*"))


def repacked(archive: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> None:
    """Writes the archive again, each file as `change` makes it of its name and content; None leaves it out."""
    with tarfile.open(archive) as tar:
        files = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    with tarfile.open(archive, "w") as tar:
        for file in files:
            if changed := change(*file):
                tar.addfile(member(changed[0], size=len(changed[1])), io.BytesIO(changed[1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, c: None if n.endswith("0/CURRENT") else (n, c), "layer-000/CURRENT is missing"),
        (lambda n, c: (n, c[:-1] if n.endswith("0/CURRENT") else c), "CURRENT has 11 bytes"),
        (lambda n, c: (n, c.swapcase() if n.endswith("0/CURRENT") else c), "CURRENT has other"),
        (lambda n, c: None if n.endswith(".json") else (n, c), "does not begin with manifest.json"),
        (lambda n, c: (n.replace("monday", "sunday"), c), "not named after its snapshot"),
        (lambda n, c: (n, c[:-50] if "manifest" in n else c), "manifest.json is damaged"),
    ],
)
def test_other_content_is_refused(
    archive: Path,
    snapshot_store: Path,
    change: Callable[[str, bytes], tuple[str, bytes] | None],
    words: str,
) -> None:
    repacked(archive, change)
    with pytest.raises(SnapshotInvalid, match=words):
        local.unpack(archive, snapshot_store, min_free_bytes=0)
    assert local.list_snapshots(snapshot_store) == []


def test_an_archive_without_sparse_members_is_as_good(archive: Path, snapshot_store: Path) -> None:
    repacked(archive, lambda name, content: (name, content))
    info = local.unpack(archive, snapshot_store, min_free_bytes=0)
    assert local.verify(info.path) == info


def test_a_cut_or_garbled_archive_is_refused_or_harmless(
    small: Path, archive: Path, snapshot_store: Path
) -> None:
    """Harmless: in the padding, or in a field of a header that means nothing here."""
    text, random, refused = archive.read_bytes(), Random(0), 0
    for number in range(80):
        at = random.randrange(len(text)) if number % 2 else 512 * number // 4
        archive.write_bytes(text[:at] + (b"\xff" * 8 + text[at + 8 :] if number % 4 < 3 else b""))
        try:
            info = local.unpack(archive, snapshot_store, min_free_bytes=0)
        except SnapshotInvalid:
            refused += 1
            assert local.list_snapshots(snapshot_store) == []
            continue
        assert files_of(info.path) == files_of(small)
        shutil.rmtree(info.path)
    assert refused > 40


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "pax_headers",
    [
        {"size": "-512"},  # tarfile alone would go round in circles (CVE-2025-8194)
        {"comment": "x" * 200_000},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "-1"},
        {"GNU.sparse.map": "0,-5", "GNU.sparse.size": "9"},
    ],
)
def test_headers_made_to_harm(
    archive: Path, snapshot_store: Path, pax_headers: dict[str, str]
) -> None:
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(
            member("monday/manifest.json", size=512, pax_headers=pax_headers),
            io.BytesIO(bytes(512)),
        )
    with pytest.raises(SnapshotInvalid):
        local.unpack(archive, snapshot_store, min_free_bytes=0)
