"""Filters: every condition that the service may send, and some more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import qdrant_client.grpc as pb
from standin_uses import NAME, connect, create, points, rows, stubs, upsert

from tests.qdrant_standin import QdrantStandIn

COUNT = 12


def source(n: int) -> str:
    return f"s{n % 3}"


def match(key: str, **value: Any) -> pb.Condition:
    return pb.Condition(field=pb.FieldCondition(key=key, match=pb.Match(**value)))


def either(*conditions: pb.Condition) -> pb.Condition:
    return pb.Condition(filter=pb.Filter(should=conditions))


def both(*conditions: pb.Condition) -> pb.Condition:
    return pb.Condition(filter=pb.Filter(must=conditions))


EMPTY = pb.Condition(is_empty=pb.IsEmptyCondition(key="example"))
HAS_ID = pb.Condition(has_id=pb.HasIdCondition(has_id=[pb.PointId(num=n) for n in (1, 5, 99)]))
WORDS = {"keywords": pb.RepeatedStrings(strings=["s0", "s2"])}
NUMBERS = {"integers": pb.RepeatedIntegers(integers=[3, 4])}
RANGE = pb.Condition(field=pb.FieldCondition(key="n", range=pb.Range(gte=3, lt=6)))

CASES: dict[str, tuple[pb.Filter, Callable[[int], bool]]] = {
    "keyword": (pb.Filter(must=[match("source", keyword="s1")]), lambda n: n % 3 == 1),
    "integer": (pb.Filter(must=[match("n", integer=4)]), lambda n: n == 4),
    "any keyword": (pb.Filter(must=[match("source", **WORDS)]), lambda n: n % 3 != 1),
    "any integer": (pb.Filter(must=[match("n", **NUMBERS)]), lambda n: n in (3, 4)),
    "empty": (pb.Filter(must=[EMPTY]), lambda n: n % 2 == 1),
    "has id": (pb.Filter(must=[HAS_ID]), lambda n: n in (1, 5)),
    "range": (pb.Filter(must=[RANGE]), lambda n: 3 <= n < 6),
    "must not": (pb.Filter(must_not=[match("source", keyword="s1")]), lambda n: n % 3 != 1),
    "should": (pb.Filter(should=[HAS_ID, match("n", integer=8)]), lambda n: n in (1, 5, 8)),
    "nested must not": (
        pb.Filter(must_not=[both(match("source", keyword="s0"), match("example", keyword="e"))]),
        lambda n: not (n % 3 == 0 and n % 2 == 0),
    ),
    "all together": (
        pb.Filter(must=[either(HAS_ID, RANGE)], must_not=[match("n", integer=4), EMPTY]),
        lambda n: (n in (1, 5) or 3 <= n < 6) and n != 4 and n % 2 == 0,
    ),
    "nothing": (pb.Filter(), lambda n: True),
}


@pytest.fixture(scope="module")
def stub(directory: Path) -> Any:
    with QdrantStandIn(directory) as server, connect(server.port) as client:
        create(client)
        client.create_payload_index(NAME, "source", "keyword")
        sent = points(rows(COUNT), source=source, n=lambda n: n)
        for point in sent[::2]:
            point.payload["example"] = "e"
        upsert(client, sent)
        channel, _, points_stub, _ = stubs(server.port)
        with channel:
            yield points_stub


@pytest.mark.parametrize("name", CASES)
def test_filter(stub: pb.PointsStub, name: str) -> None:
    wanted, expected = CASES[name]
    request = pb.ScrollPoints(collection_name=NAME, filter=wanted, limit=COUNT)
    found = [point.id.num for point in stub.Scroll(request).result]
    assert found == [n for n in range(COUNT) if expected(n)]
    counted = stub.Count(pb.CountPoints(collection_name=NAME, filter=wanted, exact=True))
    assert counted.result.count == len(found)


def test_a_query_takes_a_filter(stub: pb.PointsStub) -> None:
    nearest = pb.VectorInput(dense=pb.DenseVector(data=rows(1)[0]))
    request = pb.QueryPoints(
        collection_name=NAME,
        query=pb.Query(nearest=nearest),
        filter=CASES["nested must not"][0],
        limit=COUNT,
    )
    found = {point.id.num for point in stub.Query(request).result}
    assert found == {n for n in range(COUNT) if n % 6}


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (pb.Condition(field=pb.FieldCondition(key="n")), "At least one field condition"),
        (pb.Condition(field=pb.FieldCondition(key="n", match=pb.Match())), "Malformed Match"),
        (pb.Condition(has_id=pb.HasIdCondition(has_id=[pb.PointId()])), "No ID options"),
    ],
)
def test_conditions_without_content(
    stub: pb.PointsStub, condition: pb.Condition, text: str
) -> None:
    request = pb.CountPoints(collection_name=NAME, filter=pb.Filter(must=[condition]))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Count(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert text in caught.value.details()
