"""Messages that nobody sends, to every method of every service, in one run against one sidecar with tokens.

    python -m tests.faults.fuzz --messages 100000 --seed 0 --out DIR

Valid requests with changed fields, truncated and bit-flipped ones, garbage, wrong wire types, lone surrogates, groups
twenty thousand deep, megabytes; one message or several in a call, also where one is expected; with a token that may do
all, another one, a wrong one or none; over gRPC, in the frames of the direct socket, and as bytes at gRPC's own socket.
Some calls are cancelled. Each must be answered or refused, within 5 s, never with INTERNAL or UNKNOWN; the process
stays the same, and the memories that nobody touched answer in the end, and after a restart, as before. Writes fuzz.json
and fuzz.md, and the messages of each violation; status 1 when there is one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from knnmoe.channels import open_channel
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import snapshots_pb2 as snapshots_pb
from knnmoe.v1.memory_admin_pb2_grpc import MemoryAdminServiceStub
from knnmoe.v1.routing_pb2_grpc import RoutingServiceStub
from knnmoe.v1.snapshots_pb2_grpc import SnapshotServiceStub

from tests.faults.fuzz_client import GIVE_UP_S, HANG_S, LOOK_EVERY_S, Client, Clock, Tally
from tests.faults.messages import (
    SNAPSHOT,
)
from tests.faults.results import counted, publish, say, table
from tests.faults.soak import descendants, entries_in, resident_bytes
from tests.integration.identities import Place
from tests.sidecar import (
    ASSIGNMENT,
    EXPERTS,
    LAYERS,
    LOGIT_DELTA,
    LOGITS,
    Sidecar,
    make_fingerprint,
    random_assignments,
    random_entries,
    random_keys,
    route_request,
)

THREADS, SAY_EVERY = 6, 30
_COLUMNS = (
    *("RPC", "messages:", "calls:", "answered:", "refused"),
    *("slowest, ms:", "longest silence, ms:"),
)
# The memories that nobody touches.
KEPT = {"kept-assignments": ASSIGNMENT, "kept-deltas": LOGIT_DELTA, "kept-logits": LOGITS}
KEPT_ENTRIES = 60
# Of the service's log.
DEFECTS = ("Traceback", "panicked")


class Kept:
    """The memories that nobody touches."""

    def __init__(self, sidecar: Sidecar, place: Place) -> None:
        self._sidecar, self._place = sidecar, place

    def make(self) -> None:
        """One of each kind, entries in every layer, and a snapshot of each."""
        with self._channel() as channel:
            admin = MemoryAdminServiceStub(channel)
            for name, kind in KEPT.items():
                create = admin_pb.CreateMemoryRequest(name=name, fingerprint=make_fingerprint())
                create.settings.kind = kind
                create.settings.gamma.append(0.05)
                digest = admin.CreateMemory(create, timeout=GIVE_UP_S).memory.model_digest
                for layer in range(LAYERS):
                    upsert = admin_pb.UpsertRequest(
                        memory=name,
                        layer=layer,
                        entries=random_entries(kind, KEPT_ENTRIES, seed=layer),
                        model_digest=digest,
                        durability=admin_pb.DURABILITY_FSYNC,
                    )
                    list(admin.Upsert(iter([upsert]), timeout=GIVE_UP_S))
                snapshot = snapshots_pb.CreateSnapshotRequest(memory=name, name=SNAPSHOT)
                list(SnapshotServiceStub(channel).CreateSnapshot(snapshot, timeout=GIVE_UP_S))

    def state(self) -> dict[str, Any]:
        """All that is served of them: settings, entries, snapshots, and answers to a lookup in each layer."""
        with self._channel() as channel:
            return {name: self._state_of(name, kind, channel) for name, kind in KEPT.items()}

    def _state_of(self, name: str, kind: int, channel: grpc.Channel) -> dict[str, Any]:
        admin, routing = MemoryAdminServiceStub(channel), RoutingServiceStub(channel)
        about = admin_pb.DescribeMemoryRequest(memory=name)
        described = admin.DescribeMemory(about, timeout=GIVE_UP_S).memory
        rng, answers, entries = np.random.default_rng(5), [], []
        for layer in range(LAYERS):
            own = random_assignments(rng, 8) if kind == ASSIGNMENT else random_keys(rng, 8, EXPERTS)
            request = route_request(
                *(name, described.model_digest, random_keys(rng, 8), own),
                layer=layer,
                with_neighbours=True,
            )
            answer = routing.Route(request, timeout=GIVE_UP_S)
            answer.ClearField("times")
            answer.ClearField("memory_version")
            answers.append(answer.SerializeToString(deterministic=True))
            export = admin_pb.ExportRequest(memory=name, layer=layer)
            entries += [
                each.SerializeToString(deterministic=True)
                for each in admin.Export(export, timeout=GIVE_UP_S)
            ]
        listed = SnapshotServiceStub(channel).ListSnapshots(
            snapshots_pb.ListSnapshotsRequest(memory=name), timeout=GIVE_UP_S
        )
        described.ClearField("version")
        described.ClearField("epoch")
        return {
            "description": described.SerializeToString(deterministic=True),
            "answers": answers,
            "entries": entries,
            "snapshots": [each.SerializeToString() for each in listed.snapshots],
        }

    def _channel(self) -> grpc.Channel:
        return open_channel(self._sidecar.target, credentials=self._place.credentials("root"))


def run(
    messages: int, seed: int, out: Path, say: Callable[[str], None], threads: int = THREADS
) -> dict[str, Any]:
    """The whole run; what is in fuzz.json."""
    out.mkdir(parents=True, exist_ok=True)
    tally, began = Tally(out), time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        place = Place(directory / "identities")
        # Engines are in the service's own process: what they do not survive it does not.
        flags = [*place.flags(tokens=True), "--min-free-mib", "64"]
        started: Callable[[], Sidecar] = lambda: Sidecar(  # noqa: E731
            directory / "data", listen=f"unix:{directory}/s", flags=flags
        )
        with started() as sidecar:
            kept, pid = Kept(sidecar, place), sidecar.process.pid
            kept.make()
            before, held = kept.state(), _held_by(pid)
            clock = Clock(pid)
            clock.start()
            clients = [Client(sidecar, place, tally, seed, n, clock) for n in range(threads)]
            highest = _run_all(clients, messages, tally, say)
            clock.stop()
            clock.join()
            problems = [] if sidecar.process.poll() is None else ["the service has ended"]
            after = _held_by(pid)
            problems += _differences(before, kept.state(), "at the end")
            problems += _end_of(sidecar)
        with started() as again:
            problems += _differences(before, Kept(again, place).state(), "after a restart")
            again.stop_cleanly()
    result = {
        "messages": sum(each.messages for each in tally.of.values()),
        "calls": sum(each.calls for each in tally.of.values()),
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "forms": dict(tally.forms.most_common()),
        "of": {
            path: {**vars(each), "codes": dict(each.codes.most_common())}
            for path, each in sorted(tally.of.items())
        },
        "held_before": held,
        "held_after": after,
        "highest_rss_mib": round(highest, 1),
        "violations": [*tally.violations, *problems],
    }
    publish(out, "fuzz", result, report(result))
    return result


def _run_all(
    clients: Sequence[Client], messages: int, tally: Tally, say: Callable[[str], None]
) -> float:
    """Each its share, in a thread; the most MiB that the service had meanwhile. What ends a thread is a violation."""

    def work(client: Client, share: int) -> None:
        try:
            client.run(share)
        except Exception:  # noqa: BLE001  # of any kind: the run would be shorter than it says
            tally.violation(client.memory, [], traceback.format_exc())

    shares = [messages // len(clients) + (n < messages % len(clients)) for n in range(len(clients))]
    threads = [
        threading.Thread(target=work, args=each, daemon=True)
        for each in zip(clients, shares, strict=True)
    ]
    for thread in threads:
        thread.start()
    service, began, highest = clients[0].sidecar.process.pid, time.monotonic(), 0.0
    for tick in count(1):
        alive = [thread for thread in threads if thread.is_alive()]
        if not alive:
            return highest
        try:
            alive[0].join(LOOK_EVERY_S)
        except KeyboardInterrupt:
            tally.violation("", [], "the run was ended early")
            for client in clients:
                client.stopped.set()
        highest = max(highest, resident_bytes(service) / 2**20)
        if tick % SAY_EVERY == 0:
            sent, now = sum(each.messages for each in list(tally.of.values())), time.monotonic()
            say(
                f"{now - began:.0f} s: {sent} of {messages} messages, {len(tally.violations)} violations, "
                f"RSS {resident_bytes(service) / 2**20:.0f} MiB"
            )
    raise AssertionError("count() ends never")


def _held_by(service: int) -> dict[str, float]:
    """By the service and its engines."""
    own = [service, *descendants(service)]
    return {
        "RSS of the service, MiB": round(resident_bytes(service) / 2**20, 1),
        "RSS with its engines, MiB": round(sum(map(resident_bytes, own)) / 2**20, 1),
        "descriptors": sum(entries_in(Path(f"/proc/{pid}/fd")) for pid in own),
        "threads": sum(entries_in(Path(f"/proc/{pid}/task")) for pid in own),
        "processes": len(own),
    }


def _end_of(sidecar: Sidecar) -> list[str]:
    """What is wrong with how it stops, and what it logged that no service should, with the lines behind it."""
    sidecar.close_channel()
    problems = [] if (code := sidecar.stop()) == 0 else [f"the service ended with {code}"]
    lines = sidecar.stderr.splitlines()
    for number, line in enumerate(lines):
        if any(word in line for word in DEFECTS):
            problems.append("\n".join(lines[max(0, number - 1) : number + 30]))
    return problems


def _differences(before: dict[str, Any], now: dict[str, Any], when: str) -> list[str]:
    return [
        f"{when}: the {part} of {name} are others"
        for name in before
        for part in before[name]
        if before[name][part] != now[name][part]
    ]


def report(result: dict[str, Any]) -> str:
    """In Markdown."""
    rows = [_row(path, each) for path, each in result["of"].items()]
    codes = Counter[str]()
    for each in result["of"].values():
        codes.update(each["codes"])
    held = [
        f"{name} {before:,} -> {result['held_after'][name]:,}"
        for name, before in result["held_before"].items()
    ]
    hangs = sum(each["hangs"] for each in result["of"].values())
    lines = [
        f"{result['messages']:,} messages in {result['calls']:,} calls, seed {result['seed']}, "
        f"{result['seconds']:,} s. INTERNAL or UNKNOWN: {codes['INTERNAL'] + codes['UNKNOWN']}; "
        f"silent over {HANG_S:g} s: {hangs}; violations of all kinds: {len(result['violations'])}.",
        f"Forms: {counted(result['forms'])}.",
        f"Before -> after: {'; '.join(held)}; RSS of the service meanwhile at most {result['highest_rss_mib']:,} MiB.",
        "",
        table(_COLUMNS, rows),
        "",
        *(f"- {each[:2000]}" for each in result["violations"][:50]),
    ]
    return "\n".join(lines) + "\n"


def _row(path: str, each: dict[str, Any]) -> list[str]:
    codes = dict(each["codes"])
    answered, slowest_s, silent_s = codes.pop("OK", 0), each["slowest_s"], each["silent_s"]
    return [
        path.removeprefix("/knnmoe.v1.")[:60],
        *(f"{each['messages']:,}", f"{each['calls']:,}", f"{answered:,}", counted(codes)),
        *(f"{1000 * slowest_s:,.0f}", f"{1000 * silent_s:,.0f}"),
    ]


def main() -> int:
    """Prints the figures as Markdown; status 1 when there was a violation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=Path("fuzz-results"))
    arguments = parser.parse_args()
    result = run(arguments.messages, arguments.seed, arguments.out, say, arguments.threads)
    sys.stdout.write((arguments.out / "fuzz.md").read_text())
    return int(bool(result["violations"]))


if __name__ == "__main__":
    sys.exit(main())
