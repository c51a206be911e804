"""Records that several services share on a Qdrant server. On the stand-in only."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from router_service.backends.qdrant_server import failures, records
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.failures import Meaning
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.records import Records
from router_service.errors import BackendUnavailable
from tests.integration.server_snapshots import until
from tests.qdrant_standin import QdrantStandIn

HALF = "Service internal error: 1 out of 2 shards failed to apply operation."


@pytest.fixture
def server(fast_dir: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(fast_dir / "qdrant") as running:
        yield running


@pytest.fixture
def opened(
    server: QdrantStandIn, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Records]]:
    """Records as services have them, whose clock tells no time twice."""
    monkeypatch.setitem(failures._PAUSES_S, Meaning.PASSING, ())
    monkeypatch.setattr(records, "_now_ms", itertools.count(1_700_000_000_000).__next__)
    with ExitStack() as stack:

        def open_one() -> Records:
            connection = Connection(ServerOptions(server.url))
            stack.callback(connection.close)
            made = Records(connection, "knnmoe~memories")
            made.ensure()
            return made

        yield open_one


def half_done(server: QdrantStandIn, own: Records, text: str) -> None:
    server.faults.fail(grpc.StatusCode.INTERNAL, HALF, "Upsert", calls=1)
    with pytest.raises(BackendUnavailable):
        own.write("law", {"text": text})


def text_of(own: Records) -> str | None:
    found = own.read("law")
    return None if found is None else found["text"]


def test_a_half_done_change_is_mended(server: QdrantStandIn, opened: Callable[[], Records]) -> None:
    """Once: as the replica has it that answers."""
    own = opened()
    own.write("law", {"text": "old"})
    half_done(server, own, "new")
    calls = server.faults.calls["Upsert"]
    own.mend()
    own.mend()
    assert server.faults.calls["Upsert"] == calls + 1
    assert text_of(own) == "old"


def test_mending_leaves_what_another_service_changed_meanwhile(
    server: QdrantStandIn, opened: Callable[[], Records]
) -> None:
    own, other = opened(), opened()
    own.write("law", {"text": "old"})
    half_done(server, own, "new")
    calls = server.faults.calls["Upsert"]
    held = server.faults.black_hole("Upsert", calls=1)
    mending = threading.Thread(target=own.mend)
    mending.start()
    until(lambda: server.faults.calls["Upsert"] > calls)
    other.write("law", {"text": "of another"})
    own.write("bible", {"text": "waits for nothing"})
    held.lift()
    mending.join()
    assert text_of(own) == "of another"


def test_mending_does_not_undo_the_next_change(
    server: QdrantStandIn, opened: Callable[[], Records]
) -> None:
    """Of this service: mending what was read before it is late."""
    own = opened()
    own.write("law", {"text": "old"})
    half_done(server, own, "new")
    calls = server.faults.calls["Upsert"]
    held = server.faults.black_hole("Upsert", calls=1)
    mending = threading.Thread(target=own.mend)
    mending.start()
    until(lambda: server.faults.calls["Upsert"] > calls)
    own.write("law", {"text": "newer"})
    held.lift()
    mending.join()
    assert text_of(own) == "newer"
