"""Collections: what is created, reported, changed, refused."""

from __future__ import annotations

import grpc
import pytest
import qdrant_client.grpc as pb
from qdrant_client import QdrantClient, models
from standin_uses import EUCLID, NAME, create, points, refused, rows, stubs, upsert

from tests.qdrant_standin import QdrantStandIn

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def test_defaults_are_those_of_the_server(client: QdrantClient) -> None:
    create(client)
    info = client.get_collection(NAME)
    assert info.status == models.CollectionStatus.GREEN
    assert (info.points_count, info.indexed_vectors_count) == (0, 0)
    params, hnsw = info.config.params, info.config.hnsw_config
    assert (params.shard_number, params.replication_factor) == (1, 1)
    assert params.write_consistency_factor == 1
    assert (hnsw.m, hnsw.ef_construct, hnsw.full_scan_threshold) == (16, 100, 10_000)
    assert info.config.optimizer_config.indexing_threshold == 10_000
    assert info.config.quantization_config is None


def test_what_was_asked_for_is_reported(client: QdrantClient) -> None:
    create(
        client,
        shard_number=3,
        replication_factor=2,
        write_consistency_factor=2,
        hnsw_config=models.HnswConfigDiff(m=24, ef_construct=128),
        optimizers_config=models.OptimizersConfigDiff(indexing_threshold=7),
        quantization_config=models.ScalarQuantization(
            scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
        ),
    )
    config = client.get_collection(NAME).config
    assert config.params.vectors == EUCLID
    assert (config.params.shard_number, config.params.replication_factor) == (3, 2)
    assert config.params.write_consistency_factor == 2
    assert (config.hnsw_config.m, config.hnsw_config.full_scan_threshold) == (24, 10_000)
    assert config.optimizer_config.indexing_threshold == 7
    assert config.quantization_config.scalar.always_ram is True


def test_update_keeps_what_it_does_not_name(client: QdrantClient) -> None:
    create(client, hnsw_config=models.HnswConfigDiff(m=24))
    client.update_collection(
        NAME,
        hnsw_config=models.HnswConfigDiff(ef_construct=50),
        collection_params=models.CollectionParamsDiff(replication_factor=2),
    )
    config = client.get_collection(NAME).config
    assert (config.hnsw_config.m, config.hnsw_config.ef_construct) == (24, 50)
    assert config.params.replication_factor == 2
    assert config.params.vectors == EUCLID


def test_list_exists_delete(client: QdrantClient) -> None:
    create(client, "b")
    create(client, "a")
    assert [each.name for each in client.get_collections().collections] == ["a", "b"]
    assert client.collection_exists("a")
    assert client.delete_collection("a") is True
    assert client.delete_collection("a") is False
    assert not client.collection_exists("a")


def test_cluster_info_names_every_shard(standin: QdrantStandIn, client: QdrantClient) -> None:
    create(client, shard_number=3)
    upsert(client, points(rows(5)))
    channel, collections, _, _ = stubs(standin.port)
    with channel:
        request = pb.CollectionClusterInfoRequest(collection_name=NAME)
        info = collections.CollectionClusterInfo(request)
    assert info.shard_count == 3
    assert [shard.state for shard in info.local_shards] == [pb.Active] * 3
    assert sum(shard.points_count for shard in info.local_shards) == 5


def test_an_unknown_collection_is_not_found(client: QdrantClient) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "Not found: Collection `nope` doesn't exist!"):
        client.get_collection("nope")
    with refused(grpc.StatusCode.NOT_FOUND, "doesn't exist"):
        client.count("nope")
    with refused(grpc.StatusCode.NOT_FOUND, "doesn't exist"):
        client.update_collection("nope", hnsw_config=models.HnswConfigDiff(m=4))


def test_a_second_one_of_a_name_is_refused(client: QdrantClient) -> None:
    create(client)
    text = f"Wrong input: Collection `{NAME}` already exists!"
    with refused(grpc.StatusCode.ALREADY_EXISTS, text):
        create(client)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "must be from 1 to 255 characters"),
        ("x" * 256, "must be from 1 to 255 characters"),
        ("a/b", 'collection name cannot contain "/" char'),
        ("a:b", 'collection name cannot contain ":" char'),
    ],
)
def test_bad_names(client: QdrantClient, name: str, text: str) -> None:
    with refused(INVALID, text):
        create(client, name)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"vectors_config": models.VectorParams(size=0, distance="Dot")}, "size"),
        ({"vectors_config": models.VectorParams(size=65537, distance="Dot")}, "65536"),
        ({"shard_number": 0}, "[shard_number: value 0 invalid, must be 1 or larger]"),
        ({"replication_factor": 0}, "replication_factor"),
        ({"hnsw_config": models.HnswConfigDiff(ef_construct=3)}, "ef_construct"),
    ],
)
def test_numbers_outside_their_limits(
    client: QdrantClient, settings: dict[str, object], text: str
) -> None:
    with refused(INVALID, text):
        create(client, **settings)


def test_what_the_stand_in_lacks_is_unimplemented(client: QdrantClient) -> None:
    create(client)
    with refused(grpc.StatusCode.UNIMPLEMENTED, "Facet"):
        client.facet(NAME, "source")
