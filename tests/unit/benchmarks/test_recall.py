"""What searches find, in every state of an index and with every compression: the table's command on a small layer."""

from __future__ import annotations

import io
from dataclasses import asdict

import pytest
from rich.console import Console

from benchmarks.recall import COMPRESSIONS, STATES, Row, Settings, rows, table_of
from router_service.backends.qdrant_server.collection import OWN
from tests.engines import SERVERS, url_of

# While what was replaced is not indexed anew, an entry may have no way to it in the graph.
LEAST = {"outdated": 0.95, "worn": 0.95}
QUERIES = 192  # so that one that finds nothing is half a percent of them


def missed(found: list[Row]) -> list[Row]:
    """Rows of which too little was found."""
    usual = 0.99
    return [
        row
        for row in found
        if row.recall < LEAST.get(row.state, usual)
        or (row.nearest_wrong > 1 - usual and row.state not in LEAST)
    ]


def test_nothing_that_is_near_is_missed() -> None:
    few = list(rows(Settings((2500,), 64, QUERIES, ((0.1, 0.5),), ("none", "int8"))))
    found = few + list(rows(Settings((2500,), 64, QUERIES, ((0.95,),), ("turbo4", "float16"))))
    assert {row.state for row in found} == set(STATES)
    assert {row.kind for row in found} == {"same", "own"}
    assert {row.share for row in found} == {0.0, 0.1, 0.5, 0.95}
    assert not missed(found)
    out = io.StringIO()
    Console(file=out, width=200).print(table_of([asdict(row) for row in few]))
    assert "worn" in out.getvalue()


@pytest.mark.parametrize("engine", SERVERS)
def test_nor_on_a_server(engine: str, request: pytest.FixtureRequest) -> None:
    """A small layer with every method that a server has; one that is large enough to be searched by its index."""
    url, layouts = url_of(engine, request), ((0.1, 0.5), (0.95,))
    small = list(rows(Settings((300,), 64, 64, layouts, OWN, backend=url)))
    large = list(rows(Settings((1_500,), 2_048, 64, ((0.1,),), ("int8",), backend=url)))
    assert {row.compression for row in small} == set(OWN)
    assert {row.state for row in large} == set(STATES)
    assert not missed(small + large)


def test_every_method_is_in_the_table() -> None:
    assert set(COMPRESSIONS) > {"none", "int8", "turbo4", "binary"}
