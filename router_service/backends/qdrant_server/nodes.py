"""The nodes that a service was given: which are in use, which are set aside and tried again.

A node is set aside when it cannot be reached, does not answer, is late several times in a row, or knows less than the
others. It is tried again in the background, and gets work again when it answers and knows what they know. Where nobody
is in use all are asked, for want of better.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from router_service.backends.qdrant_server import versions
from router_service.backends.qdrant_server.failures import (
    Failure,
    Meaning,
    cause,
    error_of,
    failure_of,
    unreachable,
)
from router_service.backends.qdrant_server.node import (
    Node,
    Replicas,
    active,
    addresses_of,
    are_apart,
    nodes_of,
)
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.wire import q
from router_service.errors import BackendMisconfigured, shorten

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
# How long a start waits for other nodes once one has answered.
_OTHERS_S = 1.0
# Longer than a node that works needs to hear what was agreed on.
_CONSENSUS_S = 10.0
_LOOK_S = 0.1
_HEARTBEAT_S, _HEARTBEAT_TIMEOUT_S = 1.0, 1.0
_COMPARED_AT_ONCE = 4
# Meanwhile nobody is looked at.
_COMPARED_FOR_S = 5.0
# Between tries of a node that is set aside: the first and the longest.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
# Late answers in a row.
_STRIKES = 3
_LATE = "its answers are late"
_SHOWN = 300


class Nodes:
    """Safe to call from several threads."""

    def __init__(self, options: ServerOptions) -> None:
        """Asks all, and returns when those have answered that do: one suffices.

        Raises BackendUnavailable when none does, or BackendMisconfigured on a wrong key or version, and for nodes of
        different clusters.
        """
        self.options = options
        self.all = nodes_of(options)
        self._next = itertools.count()
        self._lock = threading.Lock()
        self._written: dict[str, None] = {}  # collections, the last at the end
        self._wake, self._closed = threading.Event(), False
        self._keeper = threading.Thread(target=self._keep, name="qdrant-nodes", daemon=True)
        refusals = self._find(self.all, CONNECT_TIMEOUT_S)
        if len(refusals) == len(self.all):
            raise unreachable(options, shorten("; ".join(refusals.values()), 300))
        try:
            self._begin(refusals)
        except BaseException:
            self.close()
            raise
        if self.several:
            self._keeper.start()

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self.all) > 1

    @property
    def in_use(self) -> list[Node]:
        """Those that get work."""
        return [node for node in self.all if not node.away]

    @property
    def version(self) -> str:
        """The oldest one's."""
        return min((node.version for node in self.all if node.version), key=versions.numbers_of)

    def pick(self, but: Collection[Node] = ()) -> Node:
        """One in use, in turn; if there is none but those, one of all."""
        fitting = self.others(but) or [node for node in self.all if node not in but] or self.all
        return fitting[next(self._next) % len(fitting)]

    def others(self, but: Collection[Node]) -> list[Node]:
        """Those in use but some."""
        return [node for node in self.all if not node.away and node not in but]

    def failed(self, node: Node, failure: Failure, *, read: bool) -> None:
        """A call to a node failed; `read`: it changed nothing, so that a failure that passes is the node's."""
        if failure.meaning is Meaning.UNREACHABLE:
            self.set_aside(node, f"it cannot be reached: {failure.text}")
        elif failure.meaning is Meaning.LATE or (read and failure.meaning is Meaning.PASSING):
            self.late(node)

    def late(self, node: Node) -> None:
        """A node did not answer in time; another one may have."""
        node.strikes += 1
        if node.strikes >= _STRIKES:
            self.set_aside(node, _LATE)

    def timely(self, node: Node) -> None:
        """A node answered in time."""
        node.strikes = node.tries = 0

    def away(self) -> list[str]:
        """Those that get no work, and why."""
        away = ((node.target, node.away) for node in self.all)
        return [f"{target}: {why[:_SHOWN]}" for target, why in away if why]

    def set_aside(self, node: Node, why: str) -> None:
        """A node gets no work until it is back, unless no other does."""
        if not self.several or self._closed:
            return
        with self._lock:
            if node.away:
                return
            node.away = why
            node.due = time.monotonic() + self._pause_s(node)
        # One that is late once in a while is nothing to worry about: if it is silent, the next look says so.
        level = logging.INFO if why == _LATE else logging.WARNING
        log.log(level, "Qdrant node %s is set aside: %s", node.target, why[:_SHOWN])
        self._wake.set()

    def written(self, collection: str, *, troubled: bool) -> None:
        """A collection was written to; `troubled`: not at the first try, or not soon.

        By then Qdrant reads no more from a replica that missed it; but a node that the others do not reach does not
        know that. So they are compared: after trouble before the write is acknowledged, else with the next heartbeat.
        """
        if troubled:
            self.compare(collection)
        elif self.several:
            self._written[collection] = None

    def compare(self, collection: str) -> None:
        """Sets aside those in use that take their own replica for active where most others do not."""
        found = self._ask(collection)
        views = {node: view for node, view in found.items() if view is not None}
        read = {node: active(view) for node, view in views.items()}
        stale = [
            node
            for node, view in views.items()
            for key in node.active_of(view)
            if 2 * sum(key not in others for others in read.values()) > len(read) - 1
        ]
        for node in set(stale):
            if len(set(stale)) < len(views):
                self.set_aside(
                    node, f"it takes its replica of {collection} for active, others do not"
                )

    def require_one_cluster(self, collection: str) -> None:
        """Raises BackendMisconfigured when nodes in use are of different clusters, by what they know of a collection.

        A node that has just started may not know it yet: that is waited for. One that does not answer is set aside.
        """
        deadline = time.monotonic() + _CONSENSUS_S
        while self.several:
            found = self._ask(collection)
            views = {node: view for node, view in found.items() if view is not None}
            apart = [
                (one, other)
                for one, other in itertools.combinations(views, 2)
                if are_apart(views[one], views[other])
            ]
            if apart:
                raise self._of_two_clusters(*apart[0], f"have {collection!r} each of its own")
            strangers = [node for node in self.in_use if node in found and node not in views]
            if not views or not strangers:
                return
            if time.monotonic() > deadline:
                self._require_ties(next(iter(views)), strangers[0], collection)
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """Closing twice is allowed."""
        self._closed = True
        self._wake.set()
        for node in self.all:
            node.close()  # which ends what the keeper waits for
        if self._keeper.is_alive():
            self._keeper.join()

    def _require_ties(self, one: Node, stranger: Node, collection: str) -> None:
        """Sets a node aside that does not hear of a collection, and has others in common: it is cut off, or behind."""
        unheard = f"has not heard of {collection!r} for {_CONSENSUS_S:.0f} s"
        try:
            for each in sorted(one.names() & stranger.names()):
                known, own = one.replicas(each), stranger.replicas(each)
                if known and own and not are_apart(known, own):
                    return self.set_aside(stranger, f"it {unheard}")
        except grpc.RpcError as error:
            return self.set_aside(stranger, f"it {unheard}: {cause(error)}")
        raise self._of_two_clusters(
            one, stranger, f"differ: the first has {collection!r}, the other {unheard}"
        )

    def _of_two_clusters(self, one: Node, other: Node, what: str) -> BackendMisconfigured:
        return BackendMisconfigured(
            f"{one.target} and {other.target} {what}: they are not of one Qdrant cluster; change "
            f"{self.options.named_by} ({self.options.url}) to the nodes of one, and remove what an earlier set-up left "
            "under the same name (docker compose up --remove-orphans)"
        )

    def _ask(self, collection: str) -> dict[Node, Replicas | None]:
        """The replicas that each in use knows of, asked side by side.

        None also where one does not say so, and then it is set aside.
        """
        asked = {node: node.begin_replicas(collection) for node in self.in_use}
        return {node: self._answer(node, call) for node, call in asked.items()}

    def _answer(self, node: Node, call: Any) -> Replicas | None:
        try:
            return node.replicas_from(call)
        except grpc.RpcError as error:
            self.set_aside(node, f"it does not answer: {cause(error)}")
            return None

    def _pause_s(self, node: Node) -> float:
        node.tries += 1
        return min(_FIRST_PAUSE_S * 2.0 ** (node.tries - 1), _LONGEST_PAUSE_S)

    def _find(self, nodes: Iterable[Node], timeout_s: float) -> dict[Node, str]:
        """Sets version and address of those that answer in time; returns why others do not."""
        asked = {(node, target): node.open(target) for node in nodes for target in node.targets}
        ended: SimpleQueue[tuple[tuple[Node, str], Any]] = SimpleQueue()
        calls = []
        for (node, target), channel in asked.items():
            call = q.QdrantStub(channel).HealthCheck.future(
                q.HealthCheckRequest(), timeout=timeout_s, metadata=node.metadata
            )
            call.add_done_callback(lambda call, key=(node, target): ended.put((key, call)))
            calls.append(call)
        said: dict[tuple[Node, str], str] = {}
        refused: dict[tuple[Node, str], str] = {}
        deadline = time.monotonic() + timeout_s
        while len(said) + len(refused) < len(asked):
            try:
                key, call = ended.get(timeout=max(deadline - time.monotonic(), 0.0))
            except Empty:
                break
            try:
                said[key] = call.result().version
            except grpc.RpcError as error:
                refused[key] = cause(error)
            else:
                deadline = min(deadline, time.monotonic() + _OTHERS_S)
        for call in calls:
            call.cancel()
        for channel in asked.values():
            channel.close()
        reasons = {}
        for node in {node for node, _ in asked}:
            if found := [target for target in node.targets if (node, target) in said]:
                node.version, node.targets = said[node, found[0]], found[:1]
            else:
                why = (f"{each}: {refused.get((node, each), 'no answer')}" for each in node.targets)
                reasons[node] = "; ".join(why)
        return reasons

    def _begin(self, refusals: dict[Node, str]) -> None:
        """Opens the channels, and looks at those that answered: version, key, one cluster."""
        for node in self.all:
            node.open_pool()
        for node, reason in refusals.items():
            self.set_aside(node, f"it cannot be reached: {reason}")
        for node in self.in_use:
            self._require_version(node)
        if len(different := {node.version for node in self.in_use}) > 1:
            mixed = ", ".join(sorted(different))
            log.info("the nodes of %s are of versions %s", self.options.url, mixed)
        # All services of a prefix make this one first.
        records = f"{self.options.prefix}~memories"
        for node in self.in_use if self.several else []:
            try:
                node.replicas(records)  # health needs no key: this does
            except grpc.RpcError as error:
                if (failure := failure_of(error)).meaning is Meaning.KEY_REFUSED:
                    raise error_of(failure, self.options, CONNECT_TIMEOUT_S, node.target) from error
        self.require_one_cluster(records)
        if not self.in_use:
            raise unreachable(self.options, shorten("; ".join(node.away for node in self.all), 300))

    def _require_version(self, node: Node) -> None:
        if not versions.is_supported(node.version):
            raise BackendMisconfigured(
                f"the server at {node.target} is Qdrant {shorten(node.version, 40)}, this service speaks to "
                f"{versions.OLDEST} and later 1.x; change {self.options.named_by} to another server, or upgrade this "
                "one"
            )
        if not versions.is_known(node.version):
            newer = "Qdrant %s at %s is newer than %s, the newest that this release knows"
            log.warning(newer, node.version, node.target, versions.NEWEST)

    def _keep(self) -> None:
        """Looks at each node when it is due: at those in use once a second, at others ever more seldom."""
        while not self._closed:
            now = time.monotonic()
            try:
                if due := [node for node in self.all if node.due <= now]:
                    self._look_at(due)
            except ValueError:  # a channel that has been closed
                if not self._closed:
                    raise
            self._wake.wait(max(min(node.due for node in self.all) - time.monotonic(), 0.0))
            self._wake.clear()

    def _look_at(self, nodes: Sequence[Node]) -> None:
        refused = self._find([node for node in nodes if not node.version], _HEARTBEAT_TIMEOUT_S)
        calls = {
            node: [
                stubs.server.HealthCheck.future(
                    q.HealthCheckRequest(), timeout=_HEARTBEAT_TIMEOUT_S, metadata=node.metadata
                )
                for stubs in (node.pool if node.away else [node.stubs()])
            ]
            for node in nodes
            if node not in refused
        }
        for node, reason in refused.items():
            self._still_away(node, f"it cannot be reached: {reason}")
        for node, each in calls.items():
            try:
                node.version = [call.result().version for call in each][-1]
            except grpc.RpcError as error:
                self._silent(node, failure_of(error))
            else:
                node.due = time.monotonic() + _HEARTBEAT_S
                if node.away:
                    self._returns(node)
        for collection in list(self._written)[:_COMPARED_AT_ONCE]:
            del self._written[collection]
            self.compare(collection)

    def _silent(self, node: Node, failure: Failure) -> None:
        if self._closed:
            return
        late = failure.meaning is Meaning.LATE
        why = "it does not answer" if late else f"it cannot be reached: {failure.text}"
        self.set_aside(node, why)
        self._still_away(node, why)
        if self.in_use:
            for call in list(node.under_way):  # they go to another node
                call.cancel()

    def _still_away(self, node: Node, why: str) -> None:
        if node.away != why:
            log.warning("Qdrant node %s is not used: %s", node.target, why[:_SHOWN])
        node.away = why
        node.due = time.monotonic() + self._pause_s(node)
        self._follow_name(node)

    def _returns(self, node: Node) -> None:
        """A node that answers again is used when it knows what half of the others know at the least."""
        prefix = f"{self.options.prefix}~"
        try:
            self._require_version(node)
            until = time.monotonic() + _COMPARED_FOR_S
            said = [node.lacks(other, prefix, until) for other in self.others([node])]
            lacks = max(said, default="") if 2 * said.count("") < len(said) else ""
        except BackendMisconfigured as error:
            lacks = str(error)
        except grpc.RpcError as error:
            lacks = f"it or another does not answer: {cause(error)}"
        if lacks:
            self._still_away(node, lacks)
            return
        node.strikes, node.away = 0, ""
        log.info("Qdrant node %s is used again", node.target)

    def _follow_name(self, node: Node) -> None:
        """A node that was started again may have another address under the same name."""
        if node.host == node.named:
            return  # gRPC asks for it by itself
        known, addresses = {each.host for each in self.all}, addresses_of(node.named)
        fresh = [each for each in addresses if each not in known]
        if self._closed or node.host in addresses or not fresh:
            return
        log.info("%s leads to %s, no longer to %s", node.named, fresh[0], node.host)
        ports = [int(target.rpartition(":")[2]) for target in node.targets]
        node.lead_to(fresh[0], ports)
        node.open_pool()
        if self._closed:
            node.close()  # close() may have closed those before
