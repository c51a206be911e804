"""What lies on disk: the pointer, leftovers of crashes, saved value tables, locks, full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router_service import __version__
from router_service.arrays import Entries, Provenance
from router_service.backends.base import Compression, Quantization
from router_service.backends.edge import generation
from router_service.backends.edge.backend import EdgeBackend, EdgeCollection
from router_service.backends.edge.engine import EngineShard, forget_configuration
from router_service.backends.edge.files import CollectionFiles
from router_service.errors import CorruptMemory, DirectoryInUse, DiskFull, NewerFormat, StorageError
from tests.unit.router_service.backends.numbered_entries import SPEC, assert_holds, numbered_entries

Usage = namedtuple("Usage", "total used free")


def values_file(data_dir: Path, generation: int = 0) -> Path:
    return data_dir / "layer" / f"gen-{generation:06d}" / "values.npz"


def test_current_says_what_the_collection_holds(collection: EdgeCollection, data_dir: Path) -> None:
    assert json.loads((data_dir / "layer" / "CURRENT").read_text()) == {
        "format": 1,
        "service_version": __version__,
        "generation": 0,
        "dimension": 8,
        "metric": "euclid",
        "value_width": 3,
        "quantization": "none",
    }


def test_what_no_entry_has_any_more_is_no_damage(
    edge: EdgeBackend, collection: EdgeCollection
) -> None:
    """The engine goes on counting sources that are gone, as 0, until it is opened again."""
    entries = numbered_entries(0, 30)
    collection.upsert(entries)
    collection.upsert(replace(entries, provenance=[Provenance("t", "x")] * 30))
    collection.delete(entries.ids[:20])
    collection.verify()
    assert collection.info().damage == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"format": 2}', b"\xff\xfe", b'{"format": 1, "metric": 3}'],
)
def test_a_damaged_pointer_is_corruption(
    edge: EdgeBackend, collection: EdgeCollection, data_dir: Path, content: bytes
) -> None:
    collection.close()
    (data_dir / "layer" / "CURRENT").write_bytes(content)
    with pytest.raises(CorruptMemory, match="CURRENT"):
        edge.open("layer", SPEC)


def test_files_of_a_later_engine_are_refused_with_both_versions(
    edge: EdgeBackend, collection: EdgeCollection, data_dir: Path
) -> None:
    collection.upsert(numbered_entries(0, 3))
    collection.close()
    versions = list((data_dir / "layer").rglob("version.info"))
    for path in versions:
        path.write_text("99.0.0")
    with pytest.raises(NewerFormat, match=r"99\.0\.0 of the engine.* reads up to \d.* start the"):
        edge.open("layer", SPEC)
    assert versions


def test_a_missing_generation_is_corruption(
    edge: EdgeBackend, collection: EdgeCollection, data_dir: Path
) -> None:
    collection.close()
    shutil.rmtree(data_dir / "layer" / "gen-000000")
    with pytest.raises(CorruptMemory):
        edge.open("layer", SPEC)


def test_leftovers_of_a_crash_are_removed_on_open(
    edge: EdgeBackend, collection: EdgeCollection, data_dir: Path
) -> None:
    collection.close()
    shutil.copytree(data_dir / "layer" / "gen-000000", data_dir / "layer" / "gen-000001")
    (data_dir / "layer" / "CURRENT.partial").write_bytes(b'{"form')
    again = edge.open("layer", SPEC)
    assert sorted(p.name for p in (data_dir / "layer").iterdir()) == ["CURRENT", "gen-000000"]
    assert_holds(again, 600)


def test_a_creation_that_was_cut_short_can_be_repeated(edge: EdgeBackend, data_dir: Path) -> None:
    (data_dir / "layer" / "gen-000000" / "shard" / "segments").mkdir(parents=True)
    with pytest.raises(CorruptMemory, match="no collection"):
        edge.open("layer", SPEC)
    assert edge.create("layer", SPEC).info().entries == 0


def test_a_dropped_collection_leaves_nothing(
    edge: EdgeBackend, collection: EdgeCollection, data_dir: Path
) -> None:
    collection.close()
    edge.drop("layer")
    assert [p.name for p in data_dir.iterdir()] == ["LOCK"]


# -- the saved value table --------------------------------------------------------------------


def test_the_value_table_is_there_only_while_it_is_complete(
    edge: EdgeBackend, collection: EdgeCollection, data_dir: Path
) -> None:
    assert not values_file(data_dir).exists()
    collection.close()
    assert values_file(data_dir).exists()
    again = edge.open("layer", SPEC)
    assert_holds(again, 600)
    assert values_file(data_dir).exists()
    again.upsert(numbered_entries(600, 601))
    assert not values_file(data_dir).exists()
    again.close()
    assert_holds(edge.open("layer", SPEC), 601)


def test_a_saved_table_spares_reading_the_payloads(
    edge: EdgeBackend, collection: EdgeCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.close()
    monkeypatch.setattr(EngineShard, "scroll", None)
    edge.open("layer", SPEC)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not a zip"])
def test_without_an_intact_table_the_engine_is_read(
    edge: EdgeBackend, collection: EdgeCollection, data_dir: Path, content: bytes | None
) -> None:
    collection.close()
    values_file(data_dir).unlink()
    if content is not None:
        values_file(data_dir).write_bytes(content)
    assert_holds(edge.open("layer", SPEC), 600)


def test_entries_that_vanished_while_closed_are_noticed(
    edge: EdgeBackend, collection: EdgeCollection, data_dir: Path
) -> None:
    collection.close()
    path = values_file(data_dir)
    table = generation.ValueTable.load(path, 3)
    assert table is not None
    table.with_rows(np.array([9999], np.uint64), np.ones((1, 3), np.float32)).save(path)
    with pytest.raises(CorruptMemory, match="600 entries, 601 when it was closed"):
        edge.open("layer", SPEC)
    path.unlink()
    assert_holds(edge.open("layer", SPEC), 600)


def test_a_failed_update_leaves_values_that_fit_the_engine(
    collection: EdgeCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    upsert = EngineShard.upsert

    def half(shard: EngineShard, entries: Entries, generation: int) -> None:
        upsert(shard, entries, generation)
        raise StorageError("the disk failed after the write")

    monkeypatch.setattr(EngineShard, "upsert", half)
    with pytest.raises(StorageError, match="after the write"):
        collection.upsert(numbered_entries(600, 610))
    monkeypatch.undo()
    assert_holds(collection, 610)


# -- locks ------------------------------------------------------------------------------------


def test_a_second_backend_is_refused_with_the_directory_and_the_remedy(
    edge: EdgeBackend, data_dir: Path
) -> None:
    with pytest.raises(DirectoryInUse, match=f"{data_dir}.*another data directory"):
        EdgeBackend(data_dir)
    script = (
        "import sys; from pathlib import Path\n"
        "from router_service.backends.edge.backend import EdgeBackend\n"
        "from router_service.errors import DirectoryInUse\n"
        "try: EdgeBackend(Path(sys.argv[1]))\n"
        "except DirectoryInUse: sys.exit(42)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script, str(data_dir)], check=False).returncode == 42
    )
    edge.close()
    EdgeBackend(data_dir).close()


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        EdgeBackend(tmp_path / "file" / "data")


# -- full disks -------------------------------------------------------------------------------


def test_a_nearly_full_disk_refuses_writes_and_nothing_else(
    collection: EdgeCollection, edge: EdgeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 11, -1))
    with pytest.raises(DiskFull):
        collection.upsert(numbered_entries(600, 700))
    with pytest.raises(DiskFull):
        collection.optimize(Compression())
    with pytest.raises(DiskFull):
        edge.create("other", SPEC)
    assert_holds(collection, 600)
    collection.flush()
    collection.close()
    monkeypatch.undo()
    assert_holds(edge.open("layer", SPEC), 600)


def test_without_room_for_its_log_a_deletion_is_refused_and_not_the_end(
    collection: EdgeCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(10, dtype=np.uint64)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 11, -1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskFull, match="keep room for the next writes"):
            collection.delete(ids)
    assert_holds(collection, 600)
    assert collection.delete(ids) == 10


def test_free_disk_is_asked_for_once_per_upsert(
    collection: EdgeCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: calls.append(path) or Usage(9, 0, 9))
    collection.upsert(numbered_entries(600, 3000))
    assert len(calls) == 1


# -- what the engine's configuration must keep doing --------------------------------------------


def test_dropping_a_quantization_needs_the_configuration_forgotten(tmp_path: Path) -> None:
    """Guards forget_configuration: when the engine learns to do without, it can go."""
    spec = replace(SPEC, value_width=0)
    shard = EngineShard.create(tmp_path / "s", spec)
    shard.close()
    for wanted, forget, found in [
        ("int8", False, True),
        ("none", False, True),
        ("none", True, False),
    ]:
        if forget:
            forget_configuration(tmp_path / "s")
        EngineShard.load(tmp_path / "s", spec, Compression(Quantization(wanted))).close()
        config = json.loads((tmp_path / "s" / "edge_config.json").read_text())
        assert bool(config.get("quantization_config")) is found


def test_search_keys_that_were_made_anew_are_no_damage(data_dir: Path, tmp_path: Path) -> None:
    with closing(EdgeBackend(data_dir, min_free_bytes=0)) as backend:
        collection = backend.create("layer", SPEC)
        collection.upsert(numbered_entries(0, 600))
        for label in ("pca4", "pca6", "random3", "float16"):
            collection.optimize(Compression.parse(label))
            collection.verify()
            killed = tmp_path / label
            shutil.copytree(data_dir, killed)
            with closing(EdgeBackend(killed, min_free_bytes=0)) as after:
                assert len(after.open("layer", SPEC).scroll(None, 700)) == 600


def test_a_log_of_writes_does_not_grow_without_end(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_LONG_LOG_BYTES", 2000)
    monkeypatch.setattr(generation, "_LOG_BYTES_PER_ENTRY", 1)
    with closing(EdgeBackend(data_dir, min_free_bytes=0)) as backend:
        collection = backend.create("layer", SPEC)
        collection.upsert(numbered_entries(0, 50))
        log = CollectionFiles(data_dir, "layer").log(0)
        for _ in range(5):
            for start in range(0, 50, 5):
                collection.upsert(numbered_entries(0, 50).slice(start, start + 5))
                assert log.stat().st_size < 3000
        killed = tmp_path / "killed"
        shutil.copytree(data_dir, killed)
        with closing(EdgeBackend(killed, min_free_bytes=0)) as after:
            assert_holds(after.open("layer", SPEC), 50)
        collection.verify()
