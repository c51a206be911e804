"""Faults of the Qdrant server behind a service, and of the way to it: a stand-in that speaks Qdrant's gRPC."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.faults.cluster_load import Load
from tests.faults.rounds import HANG_S, Round
from tests.qdrant_standin.process import StandInProcess
from tests.qdrant_standin.tcp_faults import TcpFaults
from tests.sidecar import Sidecar

# That a lookup may take the server, and a write: the service's own deadlines.
LOOKUP_S, WRITE_S = 1.0, 10.0
HELD_S = 4.0
# Lookups are as they were, though the service has known for a moment that the server is away.
FLUSH = ("--flush-interval-s", "0.2", "--qdrant-timeout-s", str(LOOKUP_S))


class Behind(NamedTuple):
    """A server, the way to it, the service that uses it, and its load."""

    server: StandInProcess
    way: TcpFaults
    service: Sidecar
    load: Load


@contextmanager
def behind(round_: Round, held_s: float = HELD_S + WRITE_S) -> Iterator[Behind]:
    with (
        StandInProcess(round_.directory / "qdrant") as server,
        TcpFaults(server.port) as way,
    ):
        service = round_.serve(*FLUSH, backend=way.url)
        with round_.load(service, held_s=held_s) as load:
            yield Behind(server, way, service, load)


def slow(round_: Round) -> None:
    """Answers come late: in time, and too late for lookups."""
    with behind(round_) as this:
        for seconds in (0.05, 0.3, 2 * LOOKUP_S):
            round_.injects()
            this.server.faults.delay(seconds)
            this.load.wait_for_more(**{"ended writes": 1})
            round_.pause(1.0)
            this.server.faults.lift()
            round_.recover(this.load)


def black_hole(round_: Round) -> None:
    """No answer at all, from the server and then from the network."""
    with behind(round_) as this:
        begin: list[tuple[Callable[[], object], Callable[[], object]]] = [
            (this.server.faults.black_hole, this.server.faults.lift),
            (this.way.black_hole, this.way.heal),
        ]
        for begin_it, end_it in begin:
            round_.injects()
            begin_it()
            round_.pause(HELD_S)
            end_it()
            round_.recover(this.load)


def reset(round_: Round) -> None:
    """Every connection ends with RST, again and again."""
    with behind(round_) as this:
        for _ in range(8):
            round_.injects()
            this.way.reset()
            round_.recover(this.load)
            round_.pause(0.0, 0.3)


def flapping(round_: Round) -> None:
    """The server is away and back, for moments."""
    with behind(round_) as this:
        for _ in range(6):
            round_.injects()
            this.way.refuse()
            this.way.reset()
            round_.pause(0.1, 0.6)
            this.way.heal()
            round_.pause(0.1, 0.6)
        round_.recover(this.load)


def killed(round_: Round) -> None:
    """SIGKILL of the server, which comes back."""
    with behind(round_) as this:
        for _ in range(2):
            round_.injects()
            this.server.kill()
            round_.pause(0.5, 1.5)
            began_s = time.monotonic()
            this.server.restart()
            round_.recover(this.load, began_s)


def wrong_version(round_: Round) -> None:
    """The server becomes one that the service cannot use; the service is refused when it starts, and works before."""
    with behind(round_, held_s=HANG_S) as this:
        for version in ("1.7.4", "2.0.0", "nonsense"):
            round_.injects()
            this.server.faults.version(version)
            this.load.wait_for_more(lookups=2)
            round_.require_refused(round_.directory / "other", version, backend=this.way.url)
        this.service.kill()
        this.server.faults.version("1.20.0")
        began_s = time.monotonic()
        round_.serve_again(this.service, *FLUSH, backend=this.way.url)
        round_.recover(this.load, began_s)
