"""Checks of arrays that come from outside: width, finiteness, index ranges. Each names the field and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router_service.arrays import (
    F32,
    I32,
    MAX_ENTRY_ID,
    U64,
    AnyArray,
    Assignment,
    Bool,
    Provenance,
)
from router_service.errors import InvalidField, InvalidTensor, NotFinite, WidthMismatch

MAX_TEXT = 1024
MAX_TIME_MS = 2**63 - 1  # engines store numbers in 64 bits with a sign


def require_matrix(field: str, array: AnyArray, rows: int | None, columns: int, of: str) -> None:
    """Raises unless the shape is [rows or >= 1, columns]; `of` says what fixes the width.

    WidthMismatch when only the width is wrong (another model), else InvalidTensor.
    """
    one_each = array.ndim == 2 and len(array) > 0 and rows in (None, len(array))
    if one_each and array.shape[1] == columns:
        return
    got = f"shape {list(array.shape)}"
    wanted = f"shape [{'T >= 1' if rows is None else rows}, {columns}] ({of})"
    raise (WidthMismatch if one_each else InvalidTensor)(field, got, wanted)


def require_finite(field: str, rows: F32) -> None:
    """Raises NotFinite unless every row [n, d] is finite and so is its squared norm in f32."""
    if np.isfinite(
        np.vdot(rows, rows)
    ):  # then each row's is, too; a quarter of the time that all norms take
        return
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.einsum("nd,nd->n", rows, rows)
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        row = rows[bad[0]]
        broken = np.flatnonzero(~np.isfinite(row))
        column = int(broken[0]) if len(broken) else int(np.abs(row).argmax())
        expected = "finite numbers whose squared norm is finite in f32"
        raise NotFinite(f"{field}[{bad[0]}][{column}]", float(row[column]), expected)


def require_assignment(field: str, assignment: Assignment, num_experts: int) -> None:
    """Raises unless experts are in [0, N), weights finite and not negative, and no token's weights are all zero."""
    experts, weights = assignment.experts, assignment.weights
    within = (experts >= 0) & (experts < num_experts)
    _require_all(f"{field}.experts", experts, within, f"expert numbers from 0 to {num_experts - 1}")
    require_finite(f"{field}.weights", weights)
    _require_all(f"{field}.weights", weights, weights >= 0, "weights of 0 or more")
    empty = np.flatnonzero(~(weights > 0).any(axis=1))
    if len(empty):
        raise InvalidField(
            f"{field}.weights[{empty[0]}]", "all zero", "at least one weight above 0"
        )


def _require_all(field: str, values: F32 | I32, ok: Bool, expected: str) -> None:
    if not ok.all():
        row, column = np.argwhere(~ok)[0]
        raise InvalidField(f"{field}[{row}][{column}]", values[row, column].item(), expected)


def require_ids(field: str, ids: U64) -> None:
    """Raises InvalidField on ids of 2^63 and above and on ids named twice."""
    too_large = np.flatnonzero(ids > MAX_ENTRY_ID)
    if len(too_large):
        row = too_large[0]
        raise InvalidField(f"{field}[{row}]", int(ids[row]), "ids below 2^63")
    unique, first = np.unique(ids, return_index=True)
    if len(unique) != len(ids):
        row = int(np.setdiff1d(np.arange(len(ids)), first)[0])
        raise InvalidField(f"{field}[{row}]", int(ids[row]), "each id once per request")


def require_provenance(provenance: Sequence[Provenance], entries: int) -> None:
    """Raises InvalidField unless there is one per entry, with short, printable names."""
    if len(provenance) != entries:
        raise InvalidField(
            "entries.provenance", len(provenance), f"none or {entries} (one per entry)"
        )
    for number, origin in enumerate(provenance):
        for name in ("source", "example", "snippet"):
            require_text(f"entries.provenance[{number}].{name}", getattr(origin, name))
        if not np.isfinite(origin.gain):
            raise NotFinite(
                f"entries.provenance[{number}].gain", origin.gain, "a finite number of nats"
            )
        if origin.created_unix_ms > MAX_TIME_MS:
            raise InvalidField(
                f"entries.provenance[{number}].created_unix_ms",
                origin.created_unix_ms,
                f"milliseconds since 1970, at most {MAX_TIME_MS}",
            )
        if not origin.token_start <= origin.token_end <= len(origin.snippet):
            raise InvalidField(
                f"entries.provenance[{number}].token_start, token_end",
                f"{origin.token_start}, {origin.token_end}",
                f"a part of the snippet, which has {len(origin.snippet)} characters",
            )


def require_text(field: str, text: str) -> None:
    """Raises InvalidField on text that is too long or cannot be stored (NUL)."""
    if len(text) > MAX_TEXT:
        raise InvalidField(field, f"{len(text)} characters", f"at most {MAX_TEXT} characters")
    if "\x00" in text:
        raise InvalidField(field, text, "text without NUL characters")


def require_fraction(field: str, value: float) -> None:
    """Raises InvalidField unless 0 < value < 1."""
    if not 0 < value < 1:
        raise InvalidField(field, value, "a number between 0 and 1, both excluded")
