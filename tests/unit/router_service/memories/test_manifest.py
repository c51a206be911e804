"""The file that says what a memory is: the old one or the new one, and nothing in between."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from router_service.blending import Support
from router_service.errors import CorruptMemory, NewerFormat, StorageError
from router_service.fingerprint import ModelFingerprint
from router_service.memories import manifest
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import MemorySettings

FINGERPRINT = ModelFingerprint("olmoe", 16, 2048, 64, 8, "ab" * 32)
RECORD = MemoryRecord(
    "bible", FINGERPRINT, MemorySettings(gamma=(0.5,), support=Support.TOP_K), 123
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "bible"
    manifest.begin_creation(made)
    manifest.finish_creation(made, RECORD)
    return made


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / manifest.FILE_NAME
    body = json.loads(path.read_text()) | changes
    del body["crc32"]
    path.write_text(json.dumps(body))


def test_round_trip(directory: Path) -> None:
    assert manifest.read_manifest(directory) == RECORD
    assert [path.name for path in directory.iterdir()] == [manifest.FILE_NAME]


@pytest.mark.parametrize(
    "later",
    [
        {},
        {"search_recall": 0.99, "exact_layers": (3,)},
        {"rounds": 1, "round_nll": (4.0, 3.5, 3.25)},
    ],
    ids=["unused", "measured", "boosted"],
)
def test_settings_that_0_1_0_does_not_know_are_written_where_they_say_something(
    directory: Path, later: dict[str, Any]
) -> None:
    record = replace(RECORD, settings=replace(RECORD.settings, **later))
    manifest.write_manifest(directory, record)
    written = json.loads((directory / manifest.FILE_NAME).read_text())["settings"]
    assert written.keys() & set(manifest._SINCE_0_1_0) == later.keys()
    assert manifest.read_manifest(directory) == record


def test_a_manifest_is_replaced(directory: Path) -> None:
    changed = replace(RECORD, settings=replace(RECORD.settings, neighbours=3))
    manifest.write_manifest(directory, changed)
    assert manifest.read_manifest(directory) == changed


def test_a_write_that_fails_leaves_the_old_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        manifest.write_manifest(directory, replace(RECORD, created_unix_ms=9))
    assert manifest.read_manifest(directory) == RECORD


def test_a_creation_is_unfinished_until_its_manifest_is_there(tmp_path: Path) -> None:
    directory = tmp_path / "bible"
    manifest.begin_creation(directory)
    assert manifest.is_unfinished(directory)
    manifest.write_manifest(directory, RECORD)  # a crash may come before the mark is removed
    assert not manifest.is_unfinished(directory)
    manifest.finish_creation(directory, RECORD)
    assert not manifest.is_unfinished(directory)


def test_a_directory_without_a_manifest_is_not_unfinished(directory: Path) -> None:
    (directory / manifest.FILE_NAME).unlink()
    assert not manifest.is_unfinished(directory)
    with pytest.raises(CorruptMemory, match="No such file"):
        manifest.read_manifest(directory)


def test_a_directory_that_is_there_is_not_made_again(directory: Path) -> None:
    with pytest.raises(StorageError, match="File exists"):
        manifest.begin_creation(directory)
    assert manifest.read_manifest(directory) == RECORD


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"text"', "{}", '{"format": 1}', "\x00" * 100, "[" * 100_000],
)
def test_damage(directory: Path, text: str) -> None:
    (directory / manifest.FILE_NAME).write_text(text)
    with pytest.raises(CorruptMemory, match=r"memory\.json cannot be read"):
        manifest.read_manifest(directory)


def test_bytes_that_are_no_text(directory: Path) -> None:
    (directory / manifest.FILE_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptMemory):
        manifest.read_manifest(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"fingerprint": None},
        {"fingerprint": {"architecture": "x"}},
        {"settings": {"kind": "weather"}},
        {"settings": {"colour": 1}},
        {"settings": {"neighbours": 0}},
        {"settings": {"gamma": ["wide"]}},
        {"fingerprint": {**asdict(FINGERPRINT), "num_layers": "many"}},
        {"fingerprint": {**asdict(FINGERPRINT), "top_k": 100}},
        {"created_unix_ms": "soon"},
    ],
)
def test_fields_that_mean_nothing(directory: Path, changes: dict[str, Any]) -> None:
    _edit(directory, **changes)
    with pytest.raises(CorruptMemory):
        manifest.read_manifest(directory)


@pytest.mark.parametrize(
    ("version", "error"), [("9.8.7", NewerFormat), (manifest.__version__, CorruptMemory)]
)
@pytest.mark.parametrize("settings", [{"colour": 1}, {"kind": "weather"}])
def test_what_is_unknown_is_a_later_version_s_when_the_sum_is_right(
    directory: Path, settings: dict[str, Any], version: str, error: type[CorruptMemory]
) -> None:
    """Settings that are left out would give other answers without a word."""
    path = directory / manifest.FILE_NAME
    body = json.loads(path.read_text())
    body |= {"service_version": version, "settings": body["settings"] | settings}
    del body["crc32"]
    path.write_text(json.dumps(body | {"crc32": manifest._sum(body)}))
    with pytest.raises(CorruptMemory) as refused:
        manifest.read_manifest(directory)
    assert type(refused.value) is error
    assert str(next(iter(settings.values()))) in str(refused.value) or "colour" in str(
        refused.value
    )
    assert ("9.8.7" in str(refused.value)) is (error is NewerFormat)


def test_a_copy_is_not_opened_under_another_name(directory: Path) -> None:
    copy = directory.rename(directory.with_name("copy"))
    with pytest.raises(CorruptMemory, match="manifest of memory 'bible', expected 'copy'"):
        manifest.read_manifest(copy)


def test_one_wrong_bit(directory: Path) -> None:
    path = directory / manifest.FILE_NAME
    text = path.read_bytes()
    read = manifest.read_manifest(directory)
    for byte in range(len(text)):
        path.write_bytes(text[:byte] + bytes([text[byte] ^ 1]) + text[byte + 1 :])
        with suppress(CorruptMemory):  # else it was white space, or the name of the sum
            assert manifest.read_manifest(directory) == read
