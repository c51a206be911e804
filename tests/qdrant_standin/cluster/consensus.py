"""What the nodes agree on: a log that each of them applies in order, some later than others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.qdrant_standin.cluster.errors import service_error
from tests.qdrant_standin.cluster.network import Link, Network, Node, Session
from tests.qdrant_standin.errors import ApiError

META_OPERATION_S = 10.0
_ELECTION_S = 1.5


@dataclass
class Entry:
    """An operation; `apply` is called once for each node, in a thread of that node."""

    apply: Callable[[Node], Any]
    proposed: float = field(default_factory=time.monotonic)
    outcomes: dict[int, Any] = field(default_factory=dict)  # by node: a result or an ApiError


class Consensus:
    """The log. A node out of the majority applies nothing, and catches up when it is back."""

    def __init__(self, network: Network, delay_s: float) -> None:
        self._network = network
        self.delays_s = {node.id: delay_s for node in network.nodes}
        self.log: list[Entry] = []
        self.applied = {node.id: 0 for node in network.nodes}
        self.held: set[int] = set()  # nodes that apply nothing until they are let go
        self.term = 1
        self._leader: Node | None = network.nodes[0]
        self._elected_at = 0.0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._follow, args=(node,), name=f"consensus-{node.id}")
            for node in network.nodes
        ]

    def start(self) -> None:
        """Nodes begin to apply."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Nodes apply nothing any more."""
        with self._network.changed:
            self._closed = True
            self._network.notify()
        for thread in self._threads:
            thread.join()

    @property
    def leader(self) -> Node | None:
        """The node that leads, None while there is none: after the loss of one an election takes a while."""
        with self._network.changed:
            if self._leader is None or not self._network.has_majority(self._leader):
                self._elect()
            return self._leader if time.monotonic() >= self._elected_at else None

    def _elect(self) -> None:
        candidates = [node for node in self._network.nodes if self._network.has_majority(node)]
        if self._leader is not None and candidates:
            self.term += 1
            self._elected_at = time.monotonic() + self._network.seconds(_ELECTION_S)
        self._leader = candidates[0] if candidates else self._leader

    def leads(self, node: Node) -> bool:
        """Whether a node has a leader that it reaches."""
        return self._network.has_majority(node) and self.leader is not None

    def propose(self, session: Session, apply: Callable[[Node], Any], timeout_s: float) -> Any:
        """Appends an operation; its result when the node of the session has applied it. Raises ApiError."""
        wait_s, end = self._network.seconds(timeout_s), time.monotonic()
        end += wait_s
        if not self._wait(session, lambda: self.leads(session.node), end):
            raise service_error(
                f"Failed to propose operation: leader is not established within {timeout_s:g}s"
            )
        entry = self.append(apply)
        if not self._wait(session, lambda: session.node.id in entry.outcomes, end):
            raise service_error(
                "Waiting for consensus operation commit failed. "
                f"Timeout set at: {timeout_s:g} seconds"
            )
        outcome = entry.outcomes[session.node.id]
        if isinstance(outcome, ApiError):
            raise outcome
        return outcome

    def _wait(self, session: Session, done: Callable[[], bool], end: float) -> bool:
        """An election ends at a time and not by a change, so it is looked at again."""
        while time.monotonic() < end:
            until = self._elected_at if self._elected_at > time.monotonic() else end
            if session.wait_for(done, max(0.0, min(until, end) - time.monotonic())):
                return True
        return session.wait_for(done, 0.0)

    def append(self, apply: Callable[[Node], Any]) -> Entry:
        """Appends without waiting."""
        entry = Entry(apply)
        with self._network.changed:
            self.log.append(entry)
            self._network.notify()
        return entry

    def applied_by_all(self, entry: Entry) -> bool:
        """Whether every node that can has applied it."""
        return all(
            node.id in entry.outcomes
            for node in self._network.nodes
            if self._network.has_majority(node)
        )

    def wait_for_all(self, session: Session, length: int, timeout_s: float) -> bool:
        """Whether all nodes have applied so many entries in time; False at once when one refuses to answer."""
        others = [node for node in self._network.nodes if node is not session.node]

        def refused() -> bool:
            return any(self._network.link(session.node, each) is Link.REFUSED for each in others)

        def done() -> bool:
            return all(
                self.applied[each.id] >= length
                and self._network.link(session.node, each) is Link.OPEN
                for each in others
            )

        session.wait_for(lambda: done() or refused(), self._network.seconds(timeout_s))
        return done()

    def caught_up(self, node: Node) -> bool:
        """Whether a node knows all that was agreed on."""
        return self.applied[node.id] == len(self.log)

    def _follow(self, node: Node) -> None:
        while entry := self._next(node):
            try:
                outcome = entry.apply(node)
            except ApiError as error:
                outcome = error
            with self._network.changed:
                entry.outcomes[node.id] = outcome
                self.applied[node.id] += 1
                self._network.notify()

    def _next(self, node: Node) -> Entry | None:
        changed = self._network.changed
        with changed:
            while not self._closed:
                wait_s = self._wait_s(node)
                if wait_s is not None and wait_s <= 0:
                    return self.log[self.applied[node.id]]
                changed.wait(wait_s)
        return None

    def _wait_s(self, node: Node) -> float | None:
        """How long until a node applies its next entry; None: until something changes."""
        number = self.applied[node.id]
        if number >= len(self.log) or node.id in self.held:
            return None
        if not self._network.has_majority(node):
            return None
        due = self.log[number].proposed + self.delays_s[node.id]
        return max(due, self._elected_at) - time.monotonic()
