"""Points: what is written is what is read."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
import qdrant_client.grpc as pb
from qdrant_client import QdrantClient, models
from standin_uses import NAME, create, ids, points, refused, rows, stubs, upsert

from tests.qdrant_standin import QdrantStandIn

PAYLOAD = {
    "text": "ä",
    "whole": 7,
    "real": 1.0,
    "yes": True,
    "nothing": None,
    "list": [1, "x", None, {"deep": 2.5}],
    "map": {},
}


def test_payloads_keep_their_types(client: QdrantClient) -> None:
    create(client)
    upsert(client, [models.PointStruct(id=1, vector=[0.0] * 8, payload=PAYLOAD)])
    found = client.retrieve(NAME, [1], with_payload=True)[0].payload
    assert found == PAYLOAD
    assert type(found["whole"]) is int
    assert type(found["real"]) is float


def test_ids_are_the_whole_range(client: QdrantClient) -> None:
    create(client)
    given = [0, 2**62 + 1, 2**63 - 1, 2**64 - 1, "02b11a4b-2a52-42fa-b0f9-439a0f0e582d"]
    sent = [models.PointStruct(id=each, vector=[1.0] * 8) for each in given]
    upsert(client, sent)
    assert ids(client.scroll(NAME)[0]) == given


def test_vectors_come_back_bit_for_bit(client: QdrantClient) -> None:
    create(client)
    keys = rows(5)
    upsert(client, points(keys))
    found = client.retrieve(NAME, [0, 1, 2, 3, 4], with_vectors=True)
    assert np.array_equal(np.array([each.vector for each in found], np.float32), keys)


def test_cosine_vectors_are_normalized(client: QdrantClient) -> None:
    create(client, vectors_config=models.VectorParams(size=2, distance=models.Distance.COSINE))
    upsert(client, [models.PointStruct(id=1, vector=[3.0, 4.0])])
    assert client.retrieve(NAME, [1], with_vectors=True)[0].vector == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("form", ["data", "dense"])
def test_both_forms_of_a_vector(standin: QdrantStandIn, client: QdrantClient, form: str) -> None:
    create(client)
    dense = pb.DenseVector(data=[1.0] * 8)
    vector = pb.Vector(data=[1.0] * 8) if form == "data" else pb.Vector(dense=dense)
    point = pb.PointStruct(id=pb.PointId(num=1), vectors=pb.Vectors(vector=vector))
    channel, _, stub, _ = stubs(standin.port)
    with channel:
        stub.Upsert(pb.UpsertPoints(collection_name=NAME, points=[point], wait=True))
        wanted = pb.WithVectorsSelector(enable=True)
        request = pb.GetPoints(collection_name=NAME, ids=[pb.PointId(num=1)], with_vectors=wanted)
        found = stub.Get(request).result[0].vectors.vector
    assert found.WhichOneof("vector") == "dense"
    assert list(found.dense.data) == [1.0] * 8
    assert not found.data


def test_wait_decides_the_status(client: QdrantClient) -> None:
    create(client)
    sent = points(rows(1))
    first = client.upsert(NAME, sent, wait=False)
    second = client.upsert(NAME, sent, wait=True)
    assert first.status == models.UpdateStatus.ACKNOWLEDGED
    assert second.status == models.UpdateStatus.COMPLETED
    assert second.operation_id == first.operation_id + 1


def test_upsert_replaces_the_whole_point(client: QdrantClient) -> None:
    create(client)
    upsert(client, points(rows(1), a=1))
    upsert(client, points(rows(1, seed=1), b=2))
    assert client.retrieve(NAME, [0])[0].payload == {"b": 2}


def test_scroll_pages_in_the_order_of_ids(client: QdrantClient) -> None:
    create(client)
    upsert(client, points(rows(5), n=lambda n: n)[::-1])
    page, following = client.scroll(NAME, limit=2)
    assert (ids(page), following) == ([0, 1], 2)
    page, following = client.scroll(NAME, limit=3, offset=following)
    assert (ids(page), following) == ([2, 3, 4], None)
    assert page[0].payload == {"n": 2}
    assert page[0].vector is None


def test_get_skips_what_is_absent(client: QdrantClient) -> None:
    create(client)
    upsert(client, points(rows(3)))
    assert ids(client.retrieve(NAME, [2, 99, 0])) == [2, 0]


def test_selected_fields(client: QdrantClient) -> None:
    create(client)
    upsert(client, points(rows(1), a=1, b=2, c=3))

    def fields(wanted: object) -> object:
        return client.retrieve(NAME, [0], with_payload=wanted)[0].payload

    assert fields(["a", "c"]) == {"a": 1, "c": 3}
    assert fields(models.PayloadSelectorExclude(exclude=["a"])) == {"b": 2, "c": 3}
    assert not fields(False)


def test_delete_by_ids_and_by_filter(client: QdrantClient) -> None:
    create(client)
    upsert(client, points(rows(10), parity=lambda n: n % 2))
    client.delete(NAME, [0, 1, 99])
    odd = models.FieldCondition(key="parity", match=models.MatchValue(value=1))
    client.delete(NAME, models.FilterSelector(filter=models.Filter(must=[odd])))
    assert ids(client.scroll(NAME)[0]) == [2, 4, 6, 8]


def test_payload_can_be_changed(client: QdrantClient) -> None:
    create(client)
    upsert(client, points(rows(2), a=1))
    client.set_payload(NAME, {"b": 2}, points=[0])
    client.overwrite_payload(NAME, {"c": 3}, points=[1])
    found = client.retrieve(NAME, [0, 1])
    assert [each.payload for each in found] == [{"a": 1, "b": 2}, {"c": 3}]
    client.delete_payload(NAME, ["a"], points=[0])
    client.clear_payload(NAME, points_selector=[1])
    found = client.retrieve(NAME, [0, 1])
    assert [each.payload for each in found] == [{"b": 2}, {}]


def test_payload_of_no_point_is_not_found(client: QdrantClient) -> None:
    create(client)
    with refused(grpc.StatusCode.NOT_FOUND, "No point with id 5 found"):
        client.set_payload(NAME, {"a": 1}, points=[5])


def test_field_indexes(client: QdrantClient) -> None:
    create(client)
    client.create_payload_index(NAME, "source", models.PayloadSchemaType.KEYWORD)
    params = models.IntegerIndexParams(type="integer", lookup=True, range=False)
    client.create_payload_index(NAME, "n", params)
    upsert(client, points(rows(3), source="a", n=lambda n: n))
    schema = client.get_collection(NAME).payload_schema
    assert schema["source"].data_type == models.PayloadSchemaType.KEYWORD
    assert (schema["n"].params.lookup, schema["n"].params.range) == (True, False)
    assert schema["n"].points == 3
    client.delete_payload_index(NAME, "n")
    assert list(client.get_collection(NAME).payload_schema) == ["source"]


def test_wrong_vectors_are_refused_with_and_without_wait(client: QdrantClient) -> None:
    create(client)
    short = [models.PointStruct(id=1, vector=[1.0])]
    named = [models.PointStruct(id=1, vector={"other": [1.0] * 8})]
    for wait in (True, False):
        text = "Wrong input: Vector dimension error: expected dim: 8, got 1"
        with refused(grpc.StatusCode.INVALID_ARGUMENT, text):
            client.upsert(NAME, short, wait=wait)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "Not existing vector name error: other"):
            client.upsert(NAME, named, wait=wait)
    assert client.count(NAME).count == 0


def test_half_made_points_are_refused(standin: QdrantStandIn, client: QdrantClient) -> None:
    create(client)
    vectors = pb.Vectors(vector=pb.Vector(data=[1.0] * 8))
    channel, _, stub, _ = stubs(standin.port)
    bad = {
        "Empty ID is not allowed": pb.PointStruct(vectors=vectors),
        "Expected some vectors": pb.PointStruct(id=pb.PointId(num=1)),
        "No ID options provided": pb.PointStruct(id=pb.PointId(), vectors=vectors),
        "Unable to parse UUID: x": pb.PointStruct(id=pb.PointId(uuid="x"), vectors=vectors),
    }
    with channel:
        for text, point in bad.items():
            with refused(grpc.StatusCode.INVALID_ARGUMENT, text):
                stub.Upsert(pb.UpsertPoints(collection_name=NAME, points=[point]))
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "points_selector is expected"):
            stub.SetPayload(pb.SetPayloadPoints(collection_name=NAME))
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "PointSelector is missing"):
            stub.Delete(pb.DeletePoints(collection_name=NAME))


def test_writes_of_no_points_are_refused(client: QdrantClient) -> None:
    create(client)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "Empty update request"):
        client.upsert(NAME, [])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "Empty update request"):
        client.delete(NAME, [])
    assert client.retrieve(NAME, []) == []


def test_a_collection_without_vectors_holds_payloads(client: QdrantClient) -> None:
    client.create_collection(NAME, vectors_config={})
    upsert(client, [models.PointStruct(id=1, vector={}, payload={"record": "{}"})])
    assert client.scroll(NAME)[0][0].payload == {"record": "{}"}
    assert not client.get_collection(NAME).config.params.vectors
