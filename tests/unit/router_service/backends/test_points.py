from __future__ import annotations

import numpy as np
import pytest

from router_service.arrays import Entries, Provenance
from router_service.backends.points import payloads_of, provenance_of, value_rows
from router_service.errors import CorruptMemory


def one_entry(provenance: Provenance) -> Entries:
    values = np.array([[1.0, -2.5]], np.float32)
    return Entries(np.array([1], np.uint64), np.ones((1, 2), np.float32), values, [provenance])


def test_defaults_are_not_stored_and_come_back() -> None:
    (payload,) = payloads_of(one_entry(Provenance()), generation=3)
    assert payload == {"value": "AACAPwAAIMA=", "generation": 3}
    assert provenance_of(payload) == Provenance()


def test_all_fields_are_flat() -> None:
    provenance = Provenance("bible", "Genesis 1", 4, 17, 0.25, 1_700_000_000_000, "in the", 3, 6)
    (payload,) = payloads_of(one_entry(provenance), generation=0)
    assert payload == {
        "value": "AACAPwAAIMA=",
        "generation": 0,
        "source": "bible",
        "example": "Genesis 1",
        "position": 4,
        "token": 17,
        "gain": 0.25,
        "created": 1_700_000_000_000,
        "snippet": "in the",
        "token_start": 3,
        "token_end": 6,
    }
    assert provenance_of(payload) == provenance
    np.testing.assert_array_equal(value_rows([payload], 2), [[1.0, -2.5]])


@pytest.mark.parametrize(
    "payload", [{}, {"value": None}, {"value": 3}, {"value": "!"}, {"value": "AACAPw=="}]
)
def test_a_value_that_cannot_be_read_is_corruption(payload: dict[str, object]) -> None:
    with pytest.raises(CorruptMemory):
        value_rows([payload], 2)


def test_no_payloads_no_rows() -> None:
    assert value_rows([], 2).shape == (0, 2)
