"""Hits are counted, saved and read again; what cannot be read counts as nothing and stops nobody."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from router_service.arrays import NO_ID, HitCounts
from router_service.memories import hit_counts
from router_service.memories.hit_counts import HitCounter, HitSummary


def _note(counter: HitCounter, *ids: int, similarity: float = 1.0, read: bool = True) -> None:
    found = np.array([ids], np.uint64)
    counter.note(found, np.full(found.shape, similarity, np.float32), np.array([read]))


def _counts(counter: HitCounter) -> dict[int, int]:
    counts = counter.counts()
    return dict(zip(counts.ids.tolist(), counts.hits.tolist(), strict=True))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hits-000.npz"


def test_near_neighbours_of_tokens_that_were_changed_count() -> None:
    counter = HitCounter()
    ids = np.array([[1, 2, NO_ID], [1, 3, 4]], np.uint64)
    similarities = np.array([[1.0, 0.01, 0.0], [0.5, 0.0099, 1.0]], np.float32)
    counter.note(ids, similarities, np.array([True, True]))
    counter.note(ids, similarities, np.array([False, True]))
    assert _counts(counter) == {1: 3, 2: 1, 4: 2}
    assert counter.summary() == HitSummary(6, 3)


def test_nothing_noted() -> None:
    counter = HitCounter()
    _note(counter, 1, similarity=0)
    _note(counter, 1, read=False)
    assert counter.summary() == HitSummary(0, 0)


def test_many_hits_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hit_counts, "_MOST_PENDING", 10)
    counter = HitCounter()
    for number in range(50):
        _note(counter, number % 3, 7)
        assert counter._pending_ids <= 10
    assert _counts(counter) == {0: 17, 1: 17, 2: 16, 7: 50}


def test_reports_are_known_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hit_counts, "_CLIENTS", 2)
    counter = HitCounter.load(path)
    for client, number in (("a", 1), ("b", 2**63), ("a", 2), ("c", 5)):
        assert not counter.has_report(client, number)
        counter.add_report(client, number, HitCounts.of({4: 2}))
    counter.save()
    later = HitCounter.load(path)
    later.go_on_from(HitCounter())
    assert _counts(later) == {4: 8}
    assert later.has_report("a", 2)
    assert later.has_report("a", 1)
    assert not later.has_report("a", 3)
    assert not later.has_report("b", 2**63)  # who has not reported for long


def test_saved_and_read_again(path: Path) -> None:
    counter = HitCounter.load(path)
    _note(counter, 5, 3)
    counter.save()
    _note(counter, 3)
    assert _counts(HitCounter.load(path)) == {3: 1, 5: 1}
    counter.save()
    assert _counts(HitCounter.load(path)) == {3: 2, 5: 1}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_nothing_new_is_not_written(path: Path) -> None:
    counter = HitCounter.load(path)
    counter.save()
    assert not path.exists()
    _note(counter, 1)
    counter.save()
    path.unlink()
    counter.save()
    assert not path.exists()


def test_deleted_entries_are_forgotten(path: Path) -> None:
    counter = HitCounter.load(path)
    _note(counter, 1, 2, 3)
    counter.forget(np.array([2, 9], np.uint64))
    assert _counts(counter) == {1: 1, 3: 1}
    counter.save()
    assert _counts(HitCounter.load(path)) == {1: 1, 3: 1}


def test_removed(path: Path) -> None:
    counter = HitCounter.load(path)
    _note(counter, 1)
    counter.save()
    counter.remove()
    _note(counter, 1)
    counter.save()
    assert not path.exists()


def test_a_damaged_file_counts_from_zero(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counter = HitCounter.load(path)
    _note(counter, *range(50))
    counter.save()
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for cut in rng.integers(0, len(whole), 40):
        path.write_bytes(whole[:cut])
        assert HitCounter.load(path).summary() == HitSummary(0, 0)
    assert "counting hits from 0" in caplog.text
    for place in rng.integers(
        0, len(whole), 400
    ):  # a flip that zip does not notice changes nothing
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        assert HitCounter.load(path).summary() in (HitSummary(0, 0), HitSummary(50, 50))


@pytest.mark.parametrize(
    "columns",
    [
        {"ids": np.array([2, 1], np.uint64), "hits": np.array([1, 1])},
        {"ids": np.array([1, 2], np.uint64), "hits": np.array([1, -1])},
        {"ids": np.array([1, 2], np.uint64), "hits": np.array([1])},
        {"ids": np.array([1, 2]), "hits": np.array([1, 1])},
        {"ids": np.array([{}], object), "hits": np.array([1])},
        {"other": np.array([1])},
    ],
)
def test_other_files_count_from_zero(path: Path, columns: dict[str, np.ndarray]) -> None:
    np.savez(path, **columns)
    assert HitCounter.load(path).summary() == HitSummary(0, 0)


def test_a_file_that_cannot_be_written_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counter = HitCounter(tmp_path / "not there" / "hits.npz")
    _note(counter, 1)
    with caplog.at_level(logging.WARNING):
        counter.save()
    assert "hit counts are not saved" in caplog.text
    (tmp_path / "not there").mkdir()
    counter.save()
    assert _counts(HitCounter.load(tmp_path / "not there" / "hits.npz")) == {1: 1}
