"""What the service knows of its writes: after a kill all of it counts, after a loss of power what was flushed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router_service.arrays import U64
from router_service.backends.edge import ledger
from router_service.backends.edge.ledger import Known, Sums, WriteLog, read_log
from router_service.errors import CorruptMemory

BASE = np.array([1, 2, 3], np.uint64)


def ids(*numbers: int) -> U64:
    return np.array(numbers, np.uint64)


def digests(numbers: U64, version: int = 1) -> U64:
    """Some that are no others'."""
    return np.stack([numbers * 1000 + version, numbers * 1000 + 500 + version], axis=1).astype("u8")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the log goes, on a machine that can be started again."""
    (tmp_path / "boot").write_text("first")
    monkeypatch.setattr(ledger, "_BOOT_ID", tmp_path / "boot")
    return tmp_path / "writes.log"


def power_is_lost(path: Path) -> None:
    path.with_name("boot").write_text("second")


def known(path: Path) -> Known:
    return read_log(path, BASE, digests(BASE))


def written(path: Path) -> None:
    """4 is new, 2 is replaced, 1 is deleted; all of it flushed; then 5 is new, 3 is deleted."""
    log = WriteLog(path, len(BASE))
    for numbers, version in ((ids(4), 1), (ids(2), 2)):
        log.begin(numbers, digests(numbers, version), durable=False)
        log.done()
    log.begin(ids(1), None, durable=True)
    log.done()
    log.sync()
    log.flushed()
    log.begin(ids(5), digests(ids(5)), durable=False)
    log.done()
    log.begin(ids(3), None, durable=True)
    log.done()
    log.close()


AFTERWARDS = {2: 2, 4: 1, 5: 1}


def state(versions: dict[int, int]) -> tuple[U64, U64]:
    """Ids and digests of entries by their versions; version 0 is none of theirs."""
    numbers = ids(*sorted(versions))
    rows = [digests(ids(number), versions[number])[0] for number in sorted(versions)]
    return numbers, np.array(rows, np.uint64).reshape(len(rows), 2)


def verdict(
    path: Path, versions: dict[int, int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Changed, missing, unknown and removed ids."""
    damage, removed = known(path).compare(*state(versions))
    return (
        damage.changed.tolist(),
        damage.missing.tolist(),
        damage.unknown.tolist(),
        removed.tolist(),
    )


def test_what_was_written_is_right(path: Path) -> None:
    written(path)
    assert verdict(path, AFTERWARDS) == ([], [], [], [])
    found = known(path)
    assert found.ids.tolist() == [2, 4, 5]
    unread = digests(found.ids) * 0
    assert not found.compare(found.ids, unread)[0]


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({4: 0}, ([4], [], [], [])),
        ({2: 1}, ([2], [], [], [])),  # as it was before
        ({5: None}, ([], [5], [], [])),
        ({1: 1}, ([], [], [1], [])),  # deleted
        ({3: 1}, ([], [], [3], [])),
        ({9: 1}, ([], [], [9], [])),
    ],
)
def test_after_a_kill_all_of_it_must_be_there(
    path: Path, changes: dict[int, int | None], wrong: tuple[list[int], ...]
) -> None:
    written(path)
    now = {number: v for number, v in (AFTERWARDS | changes).items() if v is not None}
    assert verdict(path, now) == wrong


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({4: 0}, ([4], [], [], [])),  # was flushed
        ({2: 1}, ([2], [], [], [])),
        ({1: 1}, ([], [], [], [1])),  # nobody has it any more
        ({5: None}, ([], [], [], [])),  # need not have survived
        ({5: 0}, ([], [], [], [5])),
        ({3: 1}, ([], [], [], [])),
        ({3: 0}, ([], [], [], [3])),
        ({9: 1}, ([], [], [], [9])),  # its record was lost
    ],
)
def test_after_a_loss_of_power_only_what_was_flushed_must_be_there(
    path: Path, changes: dict[int, int | None], wrong: tuple[list[int], ...]
) -> None:
    written(path)
    power_is_lost(path)
    now = {number: v for number, v in (AFTERWARDS | changes).items() if v is not None}
    assert verdict(path, now) == wrong


@pytest.mark.parametrize("version", [1, 2])
def test_a_write_that_was_not_done_may_be_there_or_not(path: Path, version: int) -> None:
    log = WriteLog(path, len(BASE))
    log.begin(ids(2, 7), digests(ids(2, 7), 2), durable=True)
    log.close()
    assert verdict(path, {1: 1, 2: version, 3: 1}) == ([], [], [], [])
    assert verdict(path, {1: 1, 2: version, 3: 1, 7: 2}) == ([], [], [], [])
    assert verdict(path, {1: 1, 2: 0, 3: 1, 7: 0}) == ([2], [], [], [7])


def test_a_damaged_log(path: Path) -> None:
    written(path)
    content = path.read_bytes()
    for byte in range(len(content)):
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :])
        with pytest.raises(CorruptMemory):
            known(path)
    path.write_bytes(content[:-5])
    with pytest.raises(CorruptMemory, match="damaged"):
        known(path)
    power_is_lost(path)
    assert known(path).ids.tolist() == [2, 4, 5]


def test_a_log_of_other_entries(path: Path) -> None:
    WriteLog(path, 7).close()
    with pytest.raises(CorruptMemory, match="is of 7 entries"):
        known(path)


def test_sums_of_files_that_never_change(tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    names = {
        "segments/a/vector_storage/matrix.dat": True,
        "segments/a/id_tracker.deleted": False,
        "segments/a/payload_storage/page_0.dat": False,
        "segments/b/vector_storage/vectors/chunk_0.mmap": False,
        "wal/open-1": False,
        "search_keys.npz": True,
    }
    for name in names:
        (shard / name).parent.mkdir(parents=True, exist_ok=True)
        (shard / name).write_bytes(name.encode())
    Sums.of(shard).save(tmp_path / "sums.json")
    sums = Sums.load(tmp_path / "sums.json")
    assert sums is not None
    assert set(sums.files) == {name for name, fixed in names.items() if fixed}
    everything = Sums.of(shard, sums, everything=True)
    for name, fixed in names.items():
        (shard / name).write_bytes(b"?")
        assert bool(sums.problems(shard, everything=False)) is fixed
        assert everything.problems(shard, everything=True) == [
            f"{name} has other content than was written"
        ]
        (shard / name).write_bytes(name.encode())
    (shard / "segments/a/new").touch()
    assert sums.problems(shard, everything=False) == ["segments/a/new has no sum"]


def test_damaged_sums_are_none(tmp_path: Path) -> None:
    (tmp_path / "shard").mkdir()
    Sums.of(tmp_path / "shard").save(tmp_path / "sums.json")
    text = (tmp_path / "sums.json").read_text()
    for wrong in (text[:-3], text.replace("1", "2", 1), "[]", ""):
        (tmp_path / "sums.json").write_text(wrong)
        assert Sums.load(tmp_path / "sums.json") is None
    assert Sums.load(tmp_path / "nothing") is None
