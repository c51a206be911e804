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
import json
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import status_pb2
from knnmoe.channels import open_channel
from knnmoe.client import Credentials, service_error
from knnmoe.client.direct import ANSWER, REQUEST, SUFFIX, TOKEN
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import snapshots_pb2 as snapshots_pb
from knnmoe.v1.memory_admin_pb2_grpc import MemoryAdminServiceStub
from knnmoe.v1.operations_pb2_grpc import OperationServiceStub
from knnmoe.v1.routing_pb2_grpc import RoutingServiceStub
from knnmoe.v1.snapshots_pb2_grpc import SnapshotServiceStub

from tests.faults.messages import (
    FORMS,
    HEALTH,
    METHODS,
    SNAPSHOT,
    path_of,
    read_enough,
    request_class,
    spoilt,
    valid,
)
from tests.faults.soak import descendants, entries_in, resident_bytes
from tests.integration.identities import SECRETS, Place
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

# A call hangs when nothing comes for so long; what is given up, and seen as a hang.
HANG_S, GIVE_UP_S = 5.0, 60.0
THREADS, LOOK_EVERY_S, SAY_EVERY = 6, 0.5, 30
KEPT = {"kept-assignments": ASSIGNMENT, "kept-deltas": LOGIT_DELTA, "kept-logits": LOGITS}
KEPT_ENTRIES, ENTRIES = 60, 8
DIRECT, SOCKET = "direct socket", "bytes at gRPC's socket"
NOBODYS = (
    "/knnmoe.v1.RoutingService/Rout",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/",
    "/knnmoe.v1.RoutingService/" + "x" * 2000,
)
NOT_THERE = "methods that are not there"
# What may change or remove the memories that valid requests are about.
DESTRUCTIVE = (
    *("/DeleteMemory", "/ReplaceMemory", "/RestoreSnapshot", "/DeleteSnapshot", "/UpdateSettings"),
    *("/Delete", "/Prune"),
)
AFRESH_EVERY = 300
# How often methods are called whose work is a copy of files, or a process of its own; other methods: 1.
RARE = {
    "MeasureQuantization": 0.04,
    **dict.fromkeys(("Quantize", "Optimize"), 0.1),
    **dict.fromkeys(("CreateSnapshot", "PackSnapshot", "RestoreSnapshot", "ReplaceMemory"), 0.3),
}
# Whose token a call shows, and how often of a hundred; "": none.
CALLERS = {"root": 82, "": 4, "wrong": 4, "reader": 4, "learner": 3, "all": 3}
MESSAGES_OF_STREAM, MESSAGES_OF_CALL = (1, 1, 2, 3, 6), (1,) * 18 + (0, 2)
CANCELLED_SHARE, OVERSIZED_SHARE = 0.02, 0.0002
DEFECTS = ("Traceback", "panicked")


@dataclass
class Figures:
    """Of one method, or another way in."""

    messages: int = 0
    calls: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    total_s: float = 0.0
    silent_s: float = 0.0
    hangs: int = 0


@dataclass
class Tally:
    """What all threads saw."""

    out: Path
    of: dict[str, Figures] = field(default_factory=dict)
    forms: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self, path: str, sent: Sequence[bytes], code: str, seconds: float, silent_s: float
    ) -> None:
        """A call that has ended with a status, OK, or `cancelled` by this client."""
        with self._lock:
            figures = self.of.setdefault(path, Figures())
            figures.calls += 1
            figures.messages += len(sent)
            figures.codes[code] += 1
            figures.total_s += seconds
            figures.slowest_s = max(figures.slowest_s, seconds)
            figures.silent_s = max(figures.silent_s, silent_s)
            figures.hangs += silent_s > HANG_S

    def violation(self, path: str, sent: Sequence[bytes], what: str) -> None:
        """Is said, and what was sent is kept."""
        with self._lock:
            number = len(self.violations)
            self.violations.append(f"{number}: {path}: {what}")
            kept = {
                "path": path,
                "what": what,
                "messages": [each[: 1 << 20].hex() for each in sent],
            }
            (self.out / f"violation-{number}.json").write_text(json.dumps(kept) + "\n")


