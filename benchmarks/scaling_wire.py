"""What lookups weigh on the wire, and what a sidecar in front of a Qdrant server spends on their messages."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import numpy as np
from knnmoe import tensors
from knnmoe.v1 import routing_pb2 as pb
from qdrant_client import grpc as q

from benchmarks.clustered import F32
from router_service.backends.base import Metric, SearchOptions
from router_service.backends.points import VALUE
from router_service.backends.qdrant_server.messages import neighbours_from, queries_of

TOKENS = 64
_ROUNDS = 5
_COLLECTION = "knnmoe~textbooks~layer-000"
_DIGEST = "0" * 32


def query_costs(dimension: int, value_floats: int, k: int) -> dict[str, Any]:
    """Bytes per query to a Qdrant server and back, and microseconds of Python for either, in calls of TOKENS."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((TOKENS, dimension), np.float32)
    asked = _asked(queries, k)
    answered = _answer(rng, value_floats, k).SerializeToString()
    return {
        "dimension": dimension,
        "value_floats": value_floats,
        "neighbours": k,
        "request_bytes": len(asked) / TOKENS,
        "response_bytes": len(answered) / TOKENS,
        "request_us": _us_per_token(lambda: _asked(queries, k)),
        "response_us": _us_per_token(lambda: _read(answered, k, value_floats)),
    }


def _asked(queries: F32, k: int) -> bytes:
    points = queries_of(_COLLECTION, queries, k, SearchOptions(100), [None] * len(queries))
    message = q.QueryBatchPoints(collection_name=_COLLECTION, query_points=points)
    return bytes(message.SerializeToString())


def _answer(rng: np.random.Generator, value_floats: int, k: int) -> Any:
    return q.QueryBatchResponse(
        result=[
            q.BatchResult(result=[_hit(rng, value_floats) for _ in range(k)]) for _ in range(TOKENS)
        ],
        time=0.001,
    )


def _hit(rng: np.random.Generator, value_floats: int) -> Any:
    row = rng.standard_normal(value_floats, np.float32).astype("<f4")
    return q.ScoredPoint(
        id=q.PointId(num=int(rng.integers(2**62, 2**63))),
        payload={VALUE: q.Value(string_value=b64encode(row.tobytes()).decode())},
        score=1.5,
        version=12_345,
    )


def _read(answered: bytes, k: int, value_floats: int) -> None:
    response = q.QueryBatchResponse.FromString(answered)
    neighbours_from(response.result, k, Metric.EUCLID, value_floats)


def _us_per_token(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e6 / TOKENS


def route_bytes(dimension: int, experts: int) -> dict[str, Any]:
    """Bytes per token that a runner sends to its sidecar and gets back, f16, logit deltas, in calls of TOKENS."""
    inputs = np.zeros((TOKENS, dimension), np.float16)
    logits = np.zeros((TOKENS, experts), np.float16)
    request = pb.RouteRequest(
        memory="textbooks",
        model_digest=_DIGEST,
        router_inputs=tensors.to_tensor(inputs),
        router_logits=tensors.to_tensor(logits),
    )
    response = pb.RouteResponse(
        router_logits=tensors.to_tensor(logits),
        lambdas=tensors.to_tensor(np.zeros(TOKENS, np.float32)),
        abstained=tensors.to_tensor(np.zeros(TOKENS, np.uint8)),
    )
    return {
        "dimension": dimension,
        "experts": experts,
        "request_bytes": request.ByteSize() / TOKENS,
        "response_bytes": response.ByteSize() / TOKENS,
    }
