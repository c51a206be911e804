"""`python -m benchmarks.node_loss --json FILE`: lookups while each of three nodes is killed, then hung.

The cluster is the stand-in in a process of its own, so times between nodes are not a real server's; what is measured is
what a service makes of a node that is lost. `--no-second-calls` is the same without hedging.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import report
from router_service.arrays import F32, Entries, Provenance
from router_service.backends.base import CollectionSpec, Metric, SearchOptions
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.calls import Lateness
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.errors import RoutingServiceError
from tests.qdrant_standin import ClusterProcess

ENTRIES, DIMENSION, NEIGHBOURS, THREADS = 2000, 64, 8, 2
# Around the event, and before it.
SECONDS, EVENT_AT_S = 4.0, 0.7
COLUMNS = ("p50_ms", "p99_ms", "slowest_ms", "lookups", "failed")
Times = list[tuple[float, bool]]


def main(
    json: Annotated[Path | None, typer.Option(help="Write the results here too.")] = None,
    second_calls: Annotated[bool, typer.Option(help="Ask a second node when one is late.")] = True,
) -> None:
    """Prints a row per event."""
    rows = {}
    with _cluster() as (cluster, connection, collection):
        if not second_calls:
            connection.lateness = Lateness(share=0.0)
        _timed(collection)
        rows["idle"] = _summary(_timed(collection))
        for lose, find in (("kill", "start"), ("hang", "resume")):
            for number, peer in enumerate(cluster.peers):
                times = _timed(collection, getattr(peer, lose))
                rows[f"{lose} {number}"] = _summary(times)
                getattr(peer, find)()
                cluster.wait_whole()
                while connection.nodes.away():
                    time.sleep(0.02)
        lateness = connection.lateness
        share = lateness.second_calls / lateness.calls
    table = Table("event", *COLUMNS, title=f"second calls: {share:.1%} of {lateness.calls}")
    for event, row in rows.items():
        table.add_row(event, *(f"{row[column]:.4g}" for column in COLUMNS))
    Console().print(table)
    if json is not None:
        found = {"machine": report.machine(), "second_calls_share": share, "rows": rows}
        json.write_text(dumps(found, indent=1) + "\n")


@contextmanager
def _cluster() -> Iterator[tuple[ClusterProcess, Connection, ServerCollection]]:
    """Three nodes, and one layer with two copies of each shard."""
    with (
        tempfile.TemporaryDirectory() as directory,
        ClusterProcess(Path(directory) / "cluster") as cluster,
    ):
        connection = Connection(ServerOptions(",".join(cluster.urls), replication_factor=2))
        backend = ServerBackend(connection)
        try:
            collection = backend.create("layer", CollectionSpec(DIMENSION, Metric.EUCLID, 4))
            collection.upsert(_entries())
            yield cluster, connection, collection
        finally:
            backend.close()


def _entries() -> Entries:
    random = np.random.default_rng(0)
    keys, values = (
        random.normal(size=(ENTRIES, width)).astype(np.float32) for width in (DIMENSION, 4)
    )
    return Entries(np.arange(ENTRIES, dtype=np.uint64), keys, values, [Provenance()] * ENTRIES)


def _timed(collection: ServerCollection, event: Callable[[], Any] | None = None) -> Times:
    """Seconds of each lookup, and whether it was answered."""
    times: Times = []
    end = time.monotonic() + SECONDS
    queries = np.random.default_rng(1).normal(size=(THREADS, 1, DIMENSION)).astype(np.float32)

    def look_up(query: F32) -> None:
        while (began := time.monotonic()) < end:
            try:
                collection.search(query, NEIGHBOURS, SearchOptions())
            except RoutingServiceError as error:
                typer.echo(f"failed: {error}", err=True)
                times.append((time.monotonic() - began, False))
            else:
                times.append((time.monotonic() - began, True))

    threads = [threading.Thread(target=look_up, args=(query,)) for query in queries]
    for thread in threads:
        thread.start()
    if event is not None:
        time.sleep(EVENT_AT_S)
        event()
    for thread in threads:
        thread.join()
    return times


def _summary(times: Times) -> dict[str, float]:
    took_ms = 1000.0 * np.array([seconds for seconds, _ in times])
    return {
        "p50_ms": float(np.quantile(took_ms, 0.5)),
        "p99_ms": float(np.quantile(took_ms, 0.99)),
        "slowest_ms": float(took_ms.max()),
        "lookups": float(len(times)),
        "failed": float(sum(not answered for _, answered in times)),
    }


if __name__ == "__main__":
    typer.run(main)
