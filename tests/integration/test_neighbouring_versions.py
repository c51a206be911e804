"""Clients, replicas and sidecars of neighbouring versions understand each other, over real connections.

A neighbour is today's service behind a relay that decodes each message as the other version would: by the messages of
version 0.1.0 (tests/fixtures), which lose what came later and refuse later calls, or by those of a version to come,
which put a field that nobody knows today into every message, and into every message within it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, unknown_fields
from google.protobuf.message import Message
from knnmoe import tensors
from knnmoe.channels import MAX_MESSAGE_BYTES, open_channel
from knnmoe.client import (
    AdminClient,
    MemoryNotFound,
    ReplicationClient,
    RoutingClient,
    ServiceRefused,
)
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import memory_admin_pb2_grpc
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb

from tests.integration.copies import Copy, fill, stored
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    make_fingerprint,
    random_entries,
    random_keys,
    route_request,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = sorted(path.parent.name for path in FIXTURES.glob("*/protos.binpb"))
TODAY, LATER = descriptor_pool.Default(), "later"
# Of a version to come: field 15000 of every message, a number.
_LATER_FIELD, _LATER = 15_000, b"\xc0\xa9\x07\x01"
_TOKENS, _LONG_S = 5, 600.0
_NUMBERS = count()

Codec = Callable[[Any, bytes], bytes]


def pool_of(version: str) -> descriptor_pool.DescriptorPool:
    """The messages and calls of a released version."""
    content = (FIXTURES / version / "protos.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(content).file:
        pool.Add(file)
    return pool


def known_only(descriptor: Any, content: bytes) -> bytes:
    """A message as who reads it by this descriptor sends it on."""
    message = message_factory.GetMessageClass(descriptor).FromString(content)
    message.DiscardUnknownFields()
    return message.SerializeToString()


def with_later_fields(descriptor: Any, content: bytes) -> bytes:
    message = message_factory.GetMessageClass(descriptor).FromString(content)
    _add_later_field(message)
    return message.SerializeToString()


def _add_later_field(message: Message) -> None:
    for _, value in message.ListFields():
        within = value.values() if hasattr(value, "values") else value
        for part in [within] if isinstance(within, Message) else _messages(within):
            _add_later_field(part)
    message.MergeFromString(_LATER)


def _messages(values: Any) -> list[Message]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        return []
    return [each for each in values if isinstance(each, Message)]


class Relay(grpc.GenericRpcHandler):
    """Every call as bytes, each message through `codec`; calls that `pool` does not have are not implemented."""

    def __init__(self, channel: grpc.Channel, pool: descriptor_pool.DescriptorPool, codec: Codec):
        self._channel, self._pool, self._codec = channel, pool, codec

    def service(self, handler_call_details: Any) -> Any:
        path = handler_call_details.method
        try:
            method = self._pool.FindMethodByName(path[1:].replace("/", "."))
        except KeyError:
            return None
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self._relayed(path, method, requests, context)
        )

    def _relayed(
        self, path: str, method: Any, requests: Iterator[bytes], context: Any
    ) -> Iterator[bytes]:
        sent = self._sent(method, requests)
        left_s = (
            context.time_remaining()
        )  # years when the client waits without end, which is no timeout
        call = self._channel.stream_stream(path)(sent, timeout=min(left_s, _LONG_S))
        context.add_callback(call.cancel)
        try:
            for reply in call:
                yield self._codec(method.output_type, reply)
        except grpc.RpcError as error:
            context.set_trailing_metadata(error.trailing_metadata() or ())
            context.abort(error.code(), error.details())

    def _sent(self, method: Any, requests: Iterator[bytes]) -> Iterator[bytes]:
        with suppress(grpc.RpcError):  # the client is gone, which the call learns by itself
            for each in requests:
                yield self._codec(method.input_type, each)


@contextmanager
def relayed(target: str, pool: descriptor_pool.DescriptorPool, codec: Codec) -> Iterator[str]:
    """The address of a service that is another version's."""
    limits = [(f"grpc.max_{way}_message_length", MAX_MESSAGE_BYTES) for way in ("receive", "send")]
    with open_channel(target) as channel, futures.ThreadPoolExecutor(16) as threads:
        server = grpc.server(threads, [Relay(channel, pool, codec)], options=limits)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


@pytest.fixture(scope="module")
def relays(exact_service: Sidecar) -> Iterator[dict[str, str]]:
    """By version the address of a service of it."""
    with ExitStack() as stack:
        earlier = {version: (pool_of(version), known_only) for version in VERSIONS}
        kinds = {**earlier, LATER: (TODAY, with_later_fields)}
        yield {
            version: stack.enter_context(relayed(exact_service.target, *kind))
            for version, kind in kinds.items()
        }


@pytest.fixture(params=[*VERSIONS, LATER])
def neighbour(relays: dict[str, str], request: pytest.FixtureRequest) -> str:
    return relays[request.param]


@pytest.fixture(params=VERSIONS)
def earlier(relays: dict[str, str], request: pytest.FixtureRequest) -> str:
    return relays[request.param]


@pytest.fixture
def later(relays: dict[str, str]) -> str:
    return relays[LATER]


@pytest.fixture
def name(exact_service: Sidecar) -> str:
    """A memory with 50 entries in each layer."""
    made = f"neighbour-{next(_NUMBERS)}"
    fill(exact_service, made, 50)
    return made


