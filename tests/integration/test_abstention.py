"""When the memory has nothing to say, or must not say it, the model's own routing stands, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.v1 import routing_pb2 as routing_pb

from tests.integration.filled_memories import (
    KINDS,
    MemoryOf,
    as_sent,
    assert_answers,
)
from tests.integration.knn_moe_reference import (
    Reading,
)
from tests.sidecar import (
    DENSE_VALUES,
    TOP_K,
    Sidecar,
    random_keys,
    route_request,
)

EMPTY, TOO_FAR, LAYER_OFF = (
    routing_pb.ABSTAIN_REASON_EMPTY,
    routing_pb.ABSTAIN_REASON_TOO_FAR,
    routing_pb.ABSTAIN_REASON_LAYER_OFF,
)


@KINDS
@pytest.mark.parametrize("case", ["empty", "far", "off"])
def test_when_every_token_abstains_the_models_own_routing_stands(
    sidecar: Sidecar, memory_of: MemoryOf, kind: int, case: str
) -> None:
    memory = memory_of(kind, Reading(k=3))
    layer, reason = {"empty": (1, EMPTY), "far": (0, TOO_FAR), "off": (2, LAYER_OFF)}[case]
    memory.set(**{"gamma": [1e6]} if case == "far" else {"layers": [0, 1]})
    request, _ = memory.request(tokens=4, seed=7, layer=layer)
    reply = sidecar.route(request)
    assert reply.WhichOneof("blended") is None
    assert tensors.to_array(reply.abstained).tolist() == [reason] * 4
    assert not tensors.to_array(reply.lambdas).any()


@KINDS
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("top_k_support", [False, True], ids=["union", "top_k"])
def test_a_token_that_abstains_among_others_keeps_its_routing_bit_for_bit(
    sidecar: Sidecar, memory_of: MemoryOf, kind: int, dtype: str, top_k_support: bool
) -> None:
    memory = memory_of(kind, Reading(k=1, gamma=1.0, top_k_support=top_k_support))
    rng = np.random.default_rng(8)
    inputs = as_sent(100 + random_keys(rng, 4), dtype)
    inputs[[1, 2]] = memory.stored.keys[[5, 6]]
    own = memory.own(rng, 4, dtype)
    reply = sidecar.route(route_request(memory.name, memory.digest, inputs, own, dtype=dtype))
    assert tensors.to_array(reply.abstained).tolist() == [TOO_FAR, 0, 0, TOO_FAR]
    abstained = [0, 3]
    if kind in DENSE_VALUES:
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
def test_one_example_left_out_for_all_tokens(
    sidecar: Sidecar, memory_of: MemoryOf, kind: int
) -> None:
    memory = memory_of(kind, Reading(k=3))
    left_out = ("text-1", "example-3")
    allowed = np.array([[example != left_out for example in memory.stored.examples]] * 7)
    assert not allowed.all()
    exclude = [routing_pb.ExampleRef(source=left_out[0], example=left_out[1])]
    request, expected = memory.request(7, seed=9, exclude=exclude, allowed=allowed)
    assert_answers(sidecar.route(request), expected)


@KINDS
def test_an_example_left_out_per_token(sidecar: Sidecar, memory_of: MemoryOf, kind: int) -> None:
    tokens = 300  # more than one engine call
    memory = memory_of(kind, Reading(k=3))
    left_out = [(f"text-{t % 2}", f"example-{t % 10}") for t in range(tokens)]
    allowed = np.array([[e != out for e in memory.stored.examples] for out in left_out])
    exclude = [routing_pb.ExampleRef(source=s, example=e) for s, e in left_out]
    request, expected = memory.request(tokens, seed=10, exclude=exclude, allowed=allowed)
    assert_answers(sidecar.route(request), expected)
