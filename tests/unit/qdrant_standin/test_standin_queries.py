"""Queries: the nearest points, against NumPy."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from qdrant_client import QdrantClient, models
from standin_uses import NAME, create, ids, points, refused, rows, upsert

KEYS = rows(60)
QUERIES = rows(4, seed=1)


@pytest.fixture
def filled(client: QdrantClient) -> QdrantClient:
    create(client)
    upsert(client, points(KEYS, source=lambda n: f"s{n % 3}", n=lambda n: n))
    return client


def distances(query: NDArray[np.float32], keys: NDArray[np.float32] = KEYS) -> NDArray[np.float32]:
    return np.linalg.norm(keys - query, axis=1)


def test_euclid_scores_are_distances_the_nearest_first(filled: QdrantClient) -> None:
    found = filled.query_points(NAME, QUERIES[0].tolist(), limit=5).points
    expected = distances(QUERIES[0])
    order = expected.argsort()[:5]
    assert ids(found) == order.tolist()
    assert [each.score for each in found] == pytest.approx(expected[order].tolist(), rel=1e-5)


def test_cosine_scores_are_similarities_the_largest_first(client: QdrantClient) -> None:
    create(client, vectors_config=models.VectorParams(size=8, distance=models.Distance.COSINE))
    upsert(client, points(KEYS))
    found = client.query_points(NAME, QUERIES[0].tolist(), limit=3).points
    norms = np.linalg.norm(KEYS, axis=1) * np.linalg.norm(QUERIES[0])
    similarities = KEYS @ QUERIES[0] / norms
    order = (-similarities).argsort()[:3]
    assert ids(found) == order.tolist()
    assert [each.score for each in found] == pytest.approx(similarities[order].tolist(), abs=1e-5)


def test_a_batch_answers_in_its_order(filled: QdrantClient) -> None:
    wanted = [
        models.QueryRequest(query=query.tolist(), limit=n + 1, with_payload=["n"])
        for n, query in enumerate(QUERIES)
    ]
    answers = filled.query_batch_points(NAME, wanted)
    for n, (query, answer) in enumerate(zip(QUERIES, answers, strict=True)):
        assert ids(answer.points) == distances(query).argsort()[: n + 1].tolist()
        assert answer.points[0].payload == {"n": answer.points[0].id}


def test_nothing_but_ids_and_scores_unless_asked(filled: QdrantClient) -> None:
    request = models.QueryRequest(query=QUERIES[0].tolist())
    found = filled.query_batch_points(NAME, [request])[0].points
    assert len(found) == 10
    assert not found[0].payload
    assert found[0].vector is None


def test_offset_threshold_and_exact(filled: QdrantClient) -> None:
    query, expected = QUERIES[0].tolist(), distances(QUERIES[0])
    order = expected.argsort()
    page = filled.query_points(NAME, query, limit=2, offset=3).points
    assert ids(page) == order[3:5].tolist()
    middle = float(expected[order[:4]][-1]) + 1e-4
    params = models.SearchParams(exact=True)
    near = filled.query_points(NAME, query, limit=9, score_threshold=middle, search_params=params)
    assert ids(near.points) == order[:4].tolist()


def test_a_query_by_id_leaves_the_point_out(filled: QdrantClient) -> None:
    found = filled.query_points(NAME, 7, limit=3).points
    assert ids(found) == distances(KEYS[7]).argsort()[1:4].tolist()
    with refused(grpc.StatusCode.NOT_FOUND, "No point with id 999 found"):
        filled.query_points(NAME, 999)


def test_a_query_without_a_vector_goes_by_ids(filled: QdrantClient) -> None:
    assert ids(filled.query_points(NAME, limit=3).points) == [0, 1, 2]


def test_candidates_of_a_prefetch_are_scored_again(client: QdrantClient) -> None:
    short = models.VectorParams(size=2, distance=models.Distance.EUCLID)
    full = models.VectorParams(size=8, distance=models.Distance.EUCLID)
    create(client, vectors_config={"": full, "short": short})
    sent = points(KEYS)
    for point, key in zip(sent, KEYS, strict=True):
        point.vector = {"": key.tolist(), "short": key[:2].tolist()}
    upsert(client, sent)
    query = QUERIES[0]
    candidates = distances(query[:2], KEYS[:, :2]).argsort()[:10]
    expected = candidates[distances(query, KEYS[candidates]).argsort()][:3]
    prefetch = models.Prefetch(query=query[:2].tolist(), using="short", limit=10)
    found = client.query_points(NAME, query.tolist(), prefetch=prefetch, limit=3).points
    assert ids(found) == expected.tolist()


def test_wrong_queries_are_refused(filled: QdrantClient) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    with refused(invalid, "Vector dimension error: expected dim: 8, got 2"):
        filled.query_points(NAME, [1.0, 2.0])
    with refused(invalid, "Not existing vector name error: other"):
        filled.query_points(NAME, QUERIES[0].tolist(), using="other")
    with refused(invalid, "[limit: value 0 invalid, must be 1 or larger]"):
        filled.query_points(NAME, QUERIES[0].tolist(), limit=0)
    with refused(grpc.StatusCode.UNIMPLEMENTED, "query by fusion"):
        filled.query_points(NAME, models.FusionQuery(fusion=models.Fusion.RRF))
