"""Lookups over a Unix socket beside gRPC's, where service and client share a machine: RouteStream without gRPC.

A service that listens at unix:PATH also does at PATH.route: a frame for each RouteRequest, and one for each answer, in
order. gRPC's Python takes 0.65 ms for what a socket does in 0.12 (benchmarks/README.md): at both ends it has threads
that hand every message on.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from contextlib import suppress
from typing import Any

import grpc
from google.rpc import status_pb2

from knnmoe.client.calls import no_answer
from knnmoe.errors import ServiceError, ServiceUnavailable, service_error
from knnmoe.v1 import routing_pb2 as pb

SUFFIX = ".route"
# Before a message: its bytes. Before an answer also what it is: a RouteResponse, or the google.rpc.Status of a refusal.
REQUEST, ANSWER = struct.Struct("<I"), struct.Struct("<?I")
# In the place of the first request's size: a token comes first, behind its own size.
TOKEN = 0xFFFFFFFF
_READ_BYTES = 1 << 18
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def socket_path(target: str) -> str | None:
    """Where a service at `target` takes lookups directly; None unless that is a Unix socket."""
    if not target.startswith("unix:"):
        return None
    return target.removeprefix("unix:").removeprefix("//") + SUFFIX  # gRPC knows both forms


class DirectStream:
    """What DuplexStream is to RouteStream, without a thread. Nothing waits beyond the timeout, sending neither.

    For one thread at a time; close() may come from any.

    Attributes:
        ended: no response will come any more.

    """

    def __init__(self, connected: socket.socket, target: str) -> None:
        self._socket, self._target = connected, target
        self._out = memoryview(b"")  # what the socket has not taken yet
        self._in = bytearray()
        self._events = select.poll()
        self._events.register(connected, select.POLLIN)

    @staticmethod
    def connected(target: str, token: str | None = None) -> DirectStream | None:
        """A stream to the service at `target`; None when it is not on this machine, or does not listen so."""
        path = socket_path(target)
        if path is None:
            return None
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.setblocking(False)
        try:
            made.connect(path)
        except (
            OSError
        ):  # an earlier version, none at all, or one that is too busy: gRPC knows what to say
            made.close()
            return None
        stream = DirectStream(made, target)
        if token is not None:
            stream._out = memoryview(
                REQUEST.pack(TOKEN) + REQUEST.pack(len(token)) + token.encode()
            )
        return stream

    @property
    def ended(self) -> bool:
        """Between two calls nothing may come: what makes the socket readable is its end."""
        return self._socket.fileno() < 0 or bool(self._events.poll(0))

    def send(self, request: pb.RouteRequest) -> None:
        """Sends what the socket takes at once, and leaves the rest to receive()."""
        data = request.SerializeToString()
        self._out = memoryview(b"".join((self._out, REQUEST.pack(len(data)), data)))
        with suppress(OSError):  # receive() says so
            self._flush()

    def receive(self, timeout_s: float) -> pb.RouteResponse:
        """The next response. Raises ServiceError, also when `timeout_s` passes; the stream is closed then."""
        give_up_s = time.monotonic() + timeout_s
        try:
            while (found := self._taken()) is None:
                self._wait(give_up_s, timeout_s)
        except OSError as error:
            self.close()
            raise self._was_ended() from error
        except ServiceError:
            self.close()
            raise
        return found

    def close(self) -> None:
        """Ends the stream. Closing twice is allowed."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # whoever waits wakes up
        self._socket.close()

    def _flush(self) -> None:
        with suppress(BlockingIOError):
            while self._out:
                self._out = self._out[self._socket.send(self._out) :]

    def _wait(self, give_up_s: float, timeout_s: float) -> None:
        """Until more has come or gone. Raises OSError at the end, and ServiceUnavailable when it is too late."""
        left_s = give_up_s - time.monotonic()
        if self._socket.fileno() < 0:
            raise ConnectionResetError
        wanted = select.POLLIN | (select.POLLOUT if self._out else 0)
        self._events.modify(self._socket, wanted)
        events = self._events.poll(max(0.0, 1000 * left_s))
        if not events:
            raise no_answer(timeout_s, self._target)
        if not events[0][1] & ~select.POLLOUT:
            self._flush()
            return
        more = self._socket.recv(_READ_BYTES)
        if not more:
            raise ConnectionResetError
        self._in += more
        with suppress(OSError):  # what came may be a refusal, which says why
            self._flush()

    def _taken(self) -> pb.RouteResponse | None:
        """The next response, once it is there. Raises ServiceError for a refusal."""
        if len(self._in) < ANSWER.size:
            return None
        refused, size = ANSWER.unpack_from(self._in)
        end = ANSWER.size + size
        if len(self._in) < end:
            return None
        data = bytes(self._in[ANSWER.size : end])
        del self._in[:end]
        if refused:
            raise service_error(_Refusal(data), self._target)
        return pb.RouteResponse.FromString(data)

    def _was_ended(self) -> ServiceUnavailable:
        return ServiceUnavailable(
            "it ended the stream", code=grpc.StatusCode.UNAVAILABLE, target=self._target
        )


class _Refusal:
    """A status as gRPC's errors show it."""

    def __init__(self, data: bytes) -> None:
        self._data, self._status = data, status_pb2.Status.FromString(data)

    def code(self) -> grpc.StatusCode:
        return _CODES[self._status.code]

    def details(self) -> str:
        return str(self._status.message)

    def trailing_metadata(self) -> Any:
        return (("grpc-status-details-bin", self._data),)
