from __future__ import annotations

import numpy as np

from router_service.arrays import NO_ID
from router_service.retention.run import Ledger


def rows(*numbers: int) -> np.ndarray:
    mask = np.zeros(5, np.bool_)
    mask[list(numbers)] = True
    return mask


def ledger() -> Ledger:
    """Policy 1 drops rows 0 to 2 (the best is row 1), then policy 0 rows 2 and 3."""
    made = Ledger(np.array([10, 20, 30, 40, 50], np.uint64))
    made.drop(1, rows(0, 1, 2), np.array([1.0, 3.0, 2.0, 0.0, 0.0]))
    made.drop(0, rows(2, 3), np.array([0.0, 0.0, 9.0, 9.0, 0.0]))
    return made


def test_reasons_add_up() -> None:
    assert ledger().reasons.tolist() == [2, 2, 3, 1, 0]
    assert ledger().dropped_by(0).tolist() == [False, False, True, True, False]
    assert not ledger().dropped_by(-1).any()


def test_unknown_ids_are_not_kept() -> None:
    made = Ledger(np.array([10, 20], np.uint64))
    ids = np.array([[10, 15], [NO_ID, 20]], np.uint64)
    assert made.keeps(ids).tolist() == [[True, False], [False, True]]
    assert not Ledger(np.empty(0, np.uint64)).keeps(ids).any()
    assert ledger().keeps(np.array([10, 40, 50], np.uint64)).tolist() == [False, False, True]


def test_the_last_policy_is_undone_first_and_the_best_entries_come_first() -> None:
    back = []
    for least in range(1, 7):
        made = ledger()
        assert made.rescue(least, -1) == min(least, 5) - 1
        back.append(np.flatnonzero(made.kept).tolist())
    assert back == [[4], [3, 4], [1, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_some_drops_stand() -> None:
    made = ledger()
    assert made.rescue(5, 0) == 2
    assert made.kept.tolist() == [True, True, False, False, True]
