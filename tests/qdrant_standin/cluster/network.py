"""The nodes of a cluster as others meet them: running, hung, cut off; and waiting for what changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from typing import Any, TypeVar

from tests.qdrant_standin.cluster.errors import Gone

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Link(Enum):
    """What one node sees of another."""

    OPEN = auto()
    REFUSED = auto()  # its process is gone
    SILENT = auto()  # it hangs, or nothing reaches it


class Node:
    """One node; its state changes by Network.change()."""

    def __init__(self, peer_id: int, uri: str) -> None:
        self.id, self.uri = peer_id, uri
        self.running, self.hung, self.cut = True, False, False
        self.life = 0  # grows with each kill: what an earlier life began has no effect any more


class Network:
    """All nodes, and one condition on which everything waits. No other lock is taken inside of `changed`."""

    def __init__(self, nodes: list[Node], time_scale: float) -> None:
        self.nodes = nodes
        self.changed = threading.Condition()
        self.version = 0
        self._time_scale = time_scale
        self._pool = ThreadPoolExecutor(256, "qdrant-cluster")

    def close(self) -> None:
        """Ends the threads that work side by side."""
        self._pool.shutdown()

    def seconds(self, real_s: float) -> float:
        """How long the stand-in takes for what takes a real server so many seconds."""
        return real_s * self._time_scale

    def change(self, node: Node, **states: bool) -> None:
        """Sets states of a node."""
        with self.changed:
            for name, value in states.items():
                setattr(node, name, value)
            if states.get("running") is False:
                node.life += 1
            self.notify()

    def notify(self) -> None:
        """Lets everybody look again."""
        with self.changed:
            self.version += 1
            self.changed.notify_all()

    def link(self, one: Node, other: Node) -> Link:
        """What `one` sees of `other`; a node reaches itself."""
        if one is other:
            return Link.OPEN
        if one.cut or other.cut:
            return Link.SILENT
        if not other.running:
            return Link.REFUSED
        return Link.SILENT if other.hung else Link.OPEN

    def works(self, node: Node) -> bool:
        """Whether it does anything at all."""
        return node.running and not node.hung

    def has_majority(self, node: Node) -> bool:
        """Whether a node works and reaches more than half of all, itself included."""
        reached = [each for each in self.nodes if self.works(each) and not each.cut]
        return self.works(node) and not node.cut and 2 * len(reached) > len(self.nodes)

    @property
    def whole(self) -> bool:
        """Whether every node reaches every other."""
        return all(self.works(node) and not node.cut for node in self.nodes)

    def side_by_side(
        self, work: Callable[[_Item], _Result], items: Iterable[_Item]
    ) -> list[_Result]:
        """The results in order; in threads only where one may have to wait for a node."""
        if self.whole:
            return [work(item) for item in items]
        return list(self._pool.map(work, items))


class Session:
    """A call at a node: it stands still while the node hangs, and ends when it is killed."""

    def __init__(self, network: Network, node: Node) -> None:
        self.network, self.node, self._life = network, node, node.life

    def check(self) -> None:
        """Waits while the node hangs. Raises Gone when it has been killed."""
        with self.network.changed:
            self.network.changed.wait_for(lambda: not self.node.hung or self._gone)
        if self._gone:
            raise Gone

    @property
    def _gone(self) -> bool:
        return self.node.life != self._life or not self.node.running

    def wait_for(self, done: Callable[[], Any], timeout_s: float) -> bool:
        """Whether it came about in time. Raises Gone."""
        with self.network.changed:
            result = self.network.changed.wait_for(lambda: self._gone or done(), timeout_s)
        self.check()
        return bool(result)

    def wait_for_change(self, seen: int, until: float) -> None:
        """Returns when something has changed since version `seen`, or at a time of time.monotonic()."""
        left = max(0.0, until - time.monotonic())
        self.wait_for(lambda: self.network.version != seen, left)