def inputs() -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    keys = tensors.to_array(random_entries(LOGIT_DELTA, 50, seed=0).keys)[:_TOKENS]
    return keys + 0.05 * random_keys(rng, _TOKENS), random_keys(rng, _TOKENS, EXPERTS)


def looked_up(target: str, name: str) -> routing_pb.RouteResponse:
    """What today's client gets, without the number that it gave the lookup."""
    with RoutingClient(target, name, make_fingerprint()) as client:
        reply = client.route(0, *inputs(), timeout_s=CALL_TIMEOUT_S, with_neighbours=True)
    reply.ClearField("request_id")
    reply.DiscardUnknownFields()
    return reply


def test_todays_client_is_answered_as_by_todays_service(
    exact_service: Sidecar, neighbour: str, name: str
) -> None:
    got, expected = (looked_up(target, name) for target in (neighbour, exact_service.target))
    for field in ("router_logits", "lambdas", "abstained"):
        assert getattr(got, field) == getattr(expected, field), field
    assert got.neighbours.ids == expected.neighbours.ids
    assert tensors.to_array(got.lambdas).max() > 0


def test_todays_admin_client_fills_and_reads_memories_of_a_neighbour(
    exact_service: Sidecar, neighbour: str, name: str
) -> None:
    made = f"{name}-made"
    with AdminClient(neighbour) as client:
        client.find_or_create(made, make_fingerprint(), types_pb.MemorySettings(kind=LOGIT_DELTA))
        digest = client.describe(made).model_digest
        request = admin_pb.UpsertRequest(
            memory=made,
            layer=1,
            entries=random_entries(LOGIT_DELTA, 20, seed=9),
            durability=admin_pb.DURABILITY_PROCESS,
            model_digest=digest,
        )
        assert [reply.upserted for reply in client.upsert([request])] == [20]
        assert client.count(made) == 20
        client.calibrate(name, lambda0=0.3, dry_run=True)
        with pytest.raises(MemoryNotFound):
            client.describe("no-such-memory")
        assert client.delete(made) == 20
    assert made not in {
        each.name
        for each in exact_service.admin.ListMemories(
            admin_pb.ListMemoriesRequest(), timeout=CALL_TIMEOUT_S
        ).memories
    }


def test_a_replica_follows_a_later_sidecar(exact_service: Sidecar, later: str, name: str) -> None:
    copy = Copy()
    with ReplicationClient(later, name, make_fingerprint()) as client:
        stream = client.replicate()
        copy.sync(stream)
        exact_service.upsert(name, 1, random_entries(LOGIT_DELTA, 5, seed=77, first_id=900))
        copy.sync(stream, exact_service.describe(name).version)
        stream.cancel()
    assert copy.rows == stored(exact_service, name)


def test_a_sidecar_that_is_older_than_copies_says_so(earlier: str, name: str) -> None:
    """The runner takes that for a reason to look up in the sidecar (tests/integration/test_replica.py)."""
    with (
        ReplicationClient(earlier, name, make_fingerprint()) as client,
        pytest.raises(ServiceRefused) as refused,
    ):
        next(client.replicate())
    assert refused.value.code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("version", VERSIONS)
def test_an_earlier_client_is_answered_by_todays_service(
    exact_service: Sidecar, name: str, version: str
) -> None:
    """Its requests lack what came later, and it reads replies by its own messages: numbers, errors and all."""
    pool = pool_of(version)
    inputs_, logits = inputs()
    request = route_request(
        name, exact_service.describe(name).model_digest, inputs_, logits, with_neighbours=True
    )
    expected = exact_service.route(request)

    def old(kind: str) -> Any:
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"knnmoe.v1.{kind}"))

    def ask(path: str, message: Message, reply: str) -> Any:
        call = exact_service.channel.unary_unary(
            path,
            request_serializer=lambda each: each.SerializeToString(),
            response_deserializer=old(reply).FromString,
        )
        return call(message, timeout=CALL_TIMEOUT_S)

    asked = old("RouteRequest").FromString(request.SerializeToString())
    asked.DiscardUnknownFields()
    reply = ask("/knnmoe.v1.RoutingService/Route", asked, "RouteResponse")
    for field in ("router_logits", "lambdas", "abstained"):
        got = getattr(reply, field).SerializeToString(deterministic=True)
        assert got == getattr(expected, field).SerializeToString(deterministic=True), field
    described = ask(
        "/knnmoe.v1.MemoryAdminService/DescribeMemory",
        old("DescribeMemoryRequest")(memory=name),
        "DescribeMemoryResponse",
    )
    assert described.memory.name == name
    assert [described.memory.settings.kind] == [LOGIT_DELTA]
    stats = ask("/knnmoe.v1.MemoryAdminService/Stats", old("StatsRequest")(), "StatsResponse")
    assert name in {memory.memory for memory in stats.memories}


def test_the_relays_do_what_they_say(exact_service: Sidecar, later: str, name: str) -> None:
    """A message of a version to come has fields that today's code does not know, also within other messages."""
    with open_channel(later) as channel:
        stub = memory_admin_pb2_grpc.MemoryAdminServiceStub(channel)
        request = admin_pb.DescribeMemoryRequest(memory=name)
        reply = stub.DescribeMemory(request, timeout=CALL_TIMEOUT_S)
    for message in (reply, reply.memory, reply.memory.settings, reply.memory.fingerprint):
        found = {field.field_number for field in unknown_fields.UnknownFieldSet(message)}
        assert found == {_LATER_FIELD}
