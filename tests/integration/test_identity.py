"""Who may do what, over real services: tokens, TLS, mutual TLS, Unix sockets, and what of it is written down."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.channels import open_channel
from knnmoe.client import (
    AdminClient,
    BadCredentials,
    ConnectionMismatch,
    Credentials,
    ReplicationClient,
    RoutingClient,
    ServiceRefused,
    ServiceUnavailable,
)
from knnmoe.client.direct import SUFFIX, DirectStream
from knnmoe.v1 import (
    doctor_pb2,
    operations_pb2,
    quantization_pb2,
    replication_pb2,
    retention_pb2,
    routing_pb2,
    snapshots_pb2,
    types_pb2,
)
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from pydantic import ValidationError

from router_service.errors import InvalidField
from router_service.rpc.audit import FIRST_LINES
from router_service.rpc.authority import ROLE_OF, read_tokens
from router_service.rpc.server import RoutingServer
from router_service.settings import ServiceSettings
from tests.integration.identities import SECRETS, TOKENS, Authority, Place, token_table, write
from tests.integration.server_snapshots import until
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    make_fingerprint,
    probe,
    random_entries,
    random_keys,
    refusal,
    serve_and_fail,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("identity"))


def make_memories(target: str, credentials: Credentials) -> None:
    settings = types_pb2.MemorySettings(kind=LOGIT_DELTA, neighbours=3, gamma=[0.05])
    with AdminClient(target, credentials=credentials) as client:
        for name in ("law", "medicine"):
            client.find_or_create(name, make_fingerprint(), settings)
    for name in ("law", "medicine"):
        learn(target, credentials, name)


@pytest.fixture(scope="module", params=["tcp", "unix"])
def guarded(request: pytest.FixtureRequest, place: Place) -> Iterator[Sidecar]:
    """Asks for tokens, on TCP or on a Unix socket."""
    unix = request.param == "unix"
    listen = f"unix:{place.directory}/s" if unix else "127.0.0.1:0"
    flags = place.flags(tokens=True)
    data = place.directory / request.param
    with Sidecar(data, listen=listen, backend="exact", flags=flags) as sidecar:
        make_memories(sidecar.target, place.credentials("root"))
        yield sidecar
        assert sidecar.stop() == 0
        for secret in SECRETS.values():
            assert secret not in sidecar.stderr
            assert secret not in place.audit.read_text()


def lookup(target: str, credentials: Credentials, memory: str = "law") -> Any:
    with RoutingClient(target, memory, make_fingerprint(), credentials=credentials) as client:
        return looked_up(client)


def looked_up(client: RoutingClient) -> Any:
    rng = np.random.default_rng(0)
    inputs, logits = random_keys(rng, 2), random_keys(rng, 2, EXPERTS)
    return client.route(0, inputs, logits, timeout_s=CALL_TIMEOUT_S)


def replicate(target: str, credentials: Credentials, memory: str = "law") -> None:
    with ReplicationClient(target, memory, make_fingerprint(), credentials=credentials) as client:
        next(client.replicate())


def learn(target: str, credentials: Credentials, memory: str = "law") -> None:
    with AdminClient(target, credentials=credentials) as client:
        request = admin_pb.UpsertRequest(
            memory=memory,
            entries=random_entries(LOGIT_DELTA, 20),
            model_digest=client.describe(memory).model_digest,
        )
        list(client.upsert([request]))


def administer(target: str, credentials: Credentials, memory: str = "law") -> None:
    with AdminClient(target, credentials=credentials) as client:
        nothing = retention_pb2.EntryFilter(source="nothing")
        request = retention_pb2.DeleteRequest(memory=memory, filter=nothing)
        client.unary(client.retention.Delete, request)


def administer_all(target: str, credentials: Credentials) -> None:
    with AdminClient(target, credentials=credentials) as client:
        client.unary(client.admin.ListMemories, admin_pb.ListMemoriesRequest())


USES = {"lookup": lookup, "replicate": replicate, "learn": learn, "administer": administer}
MAY = {
    "reader": {"lookup", "replicate"},
    "learner": {"lookup", "replicate", "learn"},
    "admin": set(USES),
    "all": {"lookup", "replicate"},
    "root": set(USES),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("token", [None, "wrong", *TOKENS])
def test_a_call_needs_a_token_of_its_role_and_memory(
    guarded: Sidecar, place: Place, token: str | None, use: str
) -> None:
    credentials = place.credentials(token)
    if token is None or token == "wrong":
        with pytest.raises(ServiceRefused) as refused:
            USES[use](guarded.target, credentials)
        assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
        assert refused.value.reason == "ERROR_REASON_UNAUTHENTICATED"
        assert "KNNMOE_TOKEN_FILE" in str(refused.value)
        return
    for memory in ("law", "medicine"):
        if use in MAY[token] and (memory == "law" or TOKENS[token][1] == "all"):
            USES[use](guarded.target, credentials, memory)
            continue
        with pytest.raises(ServiceRefused) as refused:
            USES[use](guarded.target, credentials, memory)
        assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED
        assert refused.value.reason == "ERROR_REASON_PERMISSION_DENIED"
        assert f"'{token}' has the role {TOKENS[token][0]}" in str(refused.value)
        assert SECRETS[token] not in str(refused.value)


def test_what_is_about_the_whole_service_needs_a_token_for_all_memories(
    guarded: Sidecar, place: Place
) -> None:
    administer_all(guarded.target, place.credentials("all"))
    with pytest.raises(ServiceRefused, match="needs a token for all memories; token 'admin'"):
        administer_all(guarded.target, place.credentials("admin"))


def test_both_memories_of_a_swap_and_the_one_of_an_operation_count(
    guarded: Sidecar, place: Place
) -> None:
    with AdminClient(guarded.target, credentials=place.credentials("admin")) as client:
        elsewhere = snapshots_pb2.SnapshotRef(path="/x")
        for call, request in (
            (
                client.admin.ReplaceMemory,
                admin_pb.ReplaceMemoryRequest(memory="law", by="medicine"),
            ),
            (client.admin.CreateMemory, admin_pb.CreateMemoryRequest(name="other")),
            (
                client.snapshots.RestoreSnapshot,
                snapshots_pb2.RestoreSnapshotRequest(snapshot=elsewhere, as_memory="law"),
            ),
        ):
            refused = refusal(call, request)
            assert refused.code is grpc.StatusCode.PERMISSION_DENIED
            assert "needs a token for" in refused.message
        with AdminClient(guarded.target, credentials=place.credentials("root")) as root:
            for memory in ("law", "medicine"):
                for _ in root.replies(root.admin.Optimize(admin_pb.OptimizeRequest(memory=memory))):
                    pass
            listed = root.unary(
                root.operations.ListOperations, operations_pb2.ListOperationsRequest()
            )
        ids = {each.memory: each.id for each in listed.operations}
        get = client.operations.GetOperation
        client.unary(get, operations_pb2.GetOperationRequest(id=ids["law"]))
        with pytest.raises(ServiceRefused, match="'medicine'"):
            client.unary(get, operations_pb2.GetOperationRequest(id=ids["medicine"]))


def test_health_needs_no_token(guarded: Sidecar, place: Place) -> None:
    with AdminClient(guarded.target, credentials=Credentials()) as client:
        assert client.serving_status("") == "SERVING"
    assert probe(guarded.target).returncode == 0


def test_the_audit_log_says_who_changed_what_and_what_was_refused(
    tmp_path: Path, place: Place
) -> None:
    """What is refused again and again is counted; what changed something always has a line."""
    audit, call = tmp_path / "audit.jsonl", "RetentionService/Delete"
    flags = ["--tokens", str(place.tokens), "--audit-log", str(audit)]
    with Sidecar(tmp_path / "data", backend="exact", flags=flags) as sidecar:
        make_memories(sidecar.target, place.credentials("root"))
        for _ in range(FIRST_LINES + 3):
            administer(sidecar.target, place.credentials("admin"))
            with pytest.raises(ServiceRefused):
                administer(sidecar.target, place.credentials("reader"))
        with pytest.raises(ServiceRefused):
            lookup(sidecar.target, place.credentials("reader"), "medicine")
        with pytest.raises(ServiceRefused):
            lookup(sidecar.target, place.credentials("wrong"))
        sidecar.stop_cleanly()
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert all(
        each["peer"] and each["time"].endswith("Z") for each in lines if "left_out" not in each
    )
    found = Counter[tuple[str, ...]]()
    for each in lines:
        found[each["who"], each["call"], each["result"]] += each.get("left_out", 1)
    assert {kind: count for kind, count in found.items() if kind[0] != "root"} == {
        ("admin", call, "ok"): FIRST_LINES + 3,
        ("reader", call, "PermissionDenied"): FIRST_LINES + 3,
        ("reader", "RoutingService/Describe", "PermissionDenied"): 1,
        ("", "RoutingService/Describe", "Unauthenticated"): 1,
    }
    assert sum(each["who"] == "admin" for each in lines) == FIRST_LINES + 3


def test_nothing_secret_is_seen_in_ps_or_said(guarded: Sidecar, place: Place) -> None:
    program = "from router_service.cli.admin import main; main()"
    given = ["--target", guarded.target, "--token-file", str(place.files["reader"])]
    ran = subprocess.run(
        [sys.executable, "-c", program, *given, "delete", "law", "--source", "x", "--yes"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1, ran.stderr
    assert "needs the role admin" in ran.stderr
    seen = ran.stdout + ran.stderr
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            seen += process.read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
    assert str(place.tokens) in seen
    assert not [name for name, secret in SECRETS.items() if secret in seen]


@pytest.fixture(scope="module")
def encrypted(place: Place) -> Iterator[Sidecar]:
    with Sidecar(place.directory / "tls", backend="exact", flags=place.flags(tls=True)) as sidecar:
        make_memories(sidecar.target, Credentials(ca_file=place.authority.ca))
        yield sidecar


def test_one_line_says_what_does_not_fit_where_one_side_speaks_tls(
    encrypted: Sidecar, place: Place, ram_sidecar: Sidecar
) -> None:
    other = Authority(place.directory / "another-authority")
    for target, credentials, said in (
        (encrypted.target, Credentials(), "it speaks TLS: name its authority with --ca-file"),
        (
            ram_sidecar.target,
            Credentials(ca_file=place.authority.ca),
            "it does not speak TLS: leave out --ca-file",
        ),
        (
            encrypted.target,
            Credentials(ca_file=other.ca),
            "its certificate is not one for 127.0.0.1",
        ),
    ):
        for use in (lookup, administer_all):
            with pytest.raises(ConnectionMismatch) as failed:
                use(target, credentials)
            assert said in str(failed.value)
            assert "\n" not in str(failed.value)
    assert lookup(encrypted.target, Credentials(ca_file=place.authority.ca)).lambdas


def test_mutual_tls_lets_in_who_has_a_certificate_of_the_authority(place: Place) -> None:
    data, flags = place.directory / "mutual", place.flags(tls=True, mutual=True)
    with Sidecar(data, backend="exact", flags=flags) as sidecar:
        own = {"cert_file": place.client_cert, "key_file": place.client_key}
        administer_all(sidecar.target, Credentials(ca_file=place.authority.ca, **own))
        with pytest.raises(ConnectionMismatch, match=r"needs a client's certificate.*--cert-file"):
            administer_all(sidecar.target, Credentials(ca_file=place.authority.ca))


def test_certificate_and_token_are_replaced_under_load_without_a_failed_lookup(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path / "rotation")
    data, flags = tmp_path / "data", place.flags(tls=True, tokens=True)
    with Sidecar(data, backend="exact", flags=flags) as sidecar, ExitStack() as stack:
        token = tmp_path / "load.token"
        shutil.copy(place.files["all"], token)
        credentials = Credentials(ca_file=place.authority.ca, token_file=token)
        make_memories(
            sidecar.target, Credentials(place.authority.ca, token_file=place.files["root"])
        )
        ended, failed, done = threading.Event(), [], [0]
        client = stack.enter_context(
            RoutingClient(sidecar.target, "law", make_fingerprint(), credentials=credentials)
        )

        def load() -> None:
            try:
                while not ended.is_set():
                    looked_up(client)
                    lookup(sidecar.target, credentials)  # a connection of its own
                    done[0] += 1
            except Exception as error:  # noqa: BLE001
                failed.append(error)

        def some_more() -> None:
            goal = done[0] + 3
            until(lambda: failed or done[0] >= goal)

        thread = threading.Thread(target=load)
        thread.start()
        try:
            some_more()
            before = shown(sidecar.target, place)
            # The key first: for a moment they do not fit together.
            cert, key = place.authority.signed("next")
            key.rename(place.key)
            some_more()
            cert.rename(place.cert)
            until(lambda: shown(sidecar.target, place) != before)
            some_more()
            # The service knows the next token before clients use it, and forgets the last one after.
            new = "the-next-" + "9876543210" * 3
            rest = [token_table(name) for name in TOKENS if name != "all"]
            second = token_table("all", new).replace('"all"', '"all-2"', 1)
            write(place.tokens, "\n".join([*rest, token_table("all"), second]))
            write(token, new)
            some_more()
            write(place.tokens, "\n".join([*rest, second]))
            until(lambda: is_refused(sidecar.target, place))
            some_more()
        finally:
            ended.set()
            thread.join()
        assert not failed
        # What cannot be used changes nothing.
        write(place.tokens, "[[token]]\nname = 3")
        until(lambda: "what was read before stands" in sidecar.stderr and looked_up(client))


def shown(target: str, place: Place) -> str:
    """The certificate that a new connection is shown."""
    host, port = target.split(":")
    return ssl.get_server_certificate((host, int(port)), ca_certs=str(place.authority.ca))


def is_refused(target: str, place: Place) -> bool:
    try:
        lookup(target, place.credentials("all", ca_file=place.authority.ca))
    except ServiceRefused as error:
        return error.code is grpc.StatusCode.UNAUTHENTICATED
    return False


def test_a_stream_ends_when_its_token_is_withdrawn(tmp_path: Path) -> None:
    place = Place(tmp_path / "streams")
    listen = f"unix:{tmp_path}/s"
    flags = place.flags(tokens=True)
    with Sidecar(tmp_path / "data", listen=listen, backend="exact", flags=flags) as sidecar:
        make_memories(sidecar.target, place.credentials("root"))
        reader = place.credentials("all")
        with (
            ReplicationClient(
                sidecar.target, "law", make_fingerprint(), credentials=reader
            ) as copy,
            RoutingClient(sidecar.target, "law", make_fingerprint(), credentials=reader) as client,
        ):
            stream = copy.replicate(heartbeat_ms=100)
            next(stream)
            looked_up(client)
            write(place.tokens, token_table("root"))
            with pytest.raises(ServiceRefused) as ended:
                for _ in stream:
                    pass
            assert ended.value.code is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(ServiceRefused, match="withdrawn"):
                looked_up(client)


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """That every user may enter."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_a_unix_socket_is_for_its_own_user(tmp_path: Path, open_directory: Path) -> None:
    path = open_directory / "s"
    paths = [path, path.with_name(f"s{SUFFIX}")]
    with Sidecar(tmp_path / "data", listen=f"unix:{path}", backend="exact") as sidecar:
        make_memories(sidecar.target, Credentials())
        assert [each.stat().st_mode & 0o777 for each in paths] == [0o600, 0o600]
        with as_user(65534):
            assert DirectStream.connected(sidecar.target) is None
            with pytest.raises(ServiceUnavailable, match="Permission denied"):
                administer_all(sidecar.target, Credentials())
        for each in paths:
            each.chmod(0o666)
        # The file was all that kept others from gRPC, which does not say who is there; the other socket does.
        with as_user(65534):
            administer_all(sidecar.target, Credentials())
            with pytest.raises(ServiceRefused, match="the client is of user 65534") as refused:
                lookup(sidecar.target, Credentials())
        assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED
        lookup(sidecar.target, Credentials())


