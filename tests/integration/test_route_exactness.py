"""Route through a real process equals the method in NumPy float64, whatever the backend and the transport."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb
from numpy.typing import NDArray

from tests.integration.knn_moe_reference import (
    TOLERANCE,
    Reading,
    Stored,
    blended_of,
    expected_assignments,
    expected_logits,
    nearest,
    similarities_of,
    stored_entries,
)
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    COSINE,
    EXPERTS,
    LOGIT_DELTA,
    RBF,
    TOP_K,
    Assignments,
    Sidecar,
    exported,
    floats,
    random_assignments,
    random_entries,
    random_keys,
    route_request,
)

ENTRIES = 200
KINDS = pytest.mark.parametrize("kind", [ASSIGNMENT, LOGIT_DELTA], ids=["assignment", "logit_delta"])
EMPTY, TOO_FAR, LAYER_OFF = (
    routing_pb.ABSTAIN_REASON_EMPTY,
    routing_pb.ABSTAIN_REASON_TOO_FAR,
    routing_pb.ABSTAIN_REASON_LAYER_OFF,
)


class Memory:
    """A filled memory, what was exported from it, and how it is read."""

    def __init__(self, sidecar: Sidecar, name: str, kind: int, how: Reading) -> None:
        self.sidecar, self.name, self.kind, self.how = sidecar, name, kind, how
        self.digest = sidecar.create(
            name,
            kind=kind,
            similarity=COSINE if how.cosine else RBF,
            neighbours=how.k,
            gamma=[how.gamma],
            null_weight=how.null_weight,
            step_size=[how.step_size],
            support=types_pb.SUPPORT_TOP_K if how.top_k_support else types_pb.SUPPORT_UNION,
        )
        sidecar.upsert(name, 0, random_entries(kind, ENTRIES))
        self.stored: Stored = stored_entries(exported(sidecar, name, 0))

    def request(self, tokens: int, seed: int, dtype: str = "f32", **fields: Any) -> Any:
        """A look-up, and what it must answer: lambdas and blended."""
        rng = np.random.default_rng(seed)
        inputs = _as_sent(random_keys(rng, tokens), dtype)
        own = self.own(rng, tokens, dtype)
        allowed = fields.pop("allowed", None)
        request = route_request(self.name, self.digest, inputs, own, dtype=dtype, **fields)
        if isinstance(own, Assignments):
            return request, expected_assignments(self.stored, inputs, own, self.how, allowed)
        return request, expected_logits(self.stored, inputs, own, self.how, allowed)

    def own(self, rng: np.random.Generator, tokens: int, dtype: str = "f32") -> Any:
        """The model's own routing, rounded to what `dtype` can hold."""
        if self.kind == LOGIT_DELTA:
            return _as_sent(random_keys(rng, tokens, EXPERTS), dtype)
        own = random_assignments(rng, tokens)
        return Assignments(own.experts, _as_sent(own.weights, dtype))


