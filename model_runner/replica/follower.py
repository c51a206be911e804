"""Keeps a copy of a memory in step with the sidecar: a thread that reads the stream of changes.

What comes is staged in the copy and takes effect at each `synced`, so that lookups find the memory of one version, and
nothing before the first copy is complete. A stream that ends, or says nothing for some heartbeats, is asked for again
from the last position, or from what the copy holds. Meanwhile the copy serves on, as old as `staleness_s` says.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING
from weakref import WeakSet

import grpc
import torch
from knnmoe import tensors
from knnmoe.client import (
    ClientClosed,
    MemoryNotFound,
    ModelMismatch,
    ReplicaBehind,
    ServiceError,
    ServiceRefused,
    ServiceUnavailable,
)
from knnmoe.v1 import replication_pb2 as pb

from model_runner.errors import BadInput, RunnerError
from model_runner.progress import Progress
from model_runner.replica.copy import AskAgain

if TYPE_CHECKING:
    from knnmoe.client import ReplicaStream, ReplicationClient
    from knnmoe.v1.routing_pb2 import MemoryDescription

    from model_runner.replica.copy import ReplicaCopy

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
# A sidecar that is restarted is back by then; what lasts longer is said.
SAID_AFTER_S = 5.0
REPORT_EVERY_S, REPORT_TIMEOUT_S = 5.0, 2.0
IDS_PER_REPORT = 1 << 20
JOIN_TIMEOUT_S = 10.0

_followers: WeakSet[Follower] = WeakSet()


class Follower:
    """Fills a copy and keeps it in step, from start() to close(). Lookups ask `obstacle` first.

    Args:
        client: of the sidecar and the memory; closed with the follower.
        copy: what is filled, by this follower's thread alone.
        max_staleness_s: lookups are refused when the copy may be older than this.

    """

    def __init__(
        self,
        client: ReplicationClient,
        copy: ReplicaCopy,
        *,
        max_staleness_s: float = math.inf,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._client, self._copy = client, copy
        self._max_staleness_s, self._heartbeat_s = max_staleness_s, heartbeat_s
        self._reports = HitReports(client, copy)
        # time.monotonic() until which lookups may use the copy: one comparison in the way of each.
        self._good_until_s = -math.inf
        self._heard_s = -math.inf
        self._process = os.getpid()
        self._closing = threading.Event()
        self._working = threading.Lock()  # held by the thread while it works on the copy
        self._thread = threading.Thread(target=self._run, name="replica-follower", daemon=True)
        # Of what follows.
        self._changed = threading.Condition()
        self._position: pb.ReplicaPosition | None = None
        self._complete = self._connected = self._said = False
        self._received = self._expected = self._failures = 0
        self._failure: Exception | None = None
        # Where the next stream goes on; None: from what the copy holds. Of the thread.
        self._after: pb.ReplicaPosition | None = None
        self._stream: ReplicaStream | None = None
        _followers.add(self)

    def start(self) -> None:
        """Begins to copy."""
        self._thread.start()

    def close(self) -> None:
        """Reports the last hits if the sidecar is there, and ends. Closing twice is allowed."""
        if os.getpid() != self._process or self._closing.is_set():
            return
        self._closing.set()
        self._good_until_s = -math.inf
        stream = self._stream
        if stream is not None:
            stream.cancel()
        if self._thread.is_alive():
            self._thread.join(JOIN_TIMEOUT_S)
        self._client.close()

    @property
    def position(self) -> pb.ReplicaPosition | None:
        """Of the entries that lookups find; None before the first copy is complete."""
        return self._position

    @property
    def complete(self) -> bool:
        """Whether there is a whole copy."""
        return self._complete

    @property
    def staleness_s(self) -> float:
        """Seconds since the sidecar last said that the copy has all there is; inf before the first copy is complete."""
        return time.monotonic() - self._heard_s

    def obstacle(self) -> Exception | None:
        """Why lookups must not use the copy; None when they may."""
        if time.monotonic() <= self._good_until_s:
            return None
        return self._obstacle()

    def wait_until_complete(self, timeout_s: float, progress: Progress) -> None:
        """Returns when lookups may begin. timeout_s: the longest wait for the next sign of life.

        Raises ServiceUnavailable when there is none in time, and what the sidecar refuses or does not fit.
        """
        what = f"copying memory {self._client.memory}"
        self._wait_for_life(lambda: self._complete or self._expected > 0, timeout_s)
        with progress.counting(self._expected, what, "entries") as done:
            while not self._complete:
                before = self._received
                self._wait_for_life(lambda: self._complete or self._received > before, timeout_s)  # noqa: B023
                done(min(self._received, self._expected))
            done(self._expected)

    def wait_for(self, epoch: str, version: int, timeout_s: float) -> bool:
        """Waits until the copy has this version of this epoch, or a later one; whether it has."""

        def reached() -> bool:
            at = self._position
            return at is not None and at.epoch == epoch and at.version >= version

        with self._changed:
            return self._changed.wait_for(reached, timeout_s)

    def catch_up(self, describe: Callable[[], MemoryDescription], timeout_s: float = 10.0) -> None:
        """Returns when the copy has all that the sidecar acknowledged before: read your writes.

        `describe` asks the sidecar what the memory is now. Raises ServiceUnavailable when it takes longer.
        """
        give_up_s = time.monotonic() + timeout_s
        while True:
            described = describe()  # again: a service that was restarted counts anew
            left_s = give_up_s - time.monotonic()
            if self.wait_for(described.epoch, described.version, min(1.0, max(0.0, left_s))):
                return
            if left_s <= 0:
                raise self._unavailable(
                    f"has not come to version {described.version} within {timeout_s:g} s; it is at "
                    f"{self._position.version if self._position else 'none'}",
                    "replica_behind",
                )

    def paused(self) -> AbstractContextManager[object]:
        """Within it the thread asks nothing of the device: while a CUDA graph is captured no thread may."""
        return self._working

    # The thread.

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                failed = self._followed()
                if failed is not None and not self._closing.is_set():
                    self._note(failed)
                    self._closing.wait(self._pause_s())
            if self._connected:
                self._reports.send(REPORT_TIMEOUT_S)
        except BaseException as error:
            with self._changed:
                self._failure, self._good_until_s = error, -math.inf  # type: ignore[assignment]
                self._changed.notify_all()
            raise

    def _followed(self) -> Exception | None:
        """One stream, to its end; why it ended."""
        self._connected = False
        try:
            for message in self._opened():
                with self._working:
                    self._take(message)
        except (ReplicaBehind, AskAgain) as behind:
            asked_before, self._after = self._after is None, None
            if not self._copy.complete:
                with self._changed:
                    self._complete, self._good_until_s = False, -math.inf
            return behind if asked_before else None
        except (ServiceError, RunnerError, tensors.TensorError) as error:
            return error
        except torch.OutOfMemoryError as error:
            return BadInput(
                f"{self._name()} does not fit on its device; give it less with --replica-memory, or "
                f"take --replica-keys int8 or --retrieval remote: {error}"
            )
        return ServiceUnavailable("it ended the stream", target=self._client.target)

    def _opened(self) -> ReplicaStream:
        with self._working:
            self._copy.cut()
        stream = self._client.replicate(
            self._copy.layers_to_ask_for,
            self._copy.wire_dtype,
            after=self._after,
            held=None if self._after is not None else self._copy.held(),
            heartbeat_ms=int(self._heartbeat_s * 1000),
        )
        self._stream = stream
        if self._closing.is_set():  # it may have been too early for close() to see the stream
            stream.cancel()
        return stream

    def _take(self, message: pb.ReplicateResponse) -> None:
        kind = message.WhichOneof("message")
        if kind == "start":
            self._copy.begin(message.start.memory)
            with self._changed:
                self._expected, self._received = message.start.entries, 0
                self._changed.notify_all()
        elif kind == "synced":
            self._copy.commit()
            self._after = message.synced.position
            self._synced(message.synced.position)
            self._reports.send_now_and_then(REPORT_TIMEOUT_S)
        elif kind is not None:  # a later version of the service may say more
            entries = self._copy.stage(message)
            with self._changed:
                self._received += entries
                self._changed.notify_all()

    def _synced(self, position: pb.ReplicaPosition) -> None:
        now_s = time.monotonic()
        if self._said:
            log.warning("%s is in step again after %.0f s", self._name(), now_s - self._heard_s)
        with self._changed:
            self._position, self._complete, self._connected = position, True, True
            self._failure, self._failures, self._said = None, 0, False
            self._heard_s = now_s
            if not self._closing.is_set():
                self._good_until_s = now_s + self._max_staleness_s
            self._changed.notify_all()

    def _note(self, failed: Exception) -> None:
        """Keeps why the stream ended. A memory that is gone, or another model's, must not be served on."""
        with self._changed:
            self._failures += 1
            self._failure = failed
            if isinstance(failed, MemoryNotFound | ModelMismatch):
                self._good_until_s = -math.inf
            self._changed.notify_all()
        gone = not math.isfinite(self._good_until_s) and self._good_until_s < 0
        if self._complete and not self._said and (gone or self.staleness_s >= SAID_AFTER_S):
            self._said = True
            left = "lookups go on with what it has"
            if math.isfinite(self._max_staleness_s):
                left += f", until it may be {self._max_staleness_s:g} s old"
            log.warning(
                "%s is out of step since %.0f s: %s; %s",
                *(self._name(), self.staleness_s, failed),
                "the model's own router stands" if gone else left,
            )

    def _pause_s(self) -> float:
        """Doubling, with jitter: replicas of one sidecar do not come back at once."""
        longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failures - 1, 10))
        return longest_s * random.uniform(0.5, 1.0)

    def _obstacle(self) -> Exception:
        if self._process != os.getpid():
            return ClientClosed(
                f"{self._name()} was made in process {self._process}, and does not work in process {os.getpid()} that "
                "was forked from it: make one in each process",
                target=self._client.target,
            )
        if self._closing.is_set():
            return ClientClosed(f"{self._name()} was closed", target=self._client.target)
        failure = self._failure
        if isinstance(failure, MemoryNotFound | ModelMismatch):
            return failure
        if not self._complete:
            why = "" if failure is None else f" ({failure})"
            return self._unavailable(
                f"is not complete: {self._received} of {self._expected} entries{why}",
                "replica_incomplete",
            )
        silence = "connected, and nothing comes: the sidecar or this process gets no processor time"
        return self._unavailable(
            f"may be {self.staleness_s:.1f} s old, expected at most {self._max_staleness_s:g} s: {failure or silence}",
            "replica_stale",
        )

    def _unavailable(self, what: str, reason: str) -> ServiceUnavailable:
        return ServiceUnavailable(
            f"{self._name()} {what}",
            code=grpc.StatusCode.UNAVAILABLE,
            reason=reason,
            target=self._client.target,
        )

    def _name(self) -> str:
        return f"the replica of memory {self._client.memory!r}"

    def _wait_for_life(self, come: Callable[[], bool], timeout_s: float) -> None:
        """Until `come`. Raises why not: what is refused at once, an outage after timeout_s."""
        give_up_s = time.monotonic() + timeout_s
        with self._changed:
            while not come():
                failure = self._failure
                if isinstance(failure, ServiceRefused | BadInput) or not self._thread.is_alive():
                    raise failure or self._obstacle()
                left_s = give_up_s - time.monotonic()
                if left_s <= 0:
                    raise failure if isinstance(failure, ServiceError) else self._obstacle()
                self._changed.wait(left_s)


