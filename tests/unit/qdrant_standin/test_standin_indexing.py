"""Indexing: in the background, above a threshold, with every quantization."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from qdrant_client import QdrantClient, models
from standin_uses import NAME, create, ids, points, rows, upsert, wait_until_green

from tests.qdrant_standin import QdrantStandIn

COUNT = 400  # of 8 x 4 bytes: 12.5 KB
BITS = models.TurboQuantBitSize

QUANTIZATIONS: dict[str, models.QuantizationConfig] = {
    "int8": models.ScalarQuantization(
        scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
    ),
    "product": models.ProductQuantization(
        product=models.ProductQuantizationConfig(compression=models.CompressionRatio.X4)
    ),
    "binary": models.BinaryQuantization(
        binary=models.BinaryQuantizationConfig(
            encoding=models.BinaryQuantizationEncoding.TWO_BITS,
            query_encoding=models.BinaryQuantizationQueryEncoding.SCALAR8BITS,
        )
    ),
    "turbo4": models.TurboQuantization(turbo=models.TurboQuantQuantizationConfig(bits=BITS.BITS4)),
    "turbo1": models.TurboQuantization(
        turbo=models.TurboQuantQuantizationConfig(bits=BITS.BITS1, memory=models.Memory.PINNED)
    ),
}


class EagerStandIn(QdrantStandIn):
    """Indexes above 5 KB."""

    indexing_threshold_kb = 5


@pytest.fixture(scope="module")
def standin(directory: Path) -> Iterator[QdrantStandIn]:
    with EagerStandIn(directory) as server:
        yield server


def test_nothing_is_indexed_below_the_threshold(client: QdrantClient) -> None:
    create(client, optimizers_config=models.OptimizersConfigDiff(indexing_threshold=1000))
    upsert(client, points(rows(COUNT)))
    assert wait_until_green(client).indexed_vectors_count == 0


def test_an_upsert_that_passes_the_threshold_starts_it(client: QdrantClient) -> None:
    create(client)
    upsert(client, points(rows(COUNT)))
    assert wait_until_green(client).indexed_vectors_count == COUNT


def test_an_update_starts_it(client: QdrantClient) -> None:
    create(client, optimizers_config=models.OptimizersConfigDiff(indexing_threshold=1000))
    upsert(client, points(rows(COUNT)))
    lower = models.OptimizersConfigDiff(indexing_threshold=1)
    client.update_collection(NAME, optimizers_config=lower)
    assert wait_until_green(client).indexed_vectors_count == COUNT


def test_it_is_yellow_until_it_is_done(client: QdrantClient, standin: QdrantStandIn) -> None:
    create(client)
    standin.optimizers.pause()
    upsert(client, points(rows(COUNT)))
    info = client.get_collection(NAME)
    standin.optimizers.resume()
    assert (info.status, info.indexed_vectors_count) == (models.CollectionStatus.YELLOW, 0)
    assert wait_until_green(client).indexed_vectors_count == COUNT


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantization(client: QdrantClient, name: str) -> None:
    create(client, quantization_config=QUANTIZATIONS[name])
    keys = rows(COUNT)
    upsert(client, points(keys))
    info = wait_until_green(client)
    assert info.config.quantization_config == QUANTIZATIONS[name]
    quantization = models.QuantizationSearchParams(rescore=True, oversampling=8.0)
    params = models.SearchParams(hnsw_ef=COUNT, quantization=quantization)
    found = client.query_points(NAME, keys[7].tolist(), limit=1, search_params=params).points
    assert (ids(found), found[0].score) == ([7], 0.0)


def test_quantization_changes_and_goes(client: QdrantClient) -> None:
    create(client)
    upsert(client, points(rows(COUNT)))
    client.update_collection(NAME, quantization_config=QUANTIZATIONS["turbo4"])
    info = wait_until_green(client)
    assert info.config.quantization_config == QUANTIZATIONS["turbo4"]
    client.update_collection(NAME, quantization_config=models.Disabled.DISABLED)
    info = wait_until_green(client)
    assert info.config.quantization_config is None
    assert info.indexed_vectors_count == COUNT


def test_after_a_restart_it_is_grey_until_somebody_asks(
    client: QdrantClient, standin: QdrantStandIn
) -> None:
    create(client)
    standin.optimizers.pause()
    upsert(client, points(rows(COUNT)))
    client.update_collection(NAME, quantization_config=QUANTIZATIONS["int8"])
    standin.stop()
    standin.start()
    info = client.get_collection(NAME)
    assert (info.status, info.indexed_vectors_count) == (models.CollectionStatus.GREY, 0)
    assert info.config.quantization_config == QUANTIZATIONS["int8"]
    client.update_collection(NAME, optimizers_config=models.OptimizersConfigDiff())
    assert wait_until_green(client).indexed_vectors_count == COUNT