def _as_sent(array: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    return tensors.to_array(floats(array, dtype)).astype(np.float32)


def assert_answers(
    reply: routing_pb.RouteResponse, expected: tuple[Any, Any], dtype: str = "f32"
) -> None:
    lambdas, blended = expected
    np.testing.assert_allclose(tensors.to_array(reply.lambdas), lambdas, rtol=0, atol=1e-5)
    size = max(1.0, float(np.abs(blended).max()))
    np.testing.assert_allclose(blended_of(reply), blended, rtol=0, atol=TOLERANCE[dtype] * size)
    assert not tensors.to_array(reply.abstained).any()


@KINDS
@pytest.mark.parametrize("cosine", [False, True], ids=["rbf", "cosine"])
@pytest.mark.parametrize("k", [1, 3, 32])
def test_route_equals_the_method(sidecar: Sidecar, name: str, kind: int, cosine: bool, k: int) -> None:
    memory = Memory(sidecar, name, kind, Reading(cosine=cosine, k=k))
    request, expected = memory.request(tokens=7, seed=k)
    reply = sidecar.route(request)
    assert_answers(reply, expected)
    assert min(reply.times.decode_ns, reply.times.search_ns, reply.times.encode_ns) > 0


@KINDS
@pytest.mark.parametrize("tokens", [1, 7, 512, 2048])
def test_any_number_of_tokens(sidecar: Sidecar, name: str, kind: int, tokens: int) -> None:
    memory = Memory(sidecar, name, kind, Reading(k=3))
    request, expected = memory.request(tokens, seed=tokens)
    assert_answers(sidecar.route(request), expected)


@KINDS
def test_one_stream_for_a_generation(sidecar: Sidecar, name: str, kind: int) -> None:
    memory = Memory(sidecar, name, kind, Reading(k=3))
    asked = [memory.request(tokens, seed, request_id=seed) for seed, tokens in enumerate([7, 1, 1, 512])]
    requests = iter([request for request, _ in asked])
    replies = list(sidecar.routing.RouteStream(requests, timeout=CALL_TIMEOUT_S))
    assert [reply.request_id for reply in replies] == [0, 1, 2, 3]
    for reply, (_, expected) in zip(replies, asked, strict=True):
        assert_answers(reply, expected)


@KINDS
def test_unix_socket(edge_sidecar: Sidecar, name: str, kind: int) -> None:
    assert edge_sidecar.target.startswith("unix:")
    memory = Memory(edge_sidecar, name, kind, Reading(k=3))
    request, expected = memory.request(tokens=7, seed=1)
    assert_answers(edge_sidecar.route(request), expected)
    [reply] = edge_sidecar.routing.RouteStream(iter([request]), timeout=CALL_TIMEOUT_S)
    assert_answers(reply, expected)


@KINDS
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision(sidecar: Sidecar, name: str, kind: int, dtype: str) -> None:
    memory = Memory(sidecar, name, kind, Reading(k=3))
    request, expected = memory.request(tokens=7, seed=2, dtype=dtype)
    reply = sidecar.route(request)
    assert_answers(reply, expected, dtype)
    sent = request.router_logits if kind == LOGIT_DELTA else request.assignment.weights
    got = reply.router_logits if kind == LOGIT_DELTA else reply.assignment.weights
    assert got.dtype == sent.dtype


@pytest.mark.parametrize("k", [1, 3, 32])
def test_top_k_support(sidecar: Sidecar, name: str, k: int) -> None:
    memory = Memory(sidecar, name, ASSIGNMENT, Reading(k=k, top_k_support=True))
    request, expected = memory.request(tokens=64, seed=3)
    reply = sidecar.route(request)
    assert_answers(reply, expected)
    assert list(reply.assignment.experts.shape) == [64, TOP_K]


@pytest.mark.parametrize(("k", "width"), [(1, 4), (3, 8), (32, 8)])
def test_union_support_is_as_wide_as_promised(
    sidecar: Sidecar, name: str, k: int, width: int
) -> None:
    memory = Memory(sidecar, name, ASSIGNMENT, Reading(k=k))
    request, expected = memory.request(tokens=5, seed=4)
    reply = sidecar.route(request)
    assert_answers(reply, expected)
    assert list(reply.assignment.experts.shape) == [5, width]
    assert list(reply.assignment.weights.shape) == [5, width]


@KINDS
def test_k_of_the_request_overrides_the_memory(sidecar: Sidecar, name: str, kind: int) -> None:
    memory = Memory(sidecar, name, kind, Reading(k=3))
    request, expected = memory.request(tokens=7, seed=5)
    sidecar.admin.UpdateSettings(
        _update(name, neighbours=1), timeout=CALL_TIMEOUT_S
    )
    request.neighbours = 3
    assert_answers(sidecar.route(request), expected)


@KINDS
def test_fewer_entries_than_k(sidecar: Sidecar, name: str, kind: int) -> None:
    digest = sidecar.create(name, kind=kind, neighbours=32, gamma=[0.05])
    sidecar.upsert(name, 0, random_entries(kind, 2))
    rng = np.random.default_rng(6)
    own = random_keys(rng, 4, EXPERTS) if kind == LOGIT_DELTA else random_assignments(rng, 4)
    request = route_request(name, digest, random_keys(rng, 4), own, with_neighbours=True)
    reply = sidecar.route(request)
    similarities = tensors.to_array(reply.neighbours.similarities).astype(np.float64)
    assert similarities.shape == (4, 32)
    assert not similarities[:, 2:].any()
    assert np.isinf(tensors.to_array(reply.neighbours.squared_distances)[:, 2:]).all()
    assert (tensors.to_array(reply.neighbours.ids)[:, 2:] == 2**64 - 1).all()
    total = similarities.sum(axis=1)
    expected = total / 32 if kind == ASSIGNMENT else total / (total + 0.5 * (kind == LOGIT_DELTA))
    np.testing.assert_allclose(tensors.to_array(reply.lambdas), expected, atol=1e-5)


@KINDS
@pytest.mark.parametrize("case", ["empty", "far", "off"])
def test_when_every_token_abstains_the_models_own_routing_stands(
    sidecar: Sidecar, name: str, kind: int, case: str
) -> None:
    memory = Memory(sidecar, name, kind, Reading(k=3))
    layer, reason = {"empty": (1, EMPTY), "far": (0, TOO_FAR), "off": (2, LAYER_OFF)}[case]
    settings = {"gamma": [1e6]} if case == "far" else {"layers": [0, 1]}
    sidecar.admin.UpdateSettings(_update(name, **settings), timeout=CALL_TIMEOUT_S)
    request, _ = memory.request(tokens=4, seed=7, layer=layer)
    reply = sidecar.route(request)
    assert reply.WhichOneof("blended") is None
    assert tensors.to_array(reply.abstained).tolist() == [reason] * 4
    assert not tensors.to_array(reply.lambdas).any()


@KINDS
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("top_k_support", [False, True], ids=["union", "top_k"])
def test_a_token_that_abstains_among_others_keeps_its_routing_bit_for_bit(
    sidecar: Sidecar, name: str, kind: int, dtype: str, top_k_support: bool
) -> None:
    memory = Memory(sidecar, name, kind, Reading(k=1, gamma=1.0, top_k_support=top_k_support))
    rng = np.random.default_rng(8)
    inputs = _as_sent(100 + random_keys(rng, 4), dtype)
    inputs[[1, 2]] = memory.stored.keys[[5, 6]]
    own = memory.own(rng, 4, dtype)
    reply = sidecar.route(route_request(name, memory.digest, inputs, own, dtype=dtype))
    assert tensors.to_array(reply.abstained).tolist() == [TOO_FAR, 0, 0, TOO_FAR]
    abstained = [0, 3]
    if kind == LOGIT_DELTA:
        got = tensors.to_array(reply.router_logits)
        assert got[abstained].tobytes() == own[abstained].astype(got.dtype).tobytes()
        assert not np.array_equal(got[[1, 2]], own[[1, 2]])
        return
    experts = tensors.to_array(reply.assignment.experts)[abstained]
    weights = tensors.to_array(reply.assignment.weights)[abstained]
    assert np.array_equal(experts[:, :TOP_K], own.experts[abstained])
    assert weights[:, :TOP_K].tobytes() == own.weights[abstained].astype(weights.dtype).tobytes()
    assert not weights[:, TOP_K:].any()


@KINDS
def test_one_example_left_out_for_all_tokens(sidecar: Sidecar, name: str, kind: int) -> None:
    memory = Memory(sidecar, name, kind, Reading(k=3))
    left_out = ("text-1", "example-3")
    allowed = np.array([[example != left_out for example in memory.stored.examples]] * 7)
    assert not allowed.all()
    exclude = [routing_pb.ExampleRef(source=left_out[0], example=left_out[1])]
    request, expected = memory.request(7, seed=9, exclude=exclude, allowed=allowed)
    assert_answers(sidecar.route(request), expected)


@KINDS
def test_an_example_left_out_per_token(sidecar: Sidecar, name: str, kind: int) -> None:
    tokens = 300  # more than one engine call
    memory = Memory(sidecar, name, kind, Reading(k=3))
    left_out = [(f"text-{t % 2}", f"example-{t % 10}") for t in range(tokens)]
    allowed = np.array([[e != out for e in memory.stored.examples] for out in left_out])
    exclude = [routing_pb.ExampleRef(source=s, example=e) for s, e in left_out]
    request, expected = memory.request(tokens, seed=10, exclude=exclude, allowed=allowed)
    assert_answers(sidecar.route(request), expected)


@pytest.mark.parametrize("cosine", [False, True], ids=["rbf", "cosine"])
def test_neighbours_with_their_provenance(sidecar: Sidecar, name: str, cosine: bool) -> None:
    how = Reading(cosine=cosine, k=3)
    memory = Memory(sidecar, name, LOGIT_DELTA, how)
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


def test_no_neighbours_unless_asked_for(sidecar: Sidecar, name: str) -> None:
    memory = Memory(sidecar, name, LOGIT_DELTA, Reading())
    request, _ = memory.request(tokens=2, seed=12)
    assert not sidecar.route(request).HasField("neighbours")


def _update(name: str, **settings: Any) -> Any:
    from knnmoe.v1 import memory_admin_pb2 as admin_pb

    return admin_pb.UpdateSettingsRequest(
        memory=name, settings=types_pb.MemorySettings(**settings)
    )