def _stop_in_forked_process() -> None:
    """The thread is not there, so that the copy would grow old without a word."""
    for follower in _followers:
        follower._good_until_s = -math.inf


os.register_at_fork(after_in_child=_stop_in_forked_process)


class HitReports:
    """Brings back what lookups hit. What could not be sent is sent again under its number, and counts once."""

    def __init__(self, client: ReplicationClient, copy: ReplicaCopy) -> None:
        self._client, self._copy = client, copy
        self._number = 0
        self._unanswered: deque[tuple[int, pb.LayerHits]] = deque()
        self._sent_s = time.monotonic()

    def send_now_and_then(self, timeout_s: float) -> None:
        """Sends when some seconds have passed."""
        if time.monotonic() - self._sent_s >= REPORT_EVERY_S:
            self.send(timeout_s)

    def send(self, timeout_s: float) -> None:
        """Sends what failed before, then what is there. What fails is kept; hits go on to be counted in the copy."""
        self._sent_s = time.monotonic()
        try:
            self._send_unanswered(timeout_s)
            for hits in self._copy.take_hits(IDS_PER_REPORT):
                self._number += 1
                self._unanswered.append((self._number, hits))
            self._send_unanswered(timeout_s)
        except ServiceUnavailable as error:
            log.info("hits are reported later: %s", error)
        except ServiceRefused as error:  # the memory is gone, and its counters with it
            log.info("hits are not counted: %s", error)
            self._unanswered.clear()

    def _send_unanswered(self, timeout_s: float) -> None:
        while self._unanswered:
            number, hits = self._unanswered[0]
            self._client.report_hits(self._copy.model_digest, [hits], number, timeout_s=timeout_s)
            self._unanswered.popleft()
