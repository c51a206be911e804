from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from router_service.backends.disk import (
    DirectoryLock,
    FreeSpace,
    copy_tree,
    disk_bytes,
    exhaustion,
    keep_room,
    remove_durably,
    remove_tree,
    write_atomically,
)
from router_service.errors import DirectoryInUse, DiskFull, OutOfDescriptors, StorageError

Usage = namedtuple("Usage", "total used free")
GIB = 2**30


@pytest.mark.parametrize(
    ("total", "free", "refused"),
    [
        (10 * GIB, 2 * GIB, False),
        (10 * GIB, GIB - 1, True),  # under 1 GiB
        (100 * GIB, 6 * GIB, False),
        (100 * GIB, 4 * GIB, True),  # under 5 %
    ],
)
def test_the_default_minimum_is_a_gib_or_five_percent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, total: int, free: int, refused: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total, total - free, free))
    if refused:
        with pytest.raises(DiskFull, match="free some space"):
            FreeSpace(tmp_path).require()
    else:
        FreeSpace(tmp_path).require()
    with pytest.raises(DiskFull):
        FreeSpace(tmp_path, min_free_bytes=0).require(extra_bytes=free + 1)


def test_a_copy_has_the_same_bytes_and_the_same_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "below").mkdir(parents=True)
    (source / "below" / "empty").touch()
    with (source / "sparse").open("wb") as file:
        for offset in (0, 5 << 20, 40 << 20):
            file.seek(offset)
            file.write(b"data" * 1000)
        file.truncate(64 << 20)
    with (source / "hole").open("wb") as file:
        file.truncate(1 << 20)
    copy_tree(source, target)
    names = [p.relative_to(source) for p in source.rglob("*") if p.is_file()]
    assert sorted(names) == sorted(p.relative_to(target) for p in target.rglob("*") if p.is_file())
    assert all((source / name).read_bytes() == (target / name).read_bytes() for name in names)
    assert disk_bytes(target) <= max(disk_bytes(source), 1 << 20)


def test_room_for_the_next_writes_is_behind_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "below" / "sparse"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.seek(5 << 20)
        file.write(b"data" * 1000)
        file.truncate(64 << 20)
    before, blocks = path.read_bytes(), path.stat().st_blocks * 512
    keep_room(tmp_path)
    assert path.read_bytes() == before
    assert blocks + (64 << 10) < path.stat().st_blocks * 512 < blocks + (1 << 20)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EMFILE, OutOfDescriptors),
        (errno.ENFILE, OutOfDescriptors),
        (errno.ENOSPC, DiskFull),
        (errno.EACCES, PermissionError),
    ],
)
def test_what_is_used_up_has_a_name_wherever_it_is_noticed(
    number: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind), exhaustion("answer Snapshots"):
        raise OSError(number, os.strerror(number))


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def half_a_write(file: object) -> None:
        file.write(b"ne")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFull):
        write_atomically(path, half_a_write)
    assert path.read_bytes() == b"old"


def test_removing_what_is_not_there(tmp_path: Path) -> None:
    remove_durably(tmp_path / "nothing")
    remove_tree(tmp_path / "nothing")
    assert disk_bytes(tmp_path / "nothing") == 0


def test_a_lock_names_the_directory_and_the_process_that_holds_it(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    with pytest.raises(DirectoryInUse, match=f"{tmp_path}.*process {os.getpid()}.*stop it"):
        DirectoryLock(tmp_path)
    lock.release()
    lock.release()
    DirectoryLock(tmp_path).release()


def test_file_system_errors_are_storage_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        write_atomically(tmp_path / "file" / "below", lambda file: file.write(b""))
    with pytest.raises(StorageError):
        FreeSpace(tmp_path / "missing").require()
