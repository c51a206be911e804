"""Upsert requests: small enough, in order, complete; and the rows of entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from knnmoe import tensors
from knnmoe.v1.memory_admin_pb2 import DURABILITY_FSYNC, DURABILITY_PROCESS
from knnmoe.v1.types_pb2 import Provenance

from model_runner.architectures import Assignment
from model_runner.memory_builder.entries import (
    ENTRIES_PER_REQUEST,
    REQUEST_BYTES,
    Destination,
    LayerEntries,
    upsert_requests,
)

TO = Destination("law", "d1gest")


def entries_of(number: int, width: int, assignment: bool = False) -> LayerEntries:
    """Entry i has id and position i."""
    values: Assignment | torch.Tensor = torch.randn(number, 4)
    if assignment:
        values = Assignment(torch.rand(number, 2), torch.randint(0, 4, (number, 2)))
    return LayerEntries(
        layer=3,
        ids=np.arange(number, dtype=np.uint64),
        keys=torch.randn(number, width),
        values=values,
        provenance=[Provenance(source="f", example="1", position=i) for i in range(number)],
    )


@pytest.mark.parametrize("assignment", [False, True])
@pytest.mark.parametrize(("number", "width"), [(0, 8), (1, 8), (3000, 8), (700, 2048)])
def test_requests_are_small_and_hold_everything(number: int, width: int, assignment: bool) -> None:
    entries = entries_of(number, width, assignment)
    requests = list(upsert_requests(entries, TO))
    sizes = [len(tensors.to_array(r.entries.ids)) for r in requests]
    assert sum(sizes) == number
    assert max(sizes, default=0) <= ENTRIES_PER_REQUEST
    assert all(r.ByteSize() <= REQUEST_BYTES + 1024 for r in requests)
    found = [tensors.to_array(r.entries.keys) for r in requests]
    if number:
        np.testing.assert_array_equal(np.concatenate(found), entries.keys.numpy())
    positions = [p.position for r in requests for p in r.entries.provenance]
    assert positions == list(range(number))


def test_an_entry_beyond_the_size_goes_alone() -> None:
    requests = list(upsert_requests(entries_of(2, REQUEST_BYTES), TO))
    assert [len(r.entries.provenance) for r in requests] == [1, 1]


def test_requests_say_where_they_go() -> None:
    [request] = upsert_requests(entries_of(2, 8), Destination("law", "d1gest", DURABILITY_FSYNC))
    assert (request.memory, request.layer, request.model_digest) == ("law", 3, "d1gest")
    assert request.durability == DURABILITY_FSYNC
    [request] = upsert_requests(entries_of(2, 8), TO)
    assert request.durability == DURABILITY_PROCESS


@pytest.mark.parametrize("assignment", [False, True])
def test_rows(assignment: bool) -> None:
    entries = entries_of(5, 8, assignment)
    some = entries.rows(torch.tensor([3, 1]))
    assert some.ids.tolist() == [3, 1]
    assert [p.position for p in some.provenance] == [3, 1]
    assert torch.equal(some.keys, entries.keys[[3, 1]])
    if isinstance(some.values, Assignment):
        assert torch.equal(some.values.weights, entries.values.weights[[3, 1]])
        assert torch.equal(some.values.experts, entries.values.experts[[3, 1]])
    else:
        assert torch.equal(some.values, entries.values[[3, 1]])
    assert len(entries.rows(torch.tensor([], dtype=torch.long))) == 0
