"""Clients that send what nobody sends, each about memories of its own, and what they saw.

client = Client(sidecar, place, tally, seed, number, clock); client.run(messages)
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
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
from tests.integration.identities import SECRETS, Place
from tests.sidecar import (
    LOGIT_DELTA,
    Sidecar,
    make_fingerprint,
    random_entries,
)

# A call hangs when nothing comes for so long; what is given up, and seen as a hang.
HANG_S, GIVE_UP_S = 5.0, 60.0
LOOK_EVERY_S = 0.5
# Of the memories that requests are about.
ENTRIES = 8
# Ways in beside methods.
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
AFRESH_EVERY, TRIES = 300, 20
IN_THE_WAY = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNAVAILABLE,
)
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
                    self.keep_up(self.begin_afresh)
                self.calls_left -= 1
                way = self.random.choices(ways, weights)[0]
                if isinstance(way, MethodDescriptor):
                    messages -= self.call(way, messages)
                elif way == DIRECT:
                    messages -= self.call_directly(messages)
                else:
                    self.knock() if way == SOCKET else self.call_nobody()
                    messages -= 1
            self.keep_up(self.clear)

    def begin_afresh(self) -> None:
        """What mutated requests made goes, and what valid ones are about is made again."""
        self.clear()
        self.make_memories()
        self.make_snapshot()
        shutil.rmtree(self.sidecar.data / "packs" / self.memory, ignore_errors=True)
        self.calls_left = AFRESH_EVERY

    def keep_up(self, work: Callable[[], None]) -> None:
        """Again where a call that was cancelled goes on at the service, and is in its way."""
        for left in reversed(range(TRIES)):
            try:
                work()
            except grpc.RpcError as error:
                if not left or service_error(error).code not in IN_THE_WAY:
                    raise
                time.sleep(0.1)
            else:
                return

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
            self.keep_up(lambda: self.make_up_for(method.name))
        return len(sent)

    def make_up_for(self, method: str) -> None:
        """What a call has removed or changed is there again."""
        if method == "UpdateSettings":
            self._unless_gone(
                self.admin.DeleteMemory, admin_pb.DeleteMemoryRequest(memory=self.memory)
            )
        self.make_memories()
        if method == "DeleteSnapshot":
            self.make_snapshot()

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