class Clock(threading.Thread):
    """Seconds in which a process could have worked: those that its threads wait for a processor count in part.

    On a machine that others use a call takes longer than the service needs. A call that hangs does so by this clock
    too, for threads that wait for a lock, or for nothing, do not wait for a processor.
    """

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process, self._ended = process, threading.Event()
        self._at = time.monotonic(), 0.0, 1.0  # on the wall, on this clock, and its pace since

    def now(self) -> float:
        """Seconds since it was made."""
        then, seconds, pace = self._at
        return seconds + pace * (time.monotonic() - then)

    def run(self) -> None:
        """Until stop()."""
        before = schedule_of(self._process)
        while not self._ended.wait(LOOK_EVERY_S):
            ran, waited = schedule_of(self._process)
            worked, stood = max(0, ran - before[0]), max(0, waited - before[1])
            before = ran, waited
            self._at = (
                time.monotonic(),
                self.now(),
                worked / max(1, worked + stood) if stood else 1.0,
            )

    def stop(self) -> None:
        self._ended.set()


def schedule_of(process: int) -> tuple[int, int]:
    """Nanoseconds that the threads it has now have run, and have waited for a processor."""
    ran = waited = 0
    for task in Path(f"/proc/{process}/task").iterdir():
        try:
            numbers = (task / "schedstat").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        ran, waited = ran + int(numbers[0]), waited + int(numbers[1])
    return ran, waited


class Answers:
    """Those of one call, and how long it was silent by a clock before one came, or the end."""

    def __init__(self, call: Any, clock: Clock) -> None:
        self._call, self._clock = call, clock
        self._since, self.longest_s = clock.now(), 0.0

    def __iter__(self) -> Iterator[bytes]:
        for answer in self._call:
            self.silence()
            yield answer

    def cancel(self) -> None:
        self._call.cancel()

    def silence(self) -> None:
        """It ends now."""
        now = self._clock.now()
        self.longest_s, self._since = max(self.longest_s, now - self._since), now