def test_a_socket_for_others_and_an_address_for_others_need_tokens(
    tmp_path: Path, place: Place
) -> None:
    unix, outside = {"listen": f"unix:{tmp_path}/s"}, {"listen": "0.0.0.0:0"}
    tls = {"tls_cert": place.cert, "tls_key": place.key}
    needed = "or --tls-cert, --tls-key and --tokens, or --insecure"
    for given, said in (
        ({**unix, "socket_mode": "660"}, "--socket-mode: got '660', expected 600"),
        ({**unix, "socket_mode": "999"}, "expected an octal mode"),
        ({**unix, **tls}, "a Unix socket needs no TLS"),
        (outside, needed),
        ({**outside, **tls}, needed),
        ({**outside, "tokens": place.tokens}, needed),
        ({"tls_cert": place.cert}, "--tls-cert and --tls-key go together"),
        ({"tls_client_ca": place.cert}, "goes with --tls-cert and --tls-key"),
        ({**tls, "tls_key": place.client_key}, "expected PEM files that fit together"),
        ({**tls, "tls_client_ca": place.tokens}, "expected PEM files that fit together"),
        ({"tokens": place.cert}, "expected TOML"),
    ):
        with pytest.raises((InvalidField, ValidationError), match=re.escape(said)):
            RoutingServer(ServiceSettings(data=tmp_path / "none", backend="exact", **given))
    ran = serve_and_fail("--data", str(tmp_path / "none"), "--listen", "0.0.0.0:0")
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert needed in ran.stderr
    flags = place.flags(tokens=True)
    mode = ["--socket-mode", "660"]
    with Sidecar(tmp_path / "a", backend="exact", flags=[*mode, *flags], **unix) as sidecar:
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o660
        administer_all(sidecar.target, place.credentials("all"))
    flags += place.flags(tls=True)
    with Sidecar(tmp_path / "b", backend="exact", flags=flags, **outside) as sidecar:
        target = f"127.0.0.1:{sidecar.target.rpartition(':')[2]}"
        administer_all(target, place.credentials("all", ca_file=place.authority.ca))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "[[token]] tables and nothing else"),
        ("[[token]]\nname = 3", "token 1: name', expected a name"),
        ('[[token]]\nname = "a"\nrole = "boss"', "role', expected read, learn or admin"),
        ('[[token]]\nname = "a"\nrole = "read"\nmemories = []', 'expected "all" or'),
        (token_table("all", "short"), "secret', expected 20 or more"),
        (token_table("all").replace("secret", "sha256"), "sha256', expected 64 hex digits"),
        (token_table("all") * 2, "expected names that are all different"),
        (token_table("all") + "more = 1", "expected no others than"),
        (token_table("all") + 'sources = ["a"]', 'sources\', expected the role "learn"'),
        (token_table("learner") + "sources = []", "sources', expected"),
        (token_table("learner") + "max_entries = 5", "max_entries', expected 1 or more, with"),
        (token_table("learner") + "max_step = nan", "max_step', expected a number above 0"),
    ],
)
def test_a_file_of_tokens_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidField) as error:
        read_tokens(write(tmp_path / "tokens.toml", text))
    assert said in str(error.value)
    assert SECRETS["all"] not in str(error.value)


