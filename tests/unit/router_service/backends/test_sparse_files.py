from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from router_service.backends.disk import copy_file, read_content

MIB = 2**20


def write(path: Path, size: int, *parts: tuple[int, bytes]) -> Path:
    with path.open("wb") as file:
        for offset, text in parts:
            file.seek(offset)
            file.write(text)
        file.truncate(size)
    return path


FILES = [
    (0, []),
    (5 * MIB, []),
    (3, [(0, b"abc")]),
    (5 * MIB, [(0, b"abc")]),
    (5 * MIB, [(3 * MIB - 1, b"abc")]),  # over the edge of a block, with a hole before and after
    (5 * MIB, [(0, b"a"), (MIB + 5, b"\0b\0"), (5 * MIB - 1, b"c")]),
    (3 * MIB + 7, [(0, b"\0" * (3 * MIB + 6) + b"z")]),
]


@pytest.mark.parametrize(("size", "parts"), FILES)
def test_the_sum_is_that_of_the_bytes_before_the_final_zeros(
    tmp_path: Path, size: int, parts: list[tuple[int, bytes]]
) -> None:
    file = write(tmp_path / "file", size, *parts)
    body = file.read_bytes().rstrip(b"\0")
    content = read_content(file)
    assert (content.size_bytes, content.content_bytes) == (size, len(body))
    assert content.sha256 == hashlib.sha256(body).hexdigest()
    stored = write(tmp_path / "stored", size, (0, file.read_bytes()))  # the same without holes
    assert read_content(stored) == content


@pytest.mark.parametrize("fallback", [None, errno.EXDEV, 0])
@pytest.mark.parametrize(("size", "parts"), FILES)
def test_a_copy_has_the_same_bytes_and_no_more_on_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    parts: list[tuple[int, bytes]],
    fallback: int | None,
) -> None:
    def copy_nothing(*_: object) -> int:
        if fallback:
            raise OSError(fallback, "not here")
        return 0

    if fallback is not None:
        monkeypatch.setattr(os, "copy_file_range", copy_nothing)
    file = write(tmp_path / "file", size, *parts)
    copy_file(file, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks <= file.stat().st_blocks
    with pytest.raises(FileExistsError):
        copy_file(file, tmp_path / "copy")


def test_a_copy_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", fail)
    with pytest.raises(OSError, match="full"):
        copy_file(write(tmp_path / "file", 3, (0, b"abc")), tmp_path / "copy")
