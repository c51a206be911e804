"""Upserts over one stream, ahead of their acknowledgements; what a lost stream leaves open is sent again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from knnmoe.v1 import memory_admin_pb2 as pb

from model_runner.duplex_stream import DuplexStream
from model_runner.retries import Retries

# Requests sent ahead of their acknowledgements.
UPSERTS_AHEAD = 4


class Upserter:
    """Sends upserts ahead of their acknowledgements; `finish` waits for the rest.

    Ids make repeating a request harmless: after UNAVAILABLE, or Ctrl-C within a wait, the requests that nothing is
    known of go over a new stream.

    Args:
        method: the stub's Upsert.
        target: the sidecar's address, for messages.
        timeout_s: longest wait for one acknowledgement, retries included.
        retries: of the channel.

    """

    def __init__(
        self, method: Callable[..., Any], target: str, timeout_s: float, retries: Retries
    ) -> None:
        self._method, self._target = method, target
        self._timeout_s, self._retries = timeout_s, retries
        self._stream: DuplexStream[pb.UpsertRequest, pb.UpsertResponse] | None = None
        self._open: deque[pb.UpsertRequest] = deque()

    def __enter__(self) -> Upserter:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop_stream()

    def send(self, request: pb.UpsertRequest) -> None:
        """Raises RoutingUnavailable, RoutingRefused or ModelMismatch, also for an earlier request."""
        self._open.append(request)
        if self._stream is None:
            self._send_again()
        else:
            self._stream.send(request)
        while len(self._open) > UPSERTS_AHEAD:
            self._acknowledge()

    def finish(self) -> None:
        """Returns when every request is acknowledged; raises as send()."""
        while self._open:
            self._acknowledge()

    def _acknowledge(self) -> None:
        self._retries.run(self._receive, self._timeout_s)
        self._open.popleft()

    def _receive(self, timeout_s: float) -> pb.UpsertResponse:
        stream = self._stream or self._send_again()
        try:
            return stream.receive(timeout_s)
        except BaseException:
            self._drop_stream()
            raise

    def _send_again(self) -> DuplexStream[pb.UpsertRequest, pb.UpsertResponse]:
        """A new stream with every open request on it."""
        self._stream = DuplexStream(self._method, self._target)
        for request in self._open:
            self._stream.send(request)
        return self._stream

    def _drop_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
