"""Bad inputs: each gets an error that names it, within seconds, and nothing has changed afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from tarfile import open as open_tar
from typing import Any

import grpc
from knnmoe.channels import MAX_MESSAGE_BYTES, open_channel
from knnmoe.client import AdminClient, Credentials, ServiceError
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import snapshots_pb2 as snapshots_pb
from knnmoe.v1 import snapshots_pb2_grpc
from knnmoe.v1 import types_pb2 as types_pb

from tests.faults.rounds import DEFECTS, Round
from tests.integration.identities import SECRETS, TOKENS, token_table, write
from tests.integration.refusals import INVALID, Case, Memories, assert_refused, fill
from tests.integration.server_snapshots import until
from tests.integration.test_bad_admin_requests import CALIBRATIONS, FINGERPRINTS, NAMES, SETTINGS
from tests.integration.test_bad_messages import GARBAGE, METHODS
from tests.integration.test_bad_requests import OWN_ASSIGNMENTS, ROUTES
from tests.integration.test_bad_upserts import UPSERTS
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    LOGIT_DELTA,
    Sidecar,
    make_fingerprint,
    refusal,
)
from tests.unit.router_service.snapshots.test_snapshot_archive import FOREIGN_MEMBERS

Check = Callable[[ServiceError], None]


class Inputs:
    """A service with two memories, which bad inputs leave as they are."""

    def __init__(self, round_: Round) -> None:
        self._round = round_
        self.sidecar = round_.serve()
        self.memories: Memories = fill(self.sidecar)
        self._before = self.memories.state()
        round_.found.writes += 2

    def send(self, what: str, call: Any, request: Any, check: Check | None = None) -> None:
        """Must be refused, and as `check` says."""
        self._round.injects()
        began_s = time.monotonic()
        try:
            error = refusal(call, request)
            if check is not None:
                check(error)
        except AssertionError as otherwise:
            self._round.found.defects.append(f"{what}: {str(otherwise)[:300]}")
            return
        took_s = time.monotonic() - began_s
        self._round.require(took_s <= self._round.hang_s, f"{what}: took {took_s:.1f} s")
        self._round.require(
            error.code not in DEFECTS, f"{what}: {error.code.name}: {error.message}"
        )

    def compare(self) -> None:
        """Nothing has changed."""
        began_s = time.monotonic()
        self.memories.assert_answering()
        self._round.found.recoveries_s.append(time.monotonic() - began_s)
        self._round.found.lookups += 2
        if self.memories.state() != self._before:
            self._round.found.wrong.append("the memories are not what they were")


def _of(case: Case) -> Check:
    return lambda error: assert_refused(error, case)


def lookups(round_: Round) -> None:
    """Router inputs, weights and numbers that make no sense; layers, memories and models that are not there."""
    inputs = Inputs(round_)
    for kind, cases in ((LOGIT_DELTA, ROUTES), (ASSIGNMENT, OWN_ASSIGNMENTS)):
        for what, case in _shuffled(round_, cases):
            request = inputs.memories.route(kind)
            case.change(request)
            inputs.send(what, inputs.sidecar.routing.Route, request, _of(case))
    inputs.compare()


def upserts(round_: Round) -> None:
    """Ids, keys, values and origins that make no sense."""
    inputs = Inputs(round_)
    for what, case in _shuffled(round_, UPSERTS):
        request = inputs.memories.upsert()
        case.change(request)
        inputs.send(what, inputs.sidecar.admin.Upsert, iter([request]), _of(case))
    inputs.compare()


HUGE = {
    f"{field} {value}": {field: [value] if field in ("gamma", "step_size") else value}
    for field in ("gamma", "step_size", "null_weight", "min_lambda", "oversampling")
    for value in (1e300, -1e300, float("nan"), float("inf"))
}


def settings(round_: Round) -> None:
    """Gammas, counts and names that make no sense; a model with no layers."""
    inputs = Inputs(round_)
    admin = inputs.sidecar.admin
    chosen = {what: settings for what, (settings, _) in SETTINGS.items()}
    chosen |= {what: types_pb.MemorySettings(**fields) for what, fields in HUGE.items()}
    for what, settings_ in _shuffled(round_, chosen):
        request = admin_pb.UpdateSettingsRequest(memory="deltas", settings=settings_)
        inputs.send(what, admin.UpdateSettings, request, _invalid)
    for what, (fields, _) in _shuffled(round_, CALIBRATIONS):
        request = admin_pb.CalibrateRequest(memory="deltas", **fields)
        inputs.send(what, admin.Calibrate, request, _invalid)
    for field, value in FINGERPRINTS.items():
        model = make_fingerprint(**{field: value})
        request = admin_pb.CreateMemoryRequest(name="new", fingerprint=model)
        inputs.send(f"{field} {value!s:.20}", admin.CreateMemory, request, _invalid)
    inputs.compare()


def _invalid(error: ServiceError) -> None:
    assert error.code is INVALID, error
    assert "expected" in error.message or "upsert first" in error.message, error


NO_SNAPSHOTS = ("a/b", "..", ".hidden", "a\0b", "x" * 300, "ümlaut", "a b", "-a", "a\n")


def bad_names(round_: Round) -> None:
    """`/`, `..`, NUL, 300 characters, the service's own files."""
    inputs = Inputs(round_)
    admin, snapshots = inputs.sidecar.admin, _snapshots(inputs.sidecar)
    for name in NAMES:
        request = admin_pb.CreateMemoryRequest(name=name, fingerprint=make_fingerprint())
        inputs.send(f"name {name!a:.20}", admin.CreateMemory, request, _invalid)
        inputs.send(
            f"delete {name!a:.20}", admin.DeleteMemory, admin_pb.DeleteMemoryRequest(memory=name)
        )
    for name in NO_SNAPSHOTS:
        request = snapshots_pb.CreateSnapshotRequest(memory="deltas", name=name)
        inputs.send(f"snapshot {name!a:.20}", snapshots.CreateSnapshot, request, _invalid)
    inputs.compare()


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def messages(round_: Round) -> None:
    """Bytes that are no message, or one that no client can make: nested, huge, half characters, k of -1 and 2^40."""
    inputs = Inputs(round_)
    valid = inputs.memories.route().SerializeToString()
    garbage = (
        dict(GARBAGE)
        | {
            "nested": b"\x0b" * 20_000,  # groups in groups
            "a field of 4 GiB": b"\x22\xff\xff\xff\xff\x0f",
            "random": round_.rng.bytes(int(round_.rng.integers(1, 500))) + b"\xff",
            "cut": valid[: int(round_.rng.integers(1, len(valid) - 1))] + b"\x0a\x7f",
        }
    )
    with open_channel(inputs.sidecar.target, 2 * MAX_MESSAGE_BYTES) as channel:
        for method, _ in METHODS:
            call = channel.stream_stream(method)
            for what, bytes_ in garbage.items():
                inputs.send(f"{what} to {method}", call, iter([bytes_]))
        route = channel.unary_unary("/knnmoe.v1.RoutingService/Route")
        for k in (-1, 2**40, -(2**63)):  # field 7: what of it fits into 32 bits
            inputs.send(f"k = {k}", route, valid + b"\x38" + _varint(k % 2**64))
        inputs.send("beyond the limit", route, bytes(MAX_MESSAGE_BYTES + 1), _exhausted)
    inputs.compare()


