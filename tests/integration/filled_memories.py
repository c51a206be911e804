"""Filled memories, lookups in them, and what those must answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb
from numpy.typing import NDArray

from tests.integration.knn_moe_reference import (
    TOLERANCE,
    Reading,
    Stored,
    blended_of,
    expected_assignments,
    expected_deltas,
    expected_logits,
    stored_entries,
)
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    COSINE,
    DENSE_VALUES,
    EXPERTS,
    LOGIT_DELTA,
    LOGITS,
    RBF,
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
KINDS = pytest.mark.parametrize(
    "kind", [ASSIGNMENT, LOGIT_DELTA, LOGITS], ids=["assignment", "logit_delta", "logits"]
)


class Memory:
    """A memory with a filled layer 0 and what was exported from it; `read_by` changes how it is read."""

    def __init__(self, sidecar: Sidecar, name: str, kind: int, cosine: bool) -> None:
        self.sidecar, self.name, self.kind = sidecar, name, kind
        self.how = Reading(cosine=cosine)
        self.digest = sidecar.create(name, kind=kind, similarity=COSINE if cosine else RBF)
        sidecar.upsert(name, 0, random_entries(kind, ENTRIES))
        self.stored: Stored = stored_entries(exported(sidecar, name, 0))

    def read_by(self, how: Reading) -> None:
        """Stores the settings, every layer on."""
        self.how = how
        self.set(
            neighbours=how.k,
            gamma=[how.gamma],
            null_weight=how.null_weight,
            step_size=[how.step_size],
            support=types_pb.SUPPORT_TOP_K if how.top_k_support else types_pb.SUPPORT_UNION,
            layers=[0, 1, 2],
        )

    def set(self, **settings: Any) -> None:
        """Stores single settings."""
        request = admin_pb.UpdateSettingsRequest(
            memory=self.name, settings=types_pb.MemorySettings(**settings)
        )
        self.sidecar.admin.UpdateSettings(request, timeout=CALL_TIMEOUT_S)

    def request(self, tokens: int, seed: int, dtype: str = "f32", **fields: Any) -> Any:
        """A lookup, and what it must answer: lambdas and blended."""
        rng = np.random.default_rng(seed)
        inputs = as_sent(random_keys(rng, tokens), dtype)
        own = self.own(rng, tokens, dtype)
        allowed = fields.pop("allowed", None)
        request = route_request(self.name, self.digest, inputs, own, dtype=dtype, **fields)
        if isinstance(own, Assignments):
            return request, expected_assignments(self.stored, inputs, own, self.how, allowed)
        expected = expected_deltas if self.kind == LOGIT_DELTA else expected_logits
        return request, expected(self.stored, inputs, own, self.how, allowed)

    def own(self, rng: np.random.Generator, tokens: int, dtype: str = "f32") -> Any:
        """The model's own routing, rounded to what `dtype` can hold."""
        if self.kind in DENSE_VALUES:
            return as_sent(random_keys(rng, tokens, EXPERTS), dtype)
        own = random_assignments(rng, tokens)
        return Assignments(own.experts, as_sent(own.weights, dtype))


MemoryOf = Callable[[int, Reading], Memory]


def filled_memories(sidecar: Sidecar) -> MemoryOf:
    """Makes memories as they are asked for: making one on disk is slow, changing how it is read is not."""
    made: dict[tuple[int, bool], Memory] = {}

    def memory_of(kind: int, how: Reading) -> Memory:
        key = (kind, how.cosine)
        if key not in made:
            made[key] = Memory(sidecar, f"filled-{kind}-{int(how.cosine)}", kind, how.cosine)
        made[key].read_by(how)
        return made[key]

    return memory_of


def as_sent(array: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """The array after rounding to `dtype`."""
    return tensors.to_array(floats(array, dtype)).astype(np.float32)


def assert_answers(
    reply: routing_pb.RouteResponse, expected: tuple[Any, Any], dtype: str = "f32"
) -> None:
    lambdas, blended = expected
    np.testing.assert_allclose(tensors.to_array(reply.lambdas), lambdas, rtol=0, atol=1e-5)
    size = max(1.0, float(np.abs(blended).max()))
    np.testing.assert_allclose(blended_of(reply), blended, rtol=0, atol=TOLERANCE[dtype] * size)
    assert not tensors.to_array(reply.abstained).any()