def test_a_token_may_be_kept_as_its_digest(tmp_path: Path) -> None:
    digest = hashlib.sha256(SECRETS["all"].encode()).hexdigest()
    plain = token_table("all")
    hashed = plain.replace(f'secret = "{SECRETS["all"]}"', f'sha256 = "{digest}"')
    found = [read_tokens(write(tmp_path / "tokens.toml", text)) for text in (plain, hashed)]
    assert found[0] == found[1]


def written_by(client: AdminClient, ids: list[int], source: str, length: float = 1.0) -> int:
    entries = random_entries(LOGIT_DELTA, len(ids))
    deltas = np.zeros((len(ids), EXPERTS), np.float32)
    deltas[:, 0] = length
    entries.ids.CopyFrom(tensors.to_tensor(np.array(ids, np.uint64)))
    entries.logit_deltas.CopyFrom(tensors.to_tensor(deltas))
    for origin in entries.provenance:
        origin.source = source
    digest = client.describe("law").model_digest
    request = admin_pb.UpsertRequest(memory="law", entries=entries, model_digest=digest)
    return sum(answer.upserted for answer in client.upsert([request]))


@pytest.mark.parametrize("backend", ["exact", "edge"])
def test_a_token_that_learns_writes_within_its_limits(
    tmp_path: Path, place: Place, backend: str
) -> None:
    limits = 'sources = ["clinic", "clinic-2"]\nmax_entries = 6\nmax_step = 1.5\n'
    tokens = write(tmp_path / "tokens.toml", token_table("learner") + limits + token_table("root"))
    data, flags = tmp_path / "data", ["--tokens", str(tokens)]
    with Sidecar(data, backend=backend, flags=flags) as sidecar, ExitStack() as stack:
        clients = (
            AdminClient(sidecar.target, credentials=place.credentials(name))
            for name in ("root", "learner")
        )
        root, bound = map(stack.enter_context, clients)
        settings = types_pb2.MemorySettings(kind=LOGIT_DELTA, neighbours=3, gamma=[0.05])
        root.find_or_create("law", make_fingerprint(), settings)
        assert written_by(root, [1, 2], "court", 9.0) == 2
        assert written_by(bound, [3, 4, 5, 6], "clinic", 1.5) == 4
        refused = [
            (([7], "court"), "source: got 'court', and token 'learner' writes of clinic, clinic-2"),
            (([7], ""), "source: got '', and token"),
            (([3, 2], "clinic"), "id 2 is an entry of 'court', and token 'learner' overwrites"),
            (([3, 4], "clinic", 1.6), "[0]: length 1.6, and token 'learner' may write 1.5"),
            (([6, 7, 8, 9], "clinic"), "has 4 of its sources, and this would add 3"),
        ]
        for given, said in refused:
            with pytest.raises(ServiceRefused) as error:
                written_by(bound, *given)
            assert error.value.code is grpc.StatusCode.PERMISSION_DENIED
            assert said in error.value.message
        assert written_by(bound, [3, 4, 5, 6, 7, 8], "clinic-2") == 6
        with pytest.raises(ServiceRefused, match="has 6 of its sources, and this would add 1"):
            written_by(bound, [9], "clinic")
        forgotten = retention_pb2.DeleteRequest(
            memory="law", ids=tensors.to_tensor(np.array([7, 8], np.uint64))
        )
        root.unary(root.retention.Delete, forgotten)
        assert written_by(bound, [9, 10], "clinic") == 2
        assert (
            written_by(root, list(range(20, 30)), "clinic", 9.0) == 10
        )  # the operator is not bound
        with pytest.raises(ServiceRefused, match="has 16 of its sources"):
            written_by(bound, [11], "clinic")


