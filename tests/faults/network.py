"""A sidecar and a Qdrant cluster on a network that delays, drops and parts, under load.

    python -m tests.faults.network --seed 0 --out DIR

The sidecar is in a network namespace, and each of the three nodes (the stand-in) in another; between them a program
passes the packets on (tests/faults/wire.py). Writers and readers at the sidecar go on through each fault and after it.
Looked at are: that what was acknowledged is there and what was not is whole, on every replica alike; that no answer is
wrong; with what status calls are refused; how long lookups take; and when all is as before. DIR gets network.json and
network.md; status 1: something is not so. Needs Linux, root and ip (Debian's package iproute2); else it says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import results
from tests.faults.cluster_load import Call, Load, options, wait_until_equal
from tests.faults.namespaces import Network, inside, obstacle
from tests.faults.results import counted, publish, quantiles, say, spread
from tests.qdrant_standin import QdrantCluster
from tests.sidecar import Sidecar

NODES, SIDECAR, LOST = 3, 0, 3  # hosts: the sidecar, then nodes; which node is lost
WRITES = ("upserts", "deletes")
_BACK_S, _LOOK_S = 60.0, 0.02
_COLUMNS = (
    *("fault", "lookups:", "ms p50 / p99 / max:", "writes:", "ms p50 / p99 / max:", "refused"),
    *("packets late / lost:", "not as acknowledged:", "wrong answers:"),
    *("back after s:", "all equal after s:"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where it happens."""

    network: Network
    cluster: QdrantCluster

    def links(self, **how: float) -> None:
        """Those between the sidecar and each node."""
        for node in range(1, NODES + 1):
            self.network.between(SIDECAR, node, **how)


@contextmanager
def _healed(place: Place) -> Iterator[None]:
    try:
        yield
    finally:
        place.network.heal()


@contextmanager
def nothing(place: Place) -> Iterator[None]:
    """What the others are compared with."""
    yield


@contextmanager
def delay(place: Place) -> Iterator[None]:
    """Packets are 40 to 60 ms late."""
    with _healed(place):
        place.links(delay_s=0.05, jitter_s=0.01)
        yield


@contextmanager
def loss(place: Place) -> Iterator[None]:
    """Of 100 packets 10 are lost."""
    with _healed(place):
        place.links(loss=0.1)
        yield


@contextmanager
def delay_and_loss(place: Place) -> Iterator[None]:
    """Packets are 10 to 30 ms late, and of 100 5 are lost."""
    with _healed(place):
        place.links(delay_s=0.02, jitter_s=0.01, loss=0.05)
        yield


@contextmanager
def parted_from_one(place: Place) -> Iterator[None]:
    """The sidecar reaches two of three nodes; they reach each other."""
    with _healed(place):
        place.network.between(SIDECAR, LOST, loss=1.0)
        yield


@contextmanager
def parted_from_all(place: Place) -> Iterator[None]:
    """The sidecar reaches no node."""
    with _healed(place):
        place.links(loss=1.0)
        yield


@contextmanager
def one_node_gone(place: Place) -> Iterator[None]:
    """Nobody reaches one of three nodes, and it reaches nobody."""
    peer = place.cluster.peers[LOST - 1]
    with _healed(place):
        place.network.between(SIDECAR, LOST, loss=1.0)
        peer.cut_off()
        try:
            yield
        finally:
            peer.join()