def _exhausted(error: ServiceError) -> None:
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED, error


def tokens(round_: Round) -> None:
    """No token, a wrong one, one of another role or memory, one that was withdrawn a moment ago."""
    listed = write(round_.directory / "tokens.toml", "\n".join(map(token_table, TOKENS)))
    sidecar = round_.serve("--tokens", str(listed))
    files = {
        name: write(round_.directory / name, f"{secret}\n") for name, secret in SECRETS.items()
    }
    files["wrong"] = write(round_.directory / "wrong", "nobody-has-given-this-one-out")
    create = admin_pb.CreateMemoryRequest(name="law", fingerprint=make_fingerprint())
    describe = admin_pb.DescribeMemoryRequest(memory="law")
    other = admin_pb.DescribeMemoryRequest(memory="medicine")

    def ask(token: str | None, method: str, request: Any) -> Any:
        file = None if token is None else files[token]
        with AdminClient(sidecar.target, credentials=Credentials(token_file=file)) as client:
            return client.unary(getattr(client.admin, method), request)

    def refused(token: str | None, method: str, request: Any, code: str) -> None:
        round_.injects()
        try:
            ask(token, method, request)
            said = "it was answered"
        except ServiceError as error:
            said = error.code.name
            leaked = [name for name, secret in SECRETS.items() if secret in error.message]
            round_.require(not leaked, f"the error shows the secrets of {leaked}")
        round_.require(said == code, f"{token} for {method}: {said}, not {code}")

    ask("root", "CreateMemory", create)
    for token in (None, "wrong"):
        refused(token, "DescribeMemory", describe, "UNAUTHENTICATED")
    for token in ("reader", "learner"):
        refused(
            token, "DeleteMemory", admin_pb.DeleteMemoryRequest(memory="law"), "PERMISSION_DENIED"
        )
        refused(token, "DescribeMemory", other, "PERMISSION_DENIED")
    write(listed, "\n".join(token_table(name) for name in TOKENS if name != "reader"))
    until(lambda: _is_unknown(ask, describe))
    refused("reader", "DescribeMemory", describe, "UNAUTHENTICATED")
    began_s = time.monotonic()
    ask("root", "DescribeMemory", describe)  # as it was
    round_.found.recoveries_s.append(time.monotonic() - began_s)
    shown = [name for name, secret in SECRETS.items() if secret in sidecar.stderr]
    round_.require(not shown, f"the log shows the secrets of {shown}")