def test_every_call_has_a_role_and_names_of_calls_are_right() -> None:
    """What is not named is for admin: a name that is mistaken, or a call that is gone, would not be seen."""
    services = (doctor_pb2, admin_pb, operations_pb2, quantization_pb2, replication_pb2)
    services += (retention_pb2, routing_pb2, snapshots_pb2)
    calls = {
        f"/{service.full_name}/{method.name}"
        for module in services
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(ROLE_OF) <= calls
    for_admin = {call.rpartition(".")[2] for call in calls - set(ROLE_OF)}
    assert for_admin == {
        "DoctorService/Diagnose",
        "MemoryAdminService/Calibrate",
        "MemoryAdminService/CalibrateWatched",
        "MemoryAdminService/CreateMemory",
        "MemoryAdminService/DeleteMemory",
        "MemoryAdminService/Optimize",
        "MemoryAdminService/ReplaceMemory",
        "MemoryAdminService/UpdateSettings",
        "OperationService/CancelOperation",
        "QuantizationService/MeasureQuantization",
        "QuantizationService/Quantize",
        "RetentionService/Delete",
        "RetentionService/Prune",
        "SnapshotService/CreateSnapshot",
        "SnapshotService/DeleteSnapshot",
        "SnapshotService/PackSnapshot",
        "SnapshotService/RestoreSnapshot",
        "SnapshotService/VerifySnapshot",
    }


def test_a_token_is_not_sent_to_another_machine_in_plain_text(place: Place) -> None:
    with pytest.raises(BadCredentials, match="in plain text"):
        open_channel("sidecar.example:50051", credentials=place.credentials("all"))
    open_channel("localhost:1", credentials=place.credentials("all")).close()
    open_channel(
        "sidecar.example:50051", credentials=place.credentials("all", insecure=True)
    ).close()


def test_files_of_clients_that_cannot_be_used(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = write(tmp_path / "empty", "\n")
    for fields, said in (
        ({"token_file": tmp_path / "none"}, "none: No such file"),
        ({"token_file": empty}, "empty: expected one line"),
        ({"cert_file": place.cert}, "go together"),
        ({"cert_file": place.cert, "key_file": place.key}, "takes a ca_file"),
    ):
        with pytest.raises(BadCredentials, match=said):
            Credentials(**fields)
    seen = write(tmp_path / "seen", SECRETS["all"])
    seen.chmod(0o644)
    Credentials(token_file=seen)
    assert "can be read by every user" in caplog.text
    assert SECRETS["all"] not in caplog.text