FAULTS = (
    nothing,
    delay,
    loss,
    delay_and_loss,
    parted_from_one,
    parted_from_all,
    one_node_gone,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Of a run. Counts are of each phase: before, during and after a fault."""

    seed: int = 0
    acknowledged: int = 30
    lookups: int = 60
    fault_s: float = 6.0
    # Of the service's lookups at the cluster: its default.
    timeout_s: float = 1.0


def run(
    plan: Plan, faults: Sequence[Callable[[Place], Any]], home: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each fault, one after the other."""
    rows = []
    with ExitStack() as stack:
        network = stack.enter_context(Network(1 + NODES, plan.seed))
        cluster = stack.enter_context(QdrantCluster(home / "qdrant", hosts=network.hosts[1:]))
        how = options(cluster, 0, 1, plan.timeout_s)
        with inside(network.hosts[SIDECAR].namespace):
            service = stack.enter_context(Sidecar(home / "data", listen=f"unix:{home}/s", **how))
        place = Place(network, cluster)
        with Load([service]) as load:
            load.wait_for_more(acknowledged=3, lookups=5)  # what is first takes longer
            for fault in faults:
                rows.append(_through(load, place, fault, plan))
                say(f"{fault.__name__}: {json.dumps(rows[-1])}")
        service.stop_cleanly()
    return rows


def _through(load: Load, place: Place, fault: Callable[[Place], Any], plan: Plan) -> dict[str, Any]:
    name, began = fault.__name__, len(load.calls)
    load.phase = name
    packets = place.network.heal()
    with fault(place):
        began_s = time.monotonic()
        _wait(load, began_s + plan.fault_s, began, plan)
    over_s = time.monotonic()
    load.phase = f"after {name}"
    calls = load.calls[began:]
    back_s = _until_back(load, over_s)
    after = place.network.heal()
    lost, whole_s = _lost(load, place)
    row = _row(name, calls)
    row |= {f"packets_{kind}": after[kind] - packets[kind] for kind in after}
    row |= {"back_s": round(back_s, 3), "equal_s": round(whole_s - over_s, 2)}
    row |= {"lost": lost, "wrong": [*load.wrong]}
    load.wrong.clear()
    return row


def _wait(load: Load, least_s: float, began: int, plan: Plan) -> None:
    """For the load to have gone on for so long, and for so many calls to have ended, well or not."""
    give_up_s = least_s + _BACK_S
    while time.monotonic() < give_up_s and not load.wrong:
        ended = Counter(call.kind in WRITES for call in load.calls[began:])
        enough = ended[True] >= plan.acknowledged and ended[False] >= plan.lookups
        if enough and time.monotonic() >= least_s:
            return
        time.sleep(_LOOK_S)
    if not load.wrong:
        load.wrong.append(f"{load.phase}: calls do not end")


def _until_back(load: Load, over_s: float) -> float:
    """Seconds until a lookup and a write that began after the fault have succeeded; inf: they have not."""
    while time.monotonic() < over_s + _BACK_S:
        after = [c for c in load.calls if c.began_s >= over_s and c.status == "OK"]
        ended = [
            [call.ended_s for call in after if (call.kind in WRITES) == write]
            for write in (True, False)
        ]
        if all(ended):
            return max(min(each) for each in ended) - over_s
        time.sleep(_LOOK_S)
    load.wrong.append(f"{load.phase}: nothing succeeds {_BACK_S:g} s later")
    return float("inf")


def _lost(load: Load, place: Place) -> tuple[list[str], float]:
    """What differs from what was acknowledged, or from replica to replica; and when that was looked at."""
    with load.at_rest():
        try:
            load.wait_until_written()
            wait_until_equal(place.cluster)
            equal_s = time.monotonic()
            load.check()
        except AssertionError as problem:
            return [str(problem)], time.monotonic()
    return [], equal_s


def _row(name: str, calls: Sequence[Call]) -> dict[str, Any]:
    lookups = [call for call in calls if call.kind not in WRITES]
    writes = [call for call in calls if call.kind in WRITES]
    refused = Counter(
        f"{'write' if call.kind in WRITES else 'lookup'} {call.status}"
        for call in calls
        if call.status != "OK"
    )
    return {
        "fault": name,
        "lookups": len(lookups),
        "writes": len(writes),
        "acknowledged": sum(call.status == "OK" for call in writes),
        "refused": dict(sorted(refused.items())),
        "lookup_ms": _times(lookups),
        "write_ms": _times(writes),
    }


def _times(calls: Sequence[Call]) -> dict[str, float]:
    return quantiles([1000 * (call.ended_s - call.began_s) for call in calls], 1)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    cells = [
        (
            *(row["fault"], row["lookups"], spread(row["lookup_ms"], 0)),
            *(row["writes"], spread(row["write_ms"], 0), counted(row["refused"])),
            f"{row['packets_delayed']} / {row['packets_dropped']}",
            *(len(row["lost"]), len(row["wrong"])),
            *(f"{row['back_s']:.2f}", f"{row['equal_s']:.2f}"),
        )
        for row in rows
    ]
    return results.table(_COLUMNS, cells) + "\n"


def main() -> int:
    """Status 1: something was not as it must be."""
    usual = Plan()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is lost, and how late")
    parser.add_argument("--out", type=Path, required=True, help="directory of what was found")
    parser.add_argument("--fault-s", type=float, default=usual.fault_s, help="a fault's least time")
    options = parser.parse_args()
    if (why := obstacle()) is not None:
        say(f"skipped: {why}")
        return 0
    with tempfile.TemporaryDirectory() as made:
        rows = run(Plan(options.seed, fault_s=options.fault_s), FAULTS, Path(made), say)
    shown = table(rows)
    publish(options.out, "network", rows, shown)
    sys.stdout.write(shown)
    broken = [problem for row in rows for problem in (*row["lost"], *row["wrong"])]
    for problem in broken:
        say(f"broken: {problem} (seed {options.seed})")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