class Client:
    """One thread's calls, about memories of its own. All that is random follows from the seed and the number."""

    def __init__(
        self, sidecar: Sidecar, place: Place, tally: Tally, seed: int, number: int, clock: Clock
    ) -> None:
        self.sidecar, self.tally, self.clock = sidecar, tally, clock
        self.memory, self.random = f"fuzz-{number}", random.Random(f"{seed} {number}")
        self.rng = np.random.default_rng([seed, number])
        self.path = sidecar.target.removeprefix("unix:")
        self.digest = self.operation = ""
        self.channel = open_channel(sidecar.target, 128 << 20, Credentials())
        self.root = open_channel(sidecar.target, credentials=place.credentials("root"))
        self.admin = MemoryAdminServiceStub(self.root)
        self.snapshots = SnapshotServiceStub(self.root)
        self.operations = OperationServiceStub(self.root)
        self.calls_left = 0
        self.stopped = threading.Event()

    def run(self, messages: int) -> None:
        """So many, in as many calls as it takes."""
        methods = [*METHODS, *HEALTH]
        often = [RARE.get(method.name, 1.0) for method in methods]
        ways, weights = [*methods, DIRECT, SOCKET, NOT_THERE], [*often, 2.0, 0.5, 0.5]
        with closing(self.channel), closing(self.root):
            while messages > 0 and not self.stopped.is_set():
                if self.calls_left <= 0:
                    self.begin_afresh()
                self.calls_left -= 1
                way = self.random.choices(ways, weights)[0]
                if isinstance(way, MethodDescriptor):
                    messages -= self.call(way, messages)
                elif way == DIRECT:
                    messages -= self.call_directly(messages)
                else:
                    self.knock() if way == SOCKET else self.call_nobody()
                    messages -= 1
            self.clear()

    def begin_afresh(self) -> None:
        """What mutated requests made goes, and what valid ones are about is made again."""
        self.clear()
        self.make_memories()
        self.make_snapshot()
        shutil.rmtree(self.sidecar.data / "packs" / self.memory, ignore_errors=True)
        self.calls_left = AFRESH_EVERY

    def clear(self) -> None:
        """Deletes its own memories, and those that nobody calls his own."""
        for name in self._names():
            if name.startswith(self.memory) or not name.startswith(("fuzz-", "kept-")):
                self._unless_gone(
                    self.admin.DeleteMemory, admin_pb.DeleteMemoryRequest(memory=name)
                )

    def make_memories(self) -> None:
        """Those two that are not there, each with its entries."""
        names = self._names()
        for name in (self.memory, f"{self.memory}-other"):
            if name not in names:
                request = admin_pb.CreateMemoryRequest(name=name, fingerprint=make_fingerprint())
                request.settings.kind = LOGIT_DELTA
                made = self.admin.CreateMemory(request, timeout=GIVE_UP_S).memory
                self.digest = made.model_digest
            upsert = admin_pb.UpsertRequest(
                memory=name,
                entries=random_entries(LOGIT_DELTA, ENTRIES),
                model_digest=self.digest,
            )
            list(self.admin.Upsert(iter([upsert]), timeout=GIVE_UP_S))

    def make_snapshot(self) -> None:
        """Anew."""
        self._unless_gone(
            self.snapshots.DeleteSnapshot,
            snapshots_pb.DeleteSnapshotRequest(memory=self.memory, name=SNAPSHOT),
        )
        create = snapshots_pb.CreateSnapshotRequest(memory=self.memory, name=SNAPSHOT)
        *_, last = self.snapshots.CreateSnapshot(create, timeout=GIVE_UP_S)
        self.operation = last.operation.id

    def _names(self) -> set[str]:
        reply = self.admin.ListMemories(admin_pb.ListMemoriesRequest(), timeout=GIVE_UP_S)
        return {memory.name for memory in reply.memories}

    def _unless_gone(self, call: Callable[..., object], request: object) -> None:
        """Another thread, or a message, may have been first."""
        try:
            call(request, timeout=GIVE_UP_S)
        except grpc.RpcError as error:
            if service_error(error).code is not grpc.StatusCode.NOT_FOUND:
                raise

    def message(self, method: MethodDescriptor) -> bytes:
        """One, in one of FORMS."""
        form = self.random.choices(list(FORMS), list(FORMS.values()))[0]
        self.tally.forms[form] += 1
        kind = request_class(method)
        request = valid(kind, self.memory, self.digest, self.rng, self.operation)
        if self.random.random() < OVERSIZED_SHARE:
            return bytes(65 << 20)
        return spoilt(request, form, self.random)

    # Ways in.

    def call(self, method: MethodDescriptor, most: int) -> int:
        """One over gRPC; how many messages it had."""
        path = path_of(method)
        counts = MESSAGES_OF_STREAM if method.client_streaming else MESSAGES_OF_CALL
        sent = [self.message(method) for _ in range(min(most, self.random.choice(counts)))]
        if self._sent(path, path, sent) == "OK" and path.endswith(DESTRUCTIVE):
            self.make_up_for(method.name)
        return len(sent)

    def make_up_for(self, method: str) -> None:
        """What a call has removed or changed is there again."""
        if method == "DeleteSnapshot":
            self.make_snapshot()
            return
        if method == "UpdateSettings":
            self._unless_gone(
                self.admin.DeleteMemory, admin_pb.DeleteMemoryRequest(memory=self.memory)
            )
        self.make_memories()

    def call_nobody(self) -> None:
        """A method that there is not."""
        self._sent(self.random.choice(NOBODYS), NOT_THERE, [self.random.randbytes(20)])

    def _sent(self, path: str, figures_of: str, sent: list[bytes]) -> str:
        """The code that the call ended with."""
        caller = self._caller()
        metadata = [("authorization", f"Bearer {caller}")] if caller else []
        cancelled = self.random.random() < CANCELLED_SHARE
        began = time.monotonic()
        call = self.channel.stream_stream(path)(iter(sent), metadata=metadata, timeout=GIVE_UP_S)
        if cancelled:
            time.sleep(self.random.choice([0, 0.001, 0.01]))
            call.cancel()
        answers = Answers(call, self.clock)
        code, reason, said = "OK", "", ""
        try:
            read_enough(path, answers)
        except grpc.RpcError as error:
            failed = service_error(error)
            code, reason, said = failed.code.name, failed.reason, failed.message
        if cancelled and code == "CANCELLED" and not reason:
            code = "cancelled by the client"
        answers.silence()
        seconds = time.monotonic() - began
        self._judge(figures_of, sent, (code, reason, said), seconds, answers.longest_s)
        return code

    def _judge(
        self,
        path: str,
        sent: list[bytes],
        end: tuple[str, str, str],
        seconds: float,
        silent_s: float,
    ) -> None:
        """`silent_s`: the longest wait for anything to come, by the service's clock."""
        code, reason, said = end
        self.tally.add(path, sent, code, seconds, silent_s)
        if code in ("INTERNAL", "UNKNOWN"):
            self.tally.violation(path, sent, f"{code} {reason}: {said}")
        elif code == "UNAVAILABLE" and not reason:
            self.tally.violation(path, sent, f"the connection was lost: {said}")
        if silent_s > HANG_S:
            self.tally.violation(
                path, sent, f"{code}, silent for {silent_s:.1f} s of {seconds:.1f}"
            )

    def _caller(self) -> str:
        who = self.random.choices(list(CALLERS), list(CALLERS.values()))[0]
        return SECRETS.get(who, who and "nobody-has-given-this-one-out")

    def call_directly(self, most: int) -> int:
        """Frames at the direct socket, which may be none; how many messages there were."""
        method = routing_pb.DESCRIPTOR.services_by_name["RoutingService"].methods_by_name["Route"]
        sent = [self.message(method) for _ in range(min(most, self.random.choice((1, 2, 3, 6))))]
        data = b"".join(self._frames(sent))
        if self.random.random() < 0.1:
            data = data[: self.random.randrange(len(data) + 1)]  # half-sent
        began, since = time.monotonic(), self.clock.now()
        end = self._exchanged(data)
        self._judge(DIRECT, sent, end, time.monotonic() - began, self.clock.now() - since)
        return len(sent)

    def _frames(self, sent: Sequence[bytes]) -> Iterator[bytes]:
        caller = self._caller().encode()
        if self.random.random() < 0.05:
            caller = self.random.randbytes(self.random.choice([1, 8192, 8193, 100_000]))
        for _ in range(self.random.choices([1, 0, 2], [95, 2, 3])[0] if caller else 0):
            yield REQUEST.pack(TOKEN) + REQUEST.pack(len(caller)) + caller
        for data in sent:
            lie = self.random.choices([0, 1, -1, 1 << 20, 1 << 31], [92, 2, 2, 2, 2])[0]
            size = len(data) + lie
            yield REQUEST.pack(max(0, min(size, TOKEN - 1))) + data
        if self.random.random() < 0.05:
            yield self.random.randbytes(self.random.choice([1, 3, 4, 1000]))

    def _exchanged(self, data: bytes) -> tuple[str, str, str]:
        """How the service ended the stream: with a refusal, or else by closing it after what it had of whole frames."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(GIVE_UP_S)
            connection.connect(self.path + SUFFIX)
            sender = threading.Thread(target=_send_all, args=(connection, data), daemon=True)
            sender.start()
            if self.random.random() < CANCELLED_SHARE:
                connection.shutdown(socket.SHUT_RDWR)
                sender.join()
                return "cancelled by the client", "", ""
            received = _received(connection)
            connection.close()
            sender.join()
        if received is None:
            return "DEADLINE_EXCEEDED", "", "it does not close the stream"
        return _last_of(received)

    def knock(self) -> None:
        """Bytes that are no HTTP/2, or begin like it, at gRPC's socket."""
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        begins = (
            b"",
            preface,
            preface + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]),
            b"GET / HTTP/1.1\r\n\r\n",
        )
        data = self.random.choice(begins) + self.random.randbytes(self.random.choice([1, 9, 5000]))
        began, since = time.monotonic(), self.clock.now()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(GIVE_UP_S)
            connection.connect(self.path)
            _send_all(connection, data)
            ended = _received(connection) is not None
        end = "closed" if ended else "DEADLINE_EXCEEDED", "", ""
        self._judge(SOCKET, [data], end, time.monotonic() - began, self.clock.now() - since)


