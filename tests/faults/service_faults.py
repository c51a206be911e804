"""Faults of the process, its machine and its clients, against embedded services. Each takes a Round."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from knnmoe.channels import open_channel
from knnmoe.client.direct import REQUEST, SUFFIX
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import memory_admin_pb2_grpc, operations_pb2_grpc, snapshots_pb2_grpc
from knnmoe.v1 import operations_pb2 as operations_pb
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import snapshots_pb2 as snapshots_pb

from tests.faults.cluster_load import NAME, Caller, Load
from tests.faults.crash import FILL, CrashLoop
from tests.faults.rounds import HANG_S, UNHEARD, CannotRun, Round, Storm
from tests.integration.replaced_memories import names
from tests.integration.server_snapshots import until
from tests.qdrant_standin.tcp_faults import TcpFaults
from tests.sidecar import CALL_TIMEOUT_S, Sidecar, make_fingerprint

MIB = 1 << 20
# A job may be over before the kill, which then counts for nothing.
TRIES, ONCE, ENTRIES = 3, ("optimize", "snapshot"), 3000
# Of a round of storms; of a load's calls while the service is stopped.
STORM_S, STOPPED_S = 2.0, 5.0
PERMITS = 4


def sigkill(job: str, within_s: float, *, writes: bool = False, swap: bool = False) -> Any:
    """A fault: a kill amid a job of tests/faults/crash.py."""

    def fault(round_: Round) -> None:
        loop = CrashLoop(round_.directory / "data", ENTRIES, round_.seed)
        loop.fill()
        for _ in range(TRIES):
            before = loop.acknowledged[job]
            loop.kill_amid(job, loop.rng.uniform(0, within_s), writes=writes, swap=swap)
            if swap or job not in ONCE or loop.acknowledged[job] == before:
                round_.injects()
                break
        with loop.start() as sidecar:
            loop.check(sidecar, deep=True)
            sidecar.stop_cleanly()
        round_.found.recoveries_s += loop.restarts_s[2:]  # the first two opened nothing killed
        filled = len(loop.expected.layers) * -(-ENTRIES // FILL)
        round_.found.writes += filled + loop.acknowledged["write"] + loop.acknowledged["flush"]
        round_.found.lookups += 2 * 8 * len(loop.restarts_s[1:])  # of check_lookups()

    return fault


def sigterm(round_: Round) -> None:
    """Calls in flight are finished, and the process ends with 0."""
    service = round_.serve("--drain-s", "10")
    with round_.load(service, held_s=HANG_S) as load:
        load.passes = UNHEARD
        for _ in range(2):
            round_.injects()
            code = service.stop()
            began_s = time.monotonic()
            clean = code == 0 and "Traceback" not in service.stderr
            round_.require(clean, f"ended with {code}: {service.stderr[-500:]}")
            service = round_.serve_again(service, "--drain-s", "10")
            round_.recover(load, began_s)
            load.wait_for_more(acknowledged=5)


def sigstop(round_: Round) -> None:
    """Nothing answers for 5 s."""
    service = round_.serve()
    with round_.load(service, held_s=STOPPED_S) as load:
        with service.paused():
            round_.injects()
            round_.pause(STOPPED_S)
        round_.recover(load)


@contextmanager
def small_disk(directory: Path, size_mib: int) -> Iterator[Path]:
    """A tmpfs. Raises CannotRun."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise CannotRun("mounting a small tmpfs needs root and CAP_SYS_ADMIN")
    try:
        yield directory
    finally:
        # An engine process ends a moment after its service.
        until(lambda: not subprocess.run(["umount", directory], check=False).returncode)


def disk_full(round_: Round) -> None:
    """Somebody else fills the disk: writes are refused, lookups go on, and writes when there is room.

    Deletions go on while there is room for their log, and are refused otherwise.
    """
    disk = round_.stack.enter_context(small_disk(round_.directory / "disk", 512))
    service = round_.serve(data=disk / "data")
    with round_.load(service) as load:
        for left_mib in (int(round_.rng.integers(1, 48)), 0):
            round_.injects()
            filler = disk / "filler"
            with suppress(OSError), filler.open("wb") as file:
                file.write(bytes(shutil.disk_usage(disk).free - left_mib * MIB))
            load.wait_for_more(**{"refused upserts": 3, "ended deletes": 1}, lookups=10)
            filler.unlink()
            round_.recover(load)