def _is_unknown(ask: Callable[..., Any], describe: Any) -> bool:
    try:
        ask("reader", "DescribeMemory", describe)
    except ServiceError:
        return True
    return False


def archives(round_: Round) -> None:
    """Archives of snapshots with absolute paths, `..`, links and devices, or cut anywhere: nothing is written."""
    inputs = Inputs(round_)
    snapshots, packs = _snapshots(inputs.sidecar), inputs.sidecar.data / "packs"
    create = snapshots_pb.CreateSnapshotRequest(memory="deltas", name="monday")
    list(snapshots.CreateSnapshot(create, timeout=CALL_TIMEOUT_S))
    pack = snapshots_pb.PackSnapshotRequest(memory="deltas", name="monday", path="good.tar")
    list(snapshots.PackSnapshot(pack, timeout=CALL_TIMEOUT_S))
    good, bad = (packs / "good.tar").read_bytes(), round_.directory / "bad.tar"
    outside = _files(round_.directory, inputs.sidecar.data)

    def send(what: str, content: bytes) -> None:
        bad.write_bytes(content)
        reference = snapshots_pb.SnapshotRef(path=str(bad))
        request = snapshots_pb.RestoreSnapshotRequest(snapshot=reference, as_memory="other")
        inputs.send(what, snapshots.RestoreSnapshot, request)
        bad.unlink()
        made = _files(round_.directory, inputs.sidecar.data) - outside
        if made:
            round_.found.wrong.append(f"{what}: {made} was written")

    for member in FOREIGN_MEMBERS:
        buffer = BytesIO(good)
        with open_tar(fileobj=buffer, mode="a") as tar:
            tar.addfile(member)
        send(f"{member.name} ({member.type.decode()})", buffer.getvalue())
    for cut in sorted(round_.rng.integers(0, len(good) - 20_000, 4).tolist()):
        send(f"cut at {cut}", good[:cut])
    inputs.compare()


def _files(directory: Path, without: Path) -> set[Path]:
    """All that lies beside the service's own."""
    return {path for path in directory.rglob("*") if without not in (path, *path.parents)}


def _snapshots(sidecar: Sidecar) -> Any:
    return snapshots_pb2_grpc.SnapshotServiceStub(sidecar.channel)


def _shuffled(round_: Round, cases: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = list(cases)
    return [(names[n], cases[names[n]]) for n in round_.rng.permutation(len(names))]
