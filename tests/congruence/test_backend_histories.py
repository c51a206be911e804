"""Random histories of writes, searches, restarts and crashes: every engine that keeps entries against the NumPy oracle.

Keys lie on a small grid, so that ties and duplicates are common. A crash of the embedded engine is a copy of the files
of an open collection: what the page cache holds after SIGKILL. In front of a server only the service can crash: it is
gone from one call to the next.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from router_service.arrays import F32, Entries, ExampleRef, Provenance
from router_service.backends.base import (
    Backend,
    CollectionSpec,
    Compression,
    Metric,
    Quantization,
    SearchOptions,
    Verifiable,
)
from router_service.backends.edge.backend import EdgeBackend
from router_service.backends.exact import ExactBackend
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.connection import Connection
from tests.congruence.knn_reference import assert_nearest
from tests.engines import ENGINES, fresh_prefix, options_for, remove_collections, url_of

DIMENSION, WIDTH = 3, 2
# Every entry is rescored: which of several close ones int8 keys let through is not the question here.
OPTIONS = SearchOptions(oversampling=20.0)
NAME = "layer"

identifiers = st.integers(0, 12) | st.just(2**63 - 1)
coordinates = st.integers(-2, 2).map(float) | st.just(0.1)
keys = st.lists(coordinates, min_size=DIMENSION, max_size=DIMENSION).filter(any)
rows = st.lists(keys, min_size=1, max_size=6)
examples = st.sampled_from(["", "a", "b"])
entry = st.tuples(identifiers, keys, st.floats(width=32, allow_nan=False), examples)


def entries_from(drawn: list[tuple[int, list[float], float, str]]) -> Entries:
    return Entries(
        np.array([row[0] for row in drawn], np.uint64),
        np.array([row[1] for row in drawn], np.float32),
        np.array([[row[2], 1.0] for row in drawn], np.float32),
        [Provenance("s", row[3], position) for position, row in enumerate(drawn)],
    )


class EdgeWorld:
    """Collections in a directory."""

    def __init__(self, root: Path) -> None:
        self.directory, self.life = Path(tempfile.mkdtemp(dir=root)), 0

    def start(self) -> Backend:
        self.backend = EdgeBackend(self.directory / str(self.life), min_free_bytes=0)
        return self.backend

    def crash(self) -> None:
        old = self.directory / str(self.life)
        self.life += 1
        shutil.copytree(old, self.directory / str(self.life))
        self.backend.close()
        shutil.rmtree(old)

    def end(self) -> None:
        shutil.rmtree(self.directory)


class ServerWorld:
    """Collections of a server, under a prefix of their own."""

    def __init__(self, url: str) -> None:
        self.options = options_for(url, fresh_prefix())

    def start(self) -> Backend:
        self.connection = Connection(self.options)
        return ServerBackend(self.connection)

    def crash(self) -> None:
        self.connection.close()

    def end(self) -> None:
        remove_collections(self.options)


class History(RuleBasedStateMachine):
    make_world: Callable[[], EdgeWorld | ServerWorld]
    metric: Metric

    def __init__(self) -> None:
        super().__init__()
        self.world = type(self).make_world()
        self.spec = CollectionSpec(DIMENSION, self.metric, WIDTH)
        self.oracle = ExactBackend().create(NAME, self.spec)

    @initialize()
    def begin(self) -> None:
        self.backend = self.world.start()
        self.collection = self.backend.create(NAME, self.spec)

    def _start_again(self) -> None:
        self.backend = self.world.start()
        self.collection = self.backend.open(NAME, self.spec)

    @rule(drawn=st.lists(entry, min_size=0, max_size=10), fsync=st.booleans())
    def upsert(self, drawn: list[tuple[int, list[float], float, str]], fsync: bool) -> None:
        if drawn:
            self.collection.upsert(entries_from(drawn), fsync=fsync)
            self.oracle.upsert(entries_from(drawn), fsync=fsync)

    @rule(queries=rows, k=st.integers(1, 20), example=st.none() | examples)
    def search(self, queries: list[list[float]], k: int, example: str | None) -> None:
        points: F32 = np.array(queries, np.float32)
        refs = [] if example is None else [ExampleRef("s", example)]
        stored = self.oracle.scroll(None, 100)
        exclusions = [refs[0] if refs else None] * len(queries)
        for backend in (self.collection, self.oracle):
            found = backend.search(points, k, OPTIONS, refs)
            assert_nearest(found, stored, points, k, self.metric, exclusions)

    @rule(after=st.none() | identifiers, limit=st.integers(0, 20), with_keys=st.booleans())
    def scroll(self, after: int | None, limit: int, with_keys: bool) -> None:
        found, expected = (
            backend.scroll(after, limit, with_keys=with_keys)
            for backend in (self.collection, self.oracle)
        )
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.keys, expected.keys)
        assert found.values.tobytes() == expected.values.tobytes()
        assert list(found.provenance) == list(expected.provenance)

    @rule(ids=st.lists(identifiers, max_size=6), fsync=st.booleans())
    def delete(self, ids: list[int], fsync: bool) -> None:
        wanted = np.array(ids, np.uint64)
        counts = [each.delete(wanted, fsync=fsync) for each in (self.collection, self.oracle)]
        assert counts[0] == counts[1]

    @rule()
    def flush(self) -> None:
        self.collection.flush()

    @rule()
    def verify(self) -> None:
        if isinstance(self.collection, Verifiable):
            self.collection.verify()

    @rule()
    def restart(self) -> None:
        self.backend.close()
        self._start_again()

    @rule()
    def crash(self) -> None:
        self.world.crash()
        self._start_again()

    @precondition(lambda self: self.oracle.info().compression.quantization is Quantization.NONE)
    @rule()
    def optimize(self) -> None:
        for collection in (self.collection, self.oracle):
            collection.optimize(Compression(Quantization.INT8))

    @invariant()
    def same_size(self) -> None:
        if hasattr(self, "collection"):
            info, expected = self.collection.info(), self.oracle.info()
            assert (info.entries, info.compression) == (expected.entries, expected.compression)
            assert 0 <= info.indexed_entries <= info.entries

    def teardown(self) -> None:
        self.backend.close()
        self.world.end()


@pytest.fixture(params=ENGINES[1:])
def make_world(
    request: pytest.FixtureRequest, fast_dir: Path
) -> Callable[[], EdgeWorld | ServerWorld]:
    if request.param == "embedded":
        return lambda: EdgeWorld(fast_dir)
    url = url_of(request.param, request)
    return lambda: ServerWorld(url)


@pytest.mark.parametrize("metric", list(Metric))
def test_an_engine_behaves_like_numpy_in_any_history(
    make_world: Callable[[], EdgeWorld | ServerWorld], metric: Metric
) -> None:
    machine = type(
        "History", (History,), {"make_world": staticmethod(make_world), "metric": metric}
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=8,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