def read_only(round_: Round) -> None:
    """The file system is mounted read-only when the service starts: it says so, and afterwards has everything."""
    disk = round_.stack.enter_context(small_disk(round_.directory / "disk", 512))
    service = round_.serve(data=disk / "data")
    with round_.load(service, held_s=HANG_S) as load:
        service.kill()
        round_.injects()
        read_only = ["mount", "-o", "remount,ro", disk]
        until(lambda: not subprocess.run(read_only, check=False).returncode)
        round_.require_refused(service.data, "cannot open", "Read-only file system")
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        began_s = time.monotonic()
        round_.serve_again(service)
        round_.recover(load, began_s)


def second_opener(round_: Round) -> None:
    """It is refused by the first one's name, and the first does not notice."""
    service = round_.serve()
    with round_.load(service) as load:
        for _ in range(2):
            round_.injects()
            round_.require_refused(service.data, f"in use by process {service.process.pid}")
            round_.recover(load)


def deadline_storm(round_: Round) -> None:
    """Thousands of lookups that have expired, or nearly, before they are searched."""
    service = round_.serve()
    with round_.load(service) as load:
        load.passes = UNHEARD
        for in_message in (False, True):
            storm = Storm(load, service, 16, (1e-4, 1e-3, 5e-3, 2e-2), in_message=in_message)
            with storm:
                round_.pause(STORM_S)
                load.wait_for_more(lookups=5, checks=1)  # those who have time are answered
            round_.injects(storm.done["DEADLINE_EXCEEDED"] + storm.done["CANCELLED"])
            round_.recover(load)


def overload(round_: Round) -> None:
    """Ten times as many callers as may be at work: answers are right or refused, and health checks are answered."""
    service = round_.serve("--max-in-flight", str(PERMITS))
    with round_.load(service) as load, open_channel(service.target) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        load.passes = UNHEARD
        with Storm(load, service, 10 * PERMITS) as storm:
            for _ in range(4):
                round_.pause(STORM_S / 4)
                asked = lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=HANG_S)  # noqa: E731
                round_.attempt("a health check", asked)
        round_.require(storm.done["OK"] > 0, f"nobody was answered: {dict(storm.done)}")
        round_.injects(storm.done["RESOURCE_EXHAUSTED"] + storm.done["CANCELLED"])
        round_.recover(load)


def oversized(round_: Round) -> None:
    """Messages beyond the limit, of every size from one byte more on."""
    limit = 1 << 18
    service = round_.serve("--max-message-bytes", str(limit))
    with round_.load(service) as load, open_channel(service.target) as channel:
        for size in (limit + 1, 2 * limit, 16 * limit):
            for method in ("RoutingService/Route", "MemoryAdminService/Upsert"):
                round_.injects()
                call = channel.stream_stream(f"/knnmoe.v1.{method}")
                code = round_.attempt(
                    f"{size} bytes",
                    lambda: list(call(iter([bytes(size)]), timeout=HANG_S)),  # noqa: B023
                )
                round_.require(code == "RESOURCE_EXHAUSTED", f"{size} bytes to {method}: {code}")
        round_.recover(load)


# What is no gRPC at all, and what begins like it.
JUNK = (
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x01\x04\x00\x00\x00\x01",
)


def half_sent(round_: Round) -> None:
    """Upserts that are cut while they are sent; connections that say nothing, nonsense, or half a frame."""
    service = round_.serve()
    host, port = service.target.rsplit(":", 1)
    with round_.load(service) as load, TcpFaults(int(port)) as proxy:
        far = Sidecar.__new__(Sidecar)
        far.target = f"{host}:{proxy.port}"
        idle = []
        for number in range(6):
            _cut_upsert(round_, load, proxy, far, 5000 + 500 * number)
            connection = socket.create_connection((host, int(port)))
            connection.sendall(JUNK[number] + round_.rng.bytes(int(round_.rng.integers(64))))
            idle.append(connection)
            round_.injects(2)
        load.wait_for_more(acknowledged=2, lookups=2)
        for connection in idle:
            connection.close()
        round_.recover(load)


def _cut_upsert(
    round_: Round, load: Load, proxy: TcpFaults, service: Sidecar, first_id: int
) -> None:
    caller = Caller(service, load.digest)
    caller.nearest(0, load.kept_keys)  # connected
    proxy.slow(200_000)
    ids = range(first_id, first_id + 400)
    call = caller.begin_upsert(1, ids, load.begin(1, ids)[0])
    round_.pause(0.02, 0.3)
    proxy.reset()
    round_.attempt("an upsert that was cut", lambda: list(call))
    proxy.heal()
    caller.channel.close()


