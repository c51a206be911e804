"""Opens a memory for lookups: in a replica beside the model where that is wanted and fits, else in the sidecar."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import grpc
import torch
from knnmoe.client import AdminClient, Credentials, ReplicationClient, ServiceError, ServiceRefused
from knnmoe.client import ServiceUnavailable as Unavailable
from knnmoe.fingerprint import ModelFingerprint
from knnmoe.v1.routing_pb2 import MemoryDescription

from model_runner.progress import Progress
from model_runner.replica.budget import KEY_BYTES, KeyDtype, ReplicaTooLarge, budget_for
from model_runner.replica.copy import ReplicaCopy
from model_runner.replica.first_pass import require_choice
from model_runner.replica.follower import Follower
from model_runner.replica.retriever import ReplicaRetriever
from model_runner.router_client import OnError, RouterClient

log = logging.getLogger(__name__)

# Scores must not be of a memory that has changed since; a sidecar that is restarted is back by then.
EVALUATION_STALENESS_S = 10.0
# The longest time in which a copy that is being made shows no progress.
COPY_TIMEOUT_S = 30.0


class Where(StrEnum):
    """Where lookups are answered."""

    AUTO = "auto"  # a replica where it fits, else the sidecar
    REPLICA = "replica"
    REMOTE = "remote"

    @classmethod
    def _missing_(cls, value: object) -> Where:
        raise ValueError(
            f"retrieval: got {value!r}, expected {' or '.join(map(repr, map(str, cls)))}"
        )


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How a memory is to be read.

    Attributes:
        where: see Where.
        memory_bytes: what a replica may take; None: half of what is free on the device.
        keys: how a replica keeps them.
        first_pass: how a replica on a CPU is searched, one of first_pass.CHOICES.
        max_staleness_s: a replica that may be older gives no answers; None: 10 s where lookups that fail raise, no
            bound where they fall back.

    """

    where: Where | str = Where.AUTO
    memory_bytes: int | None = None
    keys: KeyDtype = "f32"
    first_pass: str = "auto"
    max_staleness_s: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a place, keys or an age that cannot be, BadInput for another first pass."""
        require_choice(self.first_pass)
        oldest_s = self.max_staleness_s
        if oldest_s is not None and not (isinstance(oldest_s, int | float) and oldest_s >= 0):
            raise ValueError(f"max_staleness_s: got {oldest_s!r}, expected seconds from 0 on")
        object.__setattr__(self, "where", Where(self.where))
        if self.keys not in KEY_BYTES:
            raise ValueError(f"keys: got {self.keys!r}, expected one of {', '.join(KEY_BYTES)}")


@dataclass(frozen=True, slots=True)
class OpenMemory:
    """A memory that is open for lookups.

    Attributes:
        retriever: for a RetrievalPolicy.
        described: as it was when it was opened; None when the sidecar was away.
        describe: asks the sidecar what it is now.
        follower: of a replica.

    """

    retriever: RouterClient | ReplicaRetriever
    described: MemoryDescription | None
    describe: Callable[[], MemoryDescription]
    follower: Follower | None = None

    @property
    def where(self) -> Where:
        """REPLICA or REMOTE."""
        return Where.REMOTE if self.follower is None else Where.REPLICA

    def one_version(self) -> AbstractContextManager[None]:
        """Within it, lookups of the calling thread in a replica are answered from one version of the memory.

        Of lookups in the sidecar each is of the version that is there when it comes.
        """
        retriever = self.retriever
        return retriever.copy.lock if isinstance(retriever, ReplicaRetriever) else nullcontext()

    def paused(self) -> AbstractContextManager[object]:
        """Within it a replica does not change, and asks nothing of its device: see Follower.paused."""
        return nullcontext() if self.follower is None else self.follower.paused()

    def catch_up(self) -> None:
        """Returns when lookups find all that the sidecar has acknowledged. Raises ServiceError."""
        if self.follower is not None:
            self.follower.catch_up(self.describe)


@contextmanager
def open_retriever(
    target: str,
    memory: str,
    fingerprint: ModelFingerprint,
    device: torch.device,
    how: Retrieval | None = None,
    progress: Progress | None = None,
    *,
    timeout_s: float = 0.05,
    on_error: OnError | str = OnError.FALL_BACK,
    credentials: Credentials | None = None,
) -> Iterator[OpenMemory]:
    """A memory that is open for lookups within the block; a replica's copy is complete then.

    timeout_s, on_error, credentials: as of RouterClient. With FALL_BACK a sidecar that is away is no error: lookups say
    so. Raises ModelMismatch, MemoryNotFound; ReplicaTooLarge and other refusals when it has to be a replica.
    """
    on_error, how = OnError(on_error), how or Retrieval()
    progress = progress or Progress(quiet=True)
    with ExitStack() as stack:
        client = stack.enter_context(
            RouterClient(
                *(target, memory, fingerprint),
                timeout_s=timeout_s,
                on_error=on_error,
                credentials=credentials,
            )
        )
        described: MemoryDescription | None = None
        try:
            described = client.describe()
        except Unavailable:
            if on_error is OnError.RAISE:
                raise
        replica = None
        if how.where is Where.REPLICA or (how.where is Where.AUTO and described is not None):
            asked = (target, memory, fingerprint, device, how, on_error, described)
            opening = _Opening(*asked, credentials)
            replica = opening.opened(stack, progress)
        yield replica or OpenMemory(client, described, client.describe)


@dataclass(frozen=True, slots=True)
class _Opening:
    """A replica that is to be opened."""

    target: str
    memory: str
    fingerprint: ModelFingerprint
    device: torch.device
    how: Retrieval
    on_error: OnError
    described: MemoryDescription | None
    credentials: Credentials | None

    def opened(self, stack: ExitStack, progress: Progress) -> OpenMemory | None:
        """The replica, which is closed with the stack; None when lookups go to the sidecar instead, with a word."""
        must = self.how.where is Where.REPLICA
        with ExitStack() as own:
            try:
                found = self._begun(own)
                assert found.follower is not None  # noqa: S101
                found.follower.wait_until_complete(COPY_TIMEOUT_S, progress)
            except (ReplicaTooLarge, ServiceError) as error:
                if not must:
                    log.warning("memory %r is read in the sidecar: %s", self.memory, _why(error))
                    return None
                if isinstance(error, Unavailable) and self.on_error is OnError.FALL_BACK:
                    log.warning(
                        "no lookup is answered yet, the model's own router stands: %s", error
                    )
                else:
                    raise _why(error) from error
            stack.enter_context(own.pop_all())
        return found

    def _begun(self, own: ExitStack) -> OpenMemory:
        budget = budget_for(self.device, self.how.memory_bytes)
        copy = ReplicaCopy(self.device, self.how.keys, budget, self.how.first_pass)
        if self.described is not None:
            copy.prepare(self.described)  # before anything is loaded
        staleness_s = self.how.max_staleness_s
        if staleness_s is None:
            raises = self.on_error is OnError.RAISE
            staleness_s = EVALUATION_STALENESS_S if raises else math.inf
        client = ReplicationClient(
            *(self.target, self.memory, self.fingerprint.message()), credentials=self.credentials
        )
        own.callback(client.close)
        follower = Follower(client, copy, max_staleness_s=staleness_s)
        follower.start()
        own.callback(follower.close)
        retriever = ReplicaRetriever(
            copy,
            self.fingerprint.num_experts,
            obstacle=follower.obstacle,
            first_pass=self.how.first_pass,
            on_error=self.on_error,
        )
        admin = own.enter_context(AdminClient(self.target, credentials=self.credentials))
        return OpenMemory(retriever, self.described, partial(admin.describe, self.memory), follower)


def _why(error: Exception) -> Exception:
    """What is said: of a sidecar that is older than copies, with the remedy."""
    if isinstance(error, ServiceRefused) and error.code is grpc.StatusCode.UNIMPLEMENTED:
        return ServiceRefused(
            f"the sidecar at {error.target} is of a version that serves no copies of its memories; update it, or take "
            "--retrieval remote",
            code=error.code,
            target=error.target,
        )
    return error
