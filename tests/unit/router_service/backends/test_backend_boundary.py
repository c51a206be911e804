"""No exception of the engine or of the file system leaves as it came."""

from __future__ import annotations

import errno
import inspect
from pathlib import Path

import numpy as np
import pytest

from router_service.arrays import Entries, Provenance
from router_service.backends.base import (
    CollectionSpec,
    Compression,
    Metric,
    SearchOptions,
)
from router_service.backends.disk import storage_call
from router_service.backends.edge import engine
from router_service.backends.edge.engine import EngineShard
from router_service.backends.points import Record
from router_service.errors import (
    CorruptMemory,
    DirectoryInUse,
    DiskFull,
    InvalidField,
    OutOfDescriptors,
    RoutingServiceError,
    StorageError,
)

SPEC = CollectionSpec(4, Metric.EUCLID, 2)
THREE = Entries(
    np.arange(3, dtype=np.uint64),
    np.ones((3, 4), np.float32),
    np.ones((3, 2), np.float32),
    [Provenance()] * 3,
)


class PanicError(BaseException):
    """Like pyo3's PanicException: not an Exception."""


def raised(error: BaseException, *, opening: bool = False) -> BaseException:
    with pytest.raises(BaseException) as caught, storage_call("open /data/x", opening=opening):  # noqa: PT011
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Exception("Service runtime error: boom"), StorageError),
        (PanicError("index out of bounds"), StorageError),
        (Exception("Can't init WAL: Kind(WouldBlock)"), DirectoryInUse),
        (Exception("IO error: No space left on device (os error 28)"), DiskFull),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.EDQUOT, "Quota exceeded"), DiskFull),
        (Exception("Too many open files (os error 24)"), OutOfDescriptors),
        (OSError(errno.EMFILE, "Too many open files"), OutOfDescriptors),
        (OSError(errno.ENFILE, "Too many open files in system"), OutOfDescriptors),
        (PermissionError(errno.EACCES, "Permission denied"), StorageError),
        (TypeError("a str is not a float"), StorageError),
        (MemoryError(), StorageError),
    ],
)
def test_every_error_becomes_one_storage_error(
    error: BaseException, expected: type[StorageError]
) -> None:
    found = raised(error)
    assert type(found) is expected
    assert "/data/x" in str(found)
    assert found.__cause__ is error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Exception("Failed to read segment"), CorruptMemory),
        (PanicError("index out of bounds"), CorruptMemory),
        (FileNotFoundError(errno.ENOENT, "No such file"), CorruptMemory),
        (Exception("Too many open files (os error 24)"), OutOfDescriptors),
        (Exception("Can't init WAL: Os { code: 24, kind: TooManyOpenFiles }"), OutOfDescriptors),
        (PermissionError(errno.EACCES, "Permission denied"), StorageError),
        (Exception("Can't init WAL: Kind(WouldBlock)"), DirectoryInUse),
    ],
)
def test_files_that_cannot_be_opened_are_damaged_unless_the_cause_lies_elsewhere(
    error: BaseException, expected: type[StorageError]
) -> None:
    assert type(raised(error, opening=True)) is expected


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(2), DiskFull("x"), InvalidField("k", 0, "1 or more")]
)
def test_what_is_no_engine_failure_passes_unchanged(error: BaseException) -> None:
    assert raised(error) is error


class BrokenEngine:
    """Fails in whatever it is asked to do."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, name: str) -> object:
        raise self._error


def engine_calls(shard: EngineShard, directory: Path) -> dict[str, object]:
    """How each public method of EngineShard is called; the test below fails when one is missing here."""
    return {
        "create": lambda: EngineShard.create(directory / "new", SPEC),
        "load": lambda: EngineShard.load(directory, SPEC, Compression()),
        "load_as_it_is": lambda: EngineShard.load_as_it_is(directory, SPEC),
        "pages": lambda: list(shard.pages(2, payloads=True)),
        "put": lambda: shard.put([Record(1, {}, [0.0] * SPEC.dimension)]),
        "upsert": lambda: shard.upsert(THREE, 0),
        "delete": lambda: shard.delete(THREE.ids),
        "search": lambda: shard.search(THREE.keys, 1, SearchOptions(), [None] * 3),
        "scroll": lambda: shard.scroll(None, 1),
        "retrieve": lambda: shard.retrieve(THREE.ids),
        "counts": lambda: shard.counts(0),
        "ids": shard.ids,
        "audit": lambda: shard.audit(THREE.ids, 0, keys=True),
        "problems": shard.problems,
        "optimize": shard.optimize,
        "flush": shard.flush,
        "close": shard.close,
    }


PUBLIC = [name for name, _ in inspect.getmembers(EngineShard, callable) if not name.startswith("_")]


@pytest.mark.parametrize("error", [Exception("boom"), PanicError("boom")])
@pytest.mark.parametrize("method", PUBLIC)
def test_no_engine_call_lets_a_foreign_exception_out(
    method: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = EngineShard(BrokenEngine(error), tmp_path, SPEC)
    monkeypatch.setattr(engine.qe, "EdgeShard", BrokenEngine(error))
    with pytest.raises(StorageError, match="boom"):
        engine_calls(shard, tmp_path)[method]()  # type: ignore[operator]


def test_requests_that_the_engine_cannot_represent_are_storage_errors(tmp_path: Path) -> None:
    shard = EngineShard.create(tmp_path / "shard", SPEC)
    with pytest.raises(StorageError):
        shard.search(np.ones((1, 4), np.float32), -1, SearchOptions(), [None])
    shard.close()


def test_a_real_panic_of_the_engine_is_a_storage_error(tmp_path: Path) -> None:
    directory = tmp_path / "shard"
    shard = EngineShard.create(directory, SPEC)
    shard.upsert(THREE, 0)
    shard.flush()
    shard.close()
    (status,) = directory.glob("segments/*/vector_storage/vectors/status.dat")
    status.write_bytes(status.read_bytes()[: status.stat().st_size // 2])
    with pytest.raises(CorruptMemory) as caught:
        EngineShard.load(directory, SPEC, Compression())
    assert not isinstance(caught.value.__cause__, Exception)


def test_a_second_opener_of_a_shard_is_told_who_is_in_the_way(tmp_path: Path) -> None:
    shard = EngineShard.create(tmp_path / "shard", SPEC)
    with pytest.raises(DirectoryInUse, match="another process has it open") as caught:
        EngineShard.load(tmp_path / "shard", SPEC, Compression())
    assert str(tmp_path / "shard") in str(caught.value)
    shard.close()


def test_storage_errors_are_routing_service_errors() -> None:
    assert issubclass(StorageError, RoutingServiceError)