def half_sent_directly(round_: Round) -> None:
    """Frames at PATH.route of which a part comes, or that say that they are larger than they are."""
    service = round_.serve(listen=f"unix:{round_.directory}/s")
    with round_.load(service) as load:
        request = routing_pb.RouteRequest(memory=NAME, router_inputs={"data": bytes(4000)})
        whole = REQUEST.pack(request.ByteSize()) + request.SerializeToString()
        cuts = [0, 1, 3, 4, 5, int(round_.rng.integers(6, len(whole)))]
        frames = [whole[:cut] for cut in cuts]
        frames += [
            REQUEST.pack(0),
            REQUEST.pack(2**31),
            b"\xff" * 4,
            b"\xff" * 12,
            round_.rng.bytes(99),
        ]
        waiting = []
        for frame in frames:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(f"{round_.directory}/s{SUFFIX}")
            with suppress(BrokenPipeError):  # it was refused by its first bytes
                connection.sendall(frame)
            waiting.append(connection)
        round_.injects(len(frames))
        load.wait_for_more(acknowledged=2, lookups=2)
        for connection in waiting:
            connection.close()
        round_.recover(load)


def client_cancels(round_: Round) -> None:
    """Calls that are cancelled at any moment: what they wrote is there or not, and no operation is left."""
    service = round_.serve()
    with round_.load(service) as load, open_channel(service.target) as channel:
        caller = Caller(service, load.digest)
        for number in range(40):
            call = _some_call(round_, load, caller, channel, number)
            time.sleep(round_.rng.uniform(0, 0.03))
            call.cancel()
            round_.injects()
        operations = operations_pb2_grpc.OperationServiceStub(channel)
        asked = operations_pb.ListOperationsRequest()
        until(
            lambda: all(
                each.state != operations_pb.OPERATION_STATE_RUNNING
                for each in operations.ListOperations(asked, timeout=CALL_TIMEOUT_S).operations
            )
        )
        round_.recover(load)
        caller.channel.close()


def _some_call(round_: Round, load: Load, caller: Caller, channel: Any, number: int) -> Any:
    admin = memory_admin_pb2_grpc.MemoryAdminServiceStub(channel)
    match number % 4:
        case 0:
            layer, ids = int(round_.rng.integers(2)), range(5000, 5400)
            return caller.begin_upsert(layer, ids, load.begin(layer, ids)[0])
        case 1:
            request = admin_pb.ExportRequest(memory=NAME, layer=1, batch_size=10)
            return admin.Export(request, timeout=CALL_TIMEOUT_S)
        case 2:
            request = admin_pb.OptimizeRequest(memory=NAME, quantization="int8")
            return admin.Optimize(request, timeout=CALL_TIMEOUT_S)
    snapshots = snapshots_pb2_grpc.SnapshotServiceStub(channel)
    request = snapshots_pb.CreateSnapshotRequest(memory=NAME)
    return snapshots.CreateSnapshot(request, timeout=CALL_TIMEOUT_S)


def descriptors(round_: Round) -> None:
    """No further file or connection can be opened for a while; what was acknowledged then is there after a kill."""
    service = round_.serve()
    made = []
    with round_.load(service) as load:
        pid = service.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208  # names alone
        most = used + int(round_.rng.integers(0, 6))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, before[1]))
        for what, call in _needing_files(service).items():
            round_.injects()
            if round_.attempt(what, call, hangs="connect" not in what) == "OK" and "memory" in what:
                made.append(what)
        load.wait_for_more(lookups=5)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        round_.recover(load)
        service.kill()
        service = round_.serve_again(service)
        round_.recover(load)
        missing = {what.split()[-1] for what in made} - set(names(service))
        round_.found.lost += [f"memory {name} was made, and is gone" for name in missing]


def _needing_files(service: Sidecar) -> dict[str, Callable[[], Any]]:
    admin = service.admin
    snapshots = snapshots_pb2_grpc.SnapshotServiceStub(service.channel)
    calls: dict[str, Callable[[], Any]] = {}
    for number in range(4):
        request = admin_pb.CreateMemoryRequest(name=f"new-{number}", fingerprint=make_fingerprint())
        calls[f"make memory new-{number}"] = lambda r=request: admin.CreateMemory(
            r, timeout=CALL_TIMEOUT_S
        )
        request = snapshots_pb.CreateSnapshotRequest(memory=NAME)
        calls[f"snapshot {number}"] = lambda r=request: list(
            snapshots.CreateSnapshot(r, timeout=CALL_TIMEOUT_S)
        )
        request = admin_pb.OptimizeRequest(memory=NAME, quantization="int8")
        calls[f"optimize {number}"] = lambda r=request: list(
            admin.Optimize(r, timeout=CALL_TIMEOUT_S)
        )
        calls[f"connect {number}"] = lambda: _connect(service.target)
    return calls


def _connect(target: str) -> None:
    with open_channel(target) as channel:
        admin = memory_admin_pb2_grpc.MemoryAdminServiceStub(channel)
        admin.ListMemories(admin_pb.ListMemoriesRequest(), timeout=1.0)
