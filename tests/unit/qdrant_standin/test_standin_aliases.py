"""Aliases: names that stand for collections in every call."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from qdrant_client import QdrantClient, models
from standin_uses import create, points, refused, rows, upsert

from tests.qdrant_standin import QdrantStandIn


def make(alias: str, collection: str) -> models.CreateAliasOperation:
    wanted = models.CreateAlias(alias_name=alias, collection_name=collection)
    return models.CreateAliasOperation(create_alias=wanted)


def drop(alias: str) -> models.DeleteAliasOperation:
    return models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias))


def rename(old: str, new: str) -> models.RenameAliasOperation:
    wanted = models.RenameAlias(old_alias_name=old, new_alias_name=new)
    return models.RenameAliasOperation(rename_alias=wanted)


@pytest.fixture(scope="module")
def filled(connected: QdrantClient) -> QdrantClient:
    """Collections "one" and "two", with 1 and 2 points."""
    for number, name in enumerate(("one", "two"), 1):
        create(connected, name)
        upsert(connected, points(rows(number)), name)
    return connected


@pytest.fixture
def two(filled: QdrantClient) -> Iterator[QdrantClient]:
    """Without aliases when a test begins."""
    yield filled
    filled.update_collection_aliases([drop(alias) for alias in pairs(filled)])


def pairs(client: QdrantClient) -> dict[str, str]:
    return {each.alias_name: each.collection_name for each in client.get_aliases().aliases}


def test_one_call_swaps_a_collection(two: QdrantClient) -> None:
    two.update_collection_aliases([make("live", "one")])
    assert two.count("live").count == 1
    two.update_collection_aliases([drop("live"), make("live", "two")])
    assert two.count("live").count == 2


def test_creating_an_alias_again_points_it_elsewhere(two: QdrantClient) -> None:
    two.update_collection_aliases([make("live", "one")])
    two.update_collection_aliases([make("live", "two")])
    assert pairs(two) == {"live": "two"}


def test_calls_take_the_alias(two: QdrantClient) -> None:
    two.update_collection_aliases([make("live", "one")])
    upsert(two, points(rows(1, seed=1), first=7), "live")
    assert two.get_collection("live").points_count == 2
    two.delete("live", [7])
    assert two.collection_exists("live")
    two.update_collection("live", hnsw_config=models.HnswConfigDiff(m=8))
    assert two.get_collection("one").config.hnsw_config.m == 8


def test_aliases_of_one_collection(two: QdrantClient) -> None:
    two.update_collection_aliases([make("a", "one"), make("b", "one"), make("c", "two")])
    found = two.get_collection_aliases("one").aliases
    assert sorted(each.alias_name for each in found) == ["a", "b"]


def test_rename(two: QdrantClient) -> None:
    two.update_collection_aliases([make("old", "one")])
    two.update_collection_aliases([rename("old", "new")])
    assert pairs(two) == {"new": "one"}
    with refused(grpc.StatusCode.NOT_FOUND, "Alias old does not exists!"):
        two.update_collection_aliases([rename("old", "new")])


def test_a_collection_takes_its_aliases_with_it(two: QdrantClient) -> None:
    create(two, "three")
    two.update_collection_aliases([make("a", "three"), make("b", "two")])
    two.delete_collection("three")
    assert pairs(two) == {"b": "two"}


def test_delete_does_not_follow_an_alias(two: QdrantClient) -> None:
    two.update_collection_aliases([make("live", "one")])
    assert two.delete_collection("live") is False
    assert two.count("live").count == 1


def test_an_alias_of_nothing_or_of_an_alias_is_refused(two: QdrantClient) -> None:
    two.update_collection_aliases([make("live", "one")])
    for collection in ("nope", "live"):
        with refused(grpc.StatusCode.NOT_FOUND, f"Collection `{collection}` doesn't exist!"):
            two.update_collection_aliases([make("other", collection)])


def test_names_of_aliases_and_collections_are_apart(two: QdrantClient) -> None:
    with refused(grpc.StatusCode.ALREADY_EXISTS, "Collection `two` already exists!"):
        two.update_collection_aliases([make("two", "one")])
    two.update_collection_aliases([make("live", "one")])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "Alias with the same name already exists"):
        create(two, "live")


def test_deleting_an_alias_that_is_not_there_is_fine(two: QdrantClient) -> None:
    assert two.update_collection_aliases([drop("nope")]) is True


def test_an_action_that_fails_leaves_those_before_it(two: QdrantClient) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "doesn't exist"):
        two.update_collection_aliases([make("a", "one"), make("b", "nope"), make("c", "two")])
    assert pairs(two) == {"a": "one"}


def test_aliases_outlive_a_restart(two: QdrantClient, standin: QdrantStandIn) -> None:
    two.update_collection_aliases([make("live", "two")])
    standin.stop()
    standin.start()
    assert two.count("live").count == 2
