"""The client of copies: a memory's entries and every change of them, and what lookups in the copy found."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

from typing_extensions import override

from knnmoe import tensors
from knnmoe.channels import MAX_MESSAGE_BYTES, open_channel
from knnmoe.client.calls import PAUSES_S, Retries, next_reply, unary
from knnmoe.credentials import Credentials
from knnmoe.errors import ClientClosed, ServiceUnavailable
from knnmoe.v1 import replication_pb2 as pb
from knnmoe.v1 import types_pb2
from knnmoe.v1.replication_pb2_grpc import ReplicationServiceStub

# Longest waits: for the first message, and beyond the heartbeat for any other, which may have to be read from disk.
FIRST_MESSAGE_S, SILENCE_S = 30.0, 10.0
REPORT_S = 10.0
DEFAULT_HEARTBEAT_MS = 1000

# Ids [n] ascending and digests [n] of what a copy has of a layer, both u64.
HeldEntries = tuple[tensors.Array, tensors.Array]


class ReplicaStream(Iterator[pb.ReplicateResponse]):
    """The messages of a copy, in order, until cancel(); for one thread, cancel() may come from any.

    next() raises ReplicaBehind when the copy is to be asked for with what it holds, or another ServiceError:
    ServiceUnavailable also when the service is silent for longer than it promised, ClientClosed when its client is
    closed.
    """

    def __init__(
        self, call: Any, first_s: float, silence_s: float, client: ReplicationClient
    ) -> None:
        self._call, self._client = call, client
        self._wait_s, self._silence_s = first_s, silence_s
        self._cancelled = False

    @override
    def __iter__(self) -> Self:
        return self

    @override
    def __next__(self) -> pb.ReplicateResponse:
        if self._cancelled:
            raise StopIteration
        try:
            message: pb.ReplicateResponse | None = next_reply(
                self._call, self._wait_s, self._client.target
            )
        except ServiceUnavailable:
            if self._cancelled:
                raise StopIteration from None
            self._client.require_open()
            raise
        if message is None:  # the service never ends it so
            raise ServiceUnavailable("it ended the stream", target=self._client.target)
        self._wait_s = self._silence_s
        return message

    def cancel(self) -> None:
        """Ends the stream here and at the service. Cancelling twice is allowed."""
        self._cancelled = True
        self._call.cancel()


class ReplicationClient:
    """Follows one memory of one service. Safe to call from several threads.

    Args:
        target: `host:port` or `unix:PATH`.
        memory: its name.
        fingerprint: of the client's model; a memory of another model is refused.
        pauses_s: before each retry of report_hits(); (0, 0) retries at once.
        credentials: those of the environment when not given.

    Raises BadCredentials.

    """

    def __init__(
        self,
        target: str,
        memory: str,
        fingerprint: types_pb2.ModelFingerprint,
        *,
        pauses_s: tuple[float, ...] = PAUSES_S,
        credentials: Credentials | None = None,
    ) -> None:
        self.target, self.memory = target, memory
        self.name = secrets.token_hex(8)  # as which it reports
        self._fingerprint = fingerprint
        self._channel = open_channel(target, credentials=credentials)
        self._stub = ReplicationServiceStub(self._channel)
        self._retries = Retries(pauses_s)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the streams and the connection. Closing twice is allowed."""
        self._closed = True
        self._channel.close()

    def replicate(
        self,
        layers: Sequence[int] = (),
        key_dtype: types_pb2.Dtype = types_pb2.DTYPE_F32,
        *,
        after: pb.ReplicaPosition | None = None,
        held: Mapping[int, HeldEntries] | None = None,
        heartbeat_ms: int = DEFAULT_HEARTBEAT_MS,
        first_message_s: float = FIRST_MESSAGE_S,
    ) -> ReplicaStream:
        """The layers, all when there are none, and every change of them; see ReplicationService.Replicate.

        after: go on from the last position. held: without it, by layer what the copy has already. Connects at the first
        next(), which raises what the service refuses. Raises ValueError when `held` is larger than a message can be,
        which is some 4 million entries, and ClientClosed.
        """
        self.require_open()
        request = pb.ReplicateRequest(
            memory=self.memory,
            fingerprint=self._fingerprint,
            layers=layers,
            key_dtype=key_dtype,
            after=after,
            held=[_held(layer, *entries) for layer, entries in sorted((held or {}).items())],
            heartbeat_ms=heartbeat_ms,
        )
        if (size := request.ByteSize()) > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"held takes {size} bytes, and a message {MAX_MESSAGE_BYTES} at the most: copy the layers anew"
            )
        silence_s = heartbeat_ms / 1000 + SILENCE_S
        return ReplicaStream(self._stub.Replicate(request), first_message_s, silence_s, self)

    def report_hits(
        self,
        model_digest: str,
        layers: Sequence[pb.LayerHits],
        number: int,
        *,
        timeout_s: float = REPORT_S,
    ) -> None:
        """What lookups in the copy found since the last report; `number` rises from one to the next.

        One that failed may have been counted: sent again under its number it counts once. Raises ServiceError.
        """
        self.require_open()
        request = pb.ReportHitsRequest(
            memory=self.memory,
            model_digest=model_digest,
            layers=layers,
            client=self.name,
            number=number,
        )
        ask = partial(unary, self._stub.ReportHits, request, target=self.target)
        self._retries.run(ask, timeout_s)

    def require_open(self) -> None:
        """Raises ClientClosed after close()."""
        if self._closed:
            raise ClientClosed("this client was closed", target=self.target)


def _held(layer: int, ids: tensors.Array, digests: tensors.Array) -> pb.HeldEntries:
    return pb.HeldEntries(
        layer=layer, ids=tensors.to_tensor(ids), digests=tensors.to_tensor(digests)
    )
