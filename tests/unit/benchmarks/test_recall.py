"""What searches find, in every state of an index and with every compression: the table's command on a small layer."""

from __future__ import annotations

import io
from dataclasses import asdict

import pytest
from rich.console import Console

from benchmarks.recall import COMPRESSIONS, STATES, Settings, rows, table_of
from router_service.backends.qdrant_server.collection import OWN
from tests.engines import SERVERS, url_of


def test_nothing_that_is_near_is_missed() -> None:
    layouts = ((0.1, 0.5), (0.95,))
    labels = ("none", "int8", "turbo4", "float16")
    found = list(rows(Settings((2500,), 64, 24, layouts, labels)))
    assert {row.state for row in found} == set(STATES)
    assert {row.kind for row in found} == {"same", "own"}
    assert {row.share for row in found} == {0.0, 0.1, 0.5, 0.95}
    missing = [row for row in found if row.recall < 0.99 or row.nearest_wrong]
    assert not missing
    out = io.StringIO()
    Console(file=out, width=200).print(table_of([asdict(row) for row in found]))
    assert "worn" in out.getvalue()


@pytest.mark.parametrize("engine", SERVERS)
def test_nor_on_a_server(engine: str, request: pytest.FixtureRequest) -> None:
    """A small layer with every method that a server has; one that is large enough to be searched by its index."""
    url, layouts = url_of(engine, request), ((0.1, 0.5), (0.95,))
    small = list(rows(Settings((300,), 64, 24, layouts, OWN, backend=url)))
    large = list(rows(Settings((6_000,), 512, 24, ((0.1,),), ("none", "int8"), backend=url)))
    assert {row.compression for row in small} == set(OWN)
    assert {row.state for row in large} == set(STATES)
    # A server that indexes anew what was replaced is asked meanwhile.
    least = {"outdated": 0.97, "worn": 0.95}
    settled = [row for row in large if row.share or row.state not in least]
    assert not [row for row in small + settled if row.recall < 0.99 or row.nearest_wrong]
    assert not [row for row in large if row.recall < least.get(row.state, 0.99)]


def test_every_method_is_in_the_table() -> None:
    assert set(COMPRESSIONS) > {"none", "int8", "turbo4", "binary"}
