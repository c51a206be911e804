"""Checks name the field, the place and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from router_service import checks
from router_service.arrays import Assignment, Provenance
from router_service.errors import (
    InvalidField,
    InvalidRequest,
    InvalidTensor,
    NotFinite,
    WidthMismatch,
)


def matrix(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, np.float32)


def ids(*numbers: int) -> NDArray[np.uint64]:
    return np.array(numbers, np.uint64)


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((), InvalidTensor),
        ((4,), InvalidTensor),
        ((2, 2, 4), InvalidTensor),
        ((0, 4), InvalidTensor),
        ((3, 4), InvalidTensor),
        ((2, 5), WidthMismatch),
        ((2, 0), WidthMismatch),
    ],
)
def test_shapes(shape: tuple[int, ...], error: type[InvalidRequest]) -> None:
    with pytest.raises(error, match=r"x: got .*shape \[.*expected shape \[2, 4\] \(d\)"):
        checks.require_matrix("x", matrix(*shape), 2, 4, "d")


def test_any_number_of_rows() -> None:
    checks.require_matrix("x", matrix(7, 4), None, 4, "d")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e19])
def test_finite_rows(value: float) -> None:
    rows = matrix(3, 4)
    checks.require_finite("x", rows)
    rows[1, 2] = value
    with pytest.raises(NotFinite) as caught:
        checks.require_finite("x", rows)
    assert caught.value.field == "x[1][2]"


def test_a_row_whose_norm_alone_overflows() -> None:
    rows = np.full((1, 4), 1.5e19, np.float32)
    with pytest.raises(NotFinite, match="squared norm"):
        checks.require_finite("x", rows)


@pytest.mark.parametrize(
    ("expert", "weight", "field"),
    [
        (8, 0.5, "a.experts[1][1]"),
        (-1, 0.5, "a.experts[1][1]"),
        (0, -0.5, "a.weights[1][1]"),
        (0, np.nan, "a.weights[1][1]"),
        (0, np.inf, "a.weights[1][1]"),
        (0, 3e38, "a.weights[1][1]"),
    ],
)
def test_assignments(expert: int, weight: float, field: str) -> None:
    experts, weights = np.zeros((2, 2), np.int32), matrix(2, 2)
    checks.require_assignment("a", Assignment(experts, weights), 8)
    experts[1, 1], weights[1, 1] = expert, weight
    with pytest.raises(InvalidRequest) as caught:
        checks.require_assignment("a", Assignment(experts, weights), 8)
    assert caught.value.field == field


def test_a_token_without_weight() -> None:
    weights = np.array([[0.5, 0], [0, 0]], np.float32)
    with pytest.raises(InvalidField, match=r"a\.weights\[1\]: got 'all zero'"):
        checks.require_assignment("a", Assignment(np.zeros((2, 2), np.int32), weights), 8)


def test_ids() -> None:
    checks.require_ids("ids", ids(0, 2**63 - 1, 5))
    with pytest.raises(InvalidField, match=r"ids\[1\]: got 9223372036854775808, .*below 2\^63"):
        checks.require_ids("ids", ids(0, 2**63))
    with pytest.raises(InvalidField, match=r"ids\[3\]: got 7, expected each id once"):
        checks.require_ids("ids", ids(7, 1, 2, 7))


_ENDS = "entries.provenance[1].token_start, token_end"


@pytest.mark.parametrize(
    ("origin", "field"),
    [
        (Provenance(source="x" * 1025), "entries.provenance[1].source"),
        (Provenance(example="a\0"), "entries.provenance[1].example"),
        (Provenance(gain=float("nan")), "entries.provenance[1].gain"),
        (Provenance(created_unix_ms=2**63), "entries.provenance[1].created_unix_ms"),
        (Provenance(snippet="x" * 1025), "entries.provenance[1].snippet"),
        (Provenance(snippet="abc", token_end=4), _ENDS),
        (Provenance(snippet="abc", token_start=3, token_end=2), _ENDS),
    ],
)
def test_provenance(origin: Provenance, field: str) -> None:
    checks.require_provenance([Provenance(), Provenance()], 2)
    with pytest.raises(InvalidRequest) as caught:
        checks.require_provenance([Provenance(), origin], 2)
    assert caught.value.field == field
    assert len(str(caught.value)) < 300


def test_provenance_of_too_few() -> None:
    with pytest.raises(InvalidField, match="got 1, expected none or 2"):
        checks.require_provenance([Provenance()], 2)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 2.0, float("nan"), float("inf")])
def test_fractions(value: float) -> None:
    checks.require_fraction("q", 0.5)
    with pytest.raises(InvalidField, match="between 0 and 1"):
        checks.require_fraction("q", value)
