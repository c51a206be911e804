"""One node of a cluster: its channels, and what it knows of the cluster."""

from __future__ import annotations

import itertools
import math
import socket
import time
from collections.abc import Sequence
from typing import Any

import grpc

from router_service.backends.qdrant_server.failures import Meaning, failure_of
from router_service.backends.qdrant_server.options import (
    ServerOptions,
    parse_url,
    ports_of,
    urls_of,
)
from router_service.backends.qdrant_server.wire import q

_KNOWS_TIMEOUT_S = 2.0
# Collections that two nodes are asked for at a time, when they are compared.
_COMPARED_TOGETHER = 16
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Back soon after the server's return, and aware within seconds of a peer that only vanished.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name the time that one attempt gets: in 100 ms a busy machine does not always accept.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Else channels with equal options share one connection.
    ("grpc.use_local_subchannel_pool", 1),
]

# By shard and peer: the state of its replica.
Replicas = dict[tuple[int, int], int]


class Stubs:
    """The services of a node behind one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.points = q.PointsStub(channel)
        self.collections = q.CollectionsStub(channel)
        self.snapshots = q.SnapshotsStub(channel)
        self.server = q.QdrantStub(channel)


class Node:
    """A node with a few channels to it; Nodes changes how it stands. What asks it raises grpc.RpcError."""

    def __init__(
        self, options: ServerOptions, host: str, ports: Sequence[int], named: str, channels: int
    ) -> None:
        """`ports`: the likeliest first. `named`: the host of its URL, of which `host` may be one address of several."""
        self._options, self._channels, self._next = options, channels, itertools.count()
        self.metadata = (("api-key", options.api_key),) if options.api_key else ()
        self.named = named
        self.lead_to(host, ports)
        self.pool: list[Stubs] = []
        self.under_way: set[Any] = set()  # calls that may be ended, and made elsewhere
        self.away = ""  # why it is set aside; empty while it is in use
        self.peer = 0  # its id in the cluster, once it was asked for replicas
        self.strikes = 0  # late answers in a row
        self.tries = 0  # since it last answered in time
        self.due = 0.0  # when it is looked at again

    def lead_to(self, host: str, ports: Sequence[int]) -> None:
        """From now on it is at this address; not yet asked."""
        self.host, self.targets, self.version = host, [f"{host}:{port}" for port in ports], ""

    @property
    def target(self) -> str:
        """HOST:PORT of its gRPC side; the likeliest one until it has answered."""
        return self.targets[0]

    def stubs(self) -> Stubs:
        """Those of the next of its channels."""
        return self.pool[next(self._next) % len(self.pool)]

    def open(self, target: str) -> grpc.Channel:
        """A channel to one of its addresses."""
        options = self._options
        if not options.secure:
            return grpc.insecure_channel(target, _CHANNEL_OPTIONS)
        # The certificate is that of the URL's host, whatever its addresses.
        name = ("grpc.ssl_target_name_override", self.named.strip("[]"))
        own = [] if self.host == self.named else [name]
        credentials = grpc.ssl_channel_credentials(options.ca_certificate)
        return grpc.secure_channel(target, credentials, [*_CHANNEL_OPTIONS, *own])

    def open_pool(self) -> None:
        """New channels in the place of those that there are."""
        # Those in use meanwhile are closed with the last call on them.
        self.pool = [Stubs(self.open(self.target)) for _ in range(self._channels)]

    def close(self) -> None:
        """Closing twice is allowed."""
        for stubs in self.pool:
            stubs.channel.close()

    def names(self) -> set[str]:
        """Of the collections that it knows."""
        found = self.stubs().collections.List(q.ListCollectionsRequest(), **self._within)
        return {each.name for each in found.collections}

    def aliases(self) -> set[str]:
        """Those that it knows, each with what it leads to."""
        found = self.stubs().collections.ListAliases(q.ListAliasesRequest(), **self._within)
        return {f"{each.alias_name} -> {each.collection_name}" for each in found.aliases}

    def replicas(self, collection: str) -> Replicas | None:
        """Of a collection, as this node knows them; None when it does not know the collection."""
        return self.replicas_from(self.begin_replicas(collection))

    def begin_replicas(self, collection: str) -> Any:
        """The call of replicas() under way; for replicas_from()."""
        request = q.CollectionClusterInfoRequest(collection_name=collection)
        return self.stubs().collections.CollectionClusterInfo.future(request, **self._within)

    def replicas_from(self, call: Any) -> Replicas | None:
        """What replicas() returns, once the call has ended."""
        try:
            info = call.result()
        except grpc.RpcError as error:
            if failure_of(error).meaning is Meaning.NOT_THERE:
                return None
            raise
        self.peer = info.peer_id
        own = {(each.shard_id, info.peer_id): each.state for each in info.local_shards}
        return own | {(each.shard_id, each.peer_id): each.state for each in info.remote_shards}

    def lacks(self, other: Node, prefix: str, until: float) -> str:
        """What another node knows that this one does not, in words; empty when it knows all of it.

        One that was away may take its own replica for whole that missed writes meanwhile, and would answer from it.
        `until`: of time.monotonic(), by which it is known.
        """
        names, aliases = other.names(), other.aliases()
        different = (names ^ self.names()) | (aliases ^ self.aliases())
        if ours := sorted(each for each in different if each.startswith(prefix)):
            return f"it and {other.target} differ in {ours[0]}"
        ours = sorted(each for each in names if each.startswith(prefix))
        for start in range(0, len(ours), _COMPARED_TOGETHER):
            if time.monotonic() >= until:
                return f"it and {other.target} take long to say what they know"
            if found := self._differs(other, ours[start : start + _COMPARED_TOGETHER]):
                return found
        return ""

    def _differs(self, other: Node, collections: Sequence[str]) -> str:
        asked = [
            (each, other.begin_replicas(each), self.begin_replicas(each)) for each in collections
        ]
        for collection, *calls in asked:
            theirs, own = other.replicas_from(calls[0]), self.replicas_from(calls[1])
            if theirs is None or own is None:
                return f"it and {other.target} differ in {collection}"
            if are_apart(theirs, own):
                return f"it is not of the cluster of {other.target}"
            if self.active_of(own) - active(theirs):
                return f"it takes its replica of {collection} for active, {other.target} does not"
        return ""

    def active_of(self, replicas: Replicas) -> set[tuple[int, int]]:
        """Its own of those that are read from."""
        return {key for key in active(replicas) if key[1] == self.peer}

    @property
    def _within(self) -> dict[str, Any]:
        return {"timeout": _KNOWS_TIMEOUT_S, "metadata": self.metadata}


def active(replicas: Replicas) -> set[tuple[int, int]]:
    """Shards and peers of those that are read from."""
    return {key for key, state in replicas.items() if state == q.ReplicaState.Active}


def are_apart(one: Replicas, other: Replicas) -> bool:
    """Whether two views of a collection have no peer in common: they are of two clusters."""
    return not {peer for _, peer in one} & {peer for _, peer in other}


def nodes_of(options: ServerOptions) -> list[Node]:
    """A node for each URL, or for each address of its host; the host itself where it has one, as that may move."""
    places = []
    for url in urls_of(options.url):
        host, port = parse_url(url)
        addresses = addresses_of(host)
        hosts = addresses if len(addresses) > 1 else [host]
        places += [(each, ports_of(port), host) for each in hosts]
    firsts = {(host, ports[0]) for host, ports, _ in places}
    channels = math.ceil(options.connections / len(places))
    return [
        # The second port of one may be the first of another.
        Node(
            options,
            host,
            [port for port in ports if port == ports[0] or (host, port) not in firsts],
            named,
            channels,
        )
        for host, ports, named in dict.fromkeys((h, tuple(p), n) for h, p, n in places)
    ]


def addresses_of(host: str) -> list[str]:
    """IPv4 addresses of a host, or else its IPv6 addresses in brackets; none when nobody knows them."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError:
        return []  # gRPC says so, and asks again
    four = {str(address[0]) for family, *_, address in found if family is socket.AF_INET}
    six = {f"[{address[0]}]" for family, *_, address in found if family is socket.AF_INET6}
    return sorted(four or six)
