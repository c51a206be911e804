"""Route through a real process equals the method in NumPy float64, whatever the backend and the transport."""

from __future__ import annotations

import numpy as np
import pytest
from knnmoe import tensors

from tests.integration.filled_memories import (
    ENTRIES,
    KINDS,
    MemoryOf,
    assert_answers,
    filled_memories,
)
from tests.integration.knn_moe_reference import (
    Reading,
    nearest,
    similarities_of,
)
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    DENSE_VALUES,
    EXPERTS,
    LOGIT_DELTA,
    TOP_K,
    Sidecar,
    random_assignments,
    random_entries,
    random_keys,
    route_request,
)


@KINDS
@pytest.mark.parametrize("cosine", [False, True], ids=["rbf", "cosine"])
@pytest.mark.parametrize("k", [1, 3, 32])
def test_route_equals_the_method(
    sidecar: Sidecar, memory_of: MemoryOf, kind: int, cosine: bool, k: int
) -> None:
    memory = memory_of(kind, Reading(cosine=cosine, k=k))
    request, expected = memory.request(tokens=7, seed=k)
    reply = sidecar.route(request)
    assert_answers(reply, expected)
    assert min(reply.times.decode_ns, reply.times.search_ns, reply.times.encode_ns) > 0


@KINDS
@pytest.mark.parametrize("tokens", [1, 7, 512, 2048])
def test_any_number_of_tokens(
    sidecar: Sidecar, memory_of: MemoryOf, kind: int, tokens: int
) -> None:
    memory = memory_of(kind, Reading(k=3))
    request, expected = memory.request(tokens, seed=tokens)
    assert_answers(sidecar.route(request), expected)


@KINDS
def test_one_stream_for_a_generation(sidecar: Sidecar, memory_of: MemoryOf, kind: int) -> None:
    memory = memory_of(kind, Reading(k=3))
    asked = [
        memory.request(tokens, seed, request_id=seed) for seed, tokens in enumerate([7, 1, 1, 512])
    ]
    requests = iter([request for request, _ in asked])
    replies = list(sidecar.routing.RouteStream(requests, timeout=CALL_TIMEOUT_S))
    assert [reply.request_id for reply in replies] == [0, 1, 2, 3]
    for reply, (_, expected) in zip(replies, asked, strict=True):
        assert_answers(reply, expected)


@KINDS
def test_unix_socket(edge_sidecar: Sidecar, kind: int) -> None:
    assert edge_sidecar.target.startswith("unix:")
    memory = filled_memories(edge_sidecar)(kind, Reading(k=3))
    request, expected = memory.request(tokens=7, seed=1)
    assert_answers(edge_sidecar.route(request), expected)
    [reply] = edge_sidecar.routing.RouteStream(iter([request]), timeout=CALL_TIMEOUT_S)
    assert_answers(reply, expected)


@KINDS
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision(sidecar: Sidecar, memory_of: MemoryOf, kind: int, dtype: str) -> None:
    memory = memory_of(kind, Reading(k=3))
    request, expected = memory.request(tokens=7, seed=2, dtype=dtype)
    reply = sidecar.route(request)
    assert_answers(reply, expected, dtype)
    logits = kind in DENSE_VALUES
    sent = request.router_logits if logits else request.assignment.weights
    got = reply.router_logits if logits else reply.assignment.weights
    assert got.dtype == sent.dtype


@pytest.mark.parametrize("k", [1, 3, 32])
def test_top_k_support(sidecar: Sidecar, memory_of: MemoryOf, k: int) -> None:
    memory = memory_of(ASSIGNMENT, Reading(k=k, top_k_support=True))
    request, expected = memory.request(tokens=64, seed=3)
    reply = sidecar.route(request)
    assert_answers(reply, expected)
    assert list(reply.assignment.experts.shape) == [64, TOP_K]


@pytest.mark.parametrize(("k", "width"), [(1, 4), (3, 8), (32, 8)])
def test_union_support_is_as_wide_as_promised(
    sidecar: Sidecar, memory_of: MemoryOf, k: int, width: int
) -> None:
    memory = memory_of(ASSIGNMENT, Reading(k=k))
    request, expected = memory.request(tokens=5, seed=4)
    reply = sidecar.route(request)
    assert_answers(reply, expected)
    assert list(reply.assignment.experts.shape) == [5, width]
    assert list(reply.assignment.weights.shape) == [5, width]


@KINDS
def test_k_of_the_request_overrides_the_memory(
    sidecar: Sidecar, memory_of: MemoryOf, kind: int
) -> None:
    memory = memory_of(kind, Reading(k=3))
    request, expected = memory.request(tokens=7, seed=5)
    memory.set(neighbours=1)
    request.neighbours = 3
    assert_answers(sidecar.route(request), expected)


@KINDS
def test_fewer_entries_than_k(sidecar: Sidecar, name: str, kind: int) -> None:
    digest = sidecar.create(name, kind=kind, neighbours=32, gamma=[0.05])
    sidecar.upsert(name, 0, random_entries(kind, 2))
    rng = np.random.default_rng(6)
    own = random_keys(rng, 4, EXPERTS) if kind in DENSE_VALUES else random_assignments(rng, 4)
    request = route_request(name, digest, random_keys(rng, 4), own, with_neighbours=True)
    reply = sidecar.route(request)
    similarities = tensors.to_array(reply.neighbours.similarities).astype(np.float64)
    assert similarities.shape == (4, 32)
    assert not similarities[:, 2:].any()
    assert np.isinf(tensors.to_array(reply.neighbours.squared_distances)[:, 2:]).all()
    assert (tensors.to_array(reply.neighbours.ids)[:, 2:] == 2**64 - 1).all()
    total = similarities.sum(axis=1)
    expected = total / (total + 0.5) if kind == LOGIT_DELTA else total / 32
    np.testing.assert_allclose(tensors.to_array(reply.lambdas), expected, atol=1e-5)


@pytest.mark.parametrize("cosine", [False, True], ids=["rbf", "cosine"])
def test_neighbours_with_their_provenance(
    sidecar: Sidecar, memory_of: MemoryOf, cosine: bool
) -> None:
    how = Reading(cosine=cosine, k=3)
    memory = memory_of(LOGIT_DELTA, how)
    request, _ = memory.request(tokens=7, seed=11, with_neighbours=True)
    reply = sidecar.route(request)
    rows, distances = nearest(memory.stored, tensors.to_array(request.router_inputs), how)
    ids = tensors.to_array(reply.neighbours.ids)
    assert np.array_equal(ids, memory.stored.ids[rows])
    got = tensors.to_array(reply.neighbours.squared_distances)
    np.testing.assert_allclose(got, distances, rtol=1e-5, atol=1e-6)
    got = tensors.to_array(reply.neighbours.similarities)
    np.testing.assert_allclose(got, similarities_of(distances, how), atol=1e-5)
    origins = dict(reply.neighbours.provenance)
    assert set(origins) == set(ids.ravel().tolist())
    written = random_entries(LOGIT_DELTA, ENTRIES)
    by_id = dict(zip(tensors.to_array(written.ids).tolist(), written.provenance, strict=True))
    for entry, origin in origins.items():
        assert origin.created_unix_ms > 0
        origin.created_unix_ms = 0
        assert origin == by_id[entry]


def test_no_neighbours_unless_asked_for(sidecar: Sidecar, memory_of: MemoryOf) -> None:
    memory = memory_of(LOGIT_DELTA, Reading())
    request, _ = memory.request(tokens=2, seed=12)
    assert not sidecar.route(request).HasField("neighbours")