def _send_all(connection: socket.socket, data: bytes) -> None:
    """As far as the service takes it; then the end."""
    try:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    except OSError:  # it has refused what came first, and closed
        return


def _received(connection: socket.socket) -> bytes | None:
    """All until the end; None when it does not come in time."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass  # closed with bytes of ours unread
    except TimeoutError:
        return None
    return b"".join(parts)


def _last_of(received: bytes) -> tuple[str, str, str]:
    """The code, its reason and its words, of answers in frames."""
    end: tuple[str, str, str] = "closed", "", ""
    while received:
        refused, size = ANSWER.unpack_from(received)
        data, received = (
            received[ANSWER.size : ANSWER.size + size],
            received[ANSWER.size + size :],
        )
        if refused:
            status = status_pb2.Status.FromString(data)
            code = next(each for each in grpc.StatusCode if each.value[0] == status.code)
            return code.name, "said", status.message
        routing_pb.RouteResponse.FromString(data)
        end = "OK", "", ""
    return end


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
    (out / "fuzz.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "fuzz.md").write_text(report(result))
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
    rows = [
        "| RPC | messages | calls | answered | refused | slowest, ms |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for path, each in result["of"].items():
        codes = dict(each["codes"])
        answered = codes.pop("OK", 0)
        refused = ", ".join(f"{name} {count:,}" for name, count in codes.items())
        rows.append(
            f"| {path.removeprefix('/knnmoe.v1.')[:60]} | {each['messages']:,} | {each['calls']:,} | {answered:,} | "
            f"{refused} | {1000 * each['slowest_s']:,.0f} | {1000 * each['silent_s']:,.0f} |"
        )
    codes = Counter[str]()
    for each in result["of"].values():
        codes.update(each["codes"])
    held = [
        f"{name} {before:,} -> {result['held_after'][name]:,}"
        for name, before in result["held_before"].items()
    ]
    hangs = sum(each["hangs"] for each in result["of"].values())
    forms = ", ".join(f"{name} {count:,}" for name, count in result["forms"].items())
    lines = [
        f"{result['messages']:,} messages in {result['calls']:,} calls, seed {result['seed']}, "
        f"{result['seconds']:,} s. INTERNAL or UNKNOWN: {codes['INTERNAL'] + codes['UNKNOWN']}; "
        f"silent over {HANG_S:g} s: {hangs}; violations of all kinds: {len(result['violations'])}.",
        f"Forms: {forms}.",
        f"Before -> after: {'; '.join(held)}; RSS of the service meanwhile at most {result['highest_rss_mib']:,} MiB.",
        "",
        *rows,
        "",
        *(f"- {each[:2000]}" for each in result["violations"][:50]),
    ]
    return "\n".join(lines) + "\n"


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
    result = run(arguments.messages, arguments.seed, arguments.out, _say, arguments.threads)
    sys.stdout.write((arguments.out / "fuzz.md").read_text())
    return int(bool(result["violations"]))


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
