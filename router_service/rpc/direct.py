"""RouteStream over a Unix socket beside gRPC's, see knnmoe.client.direct: the same handler, planes and errors."""

from __future__ import annotations

import errno
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from knnmoe.client.direct import ANSWER, REQUEST, SUFFIX, TOKEN
from knnmoe.v1 import routing_pb2 as pb

from router_service.backends.disk import storage_call
from router_service.errors import InvalidField
from router_service.rpc.authority import OWN_USER, Authority, require_own_user
from router_service.rpc.interceptors import errors_to_status
from router_service.rpc.planes import Plane

log = logging.getLogger(__name__)

_METHOD = "/knnmoe.v1.RoutingService/RouteStream"
_DETAILS = "grpc-status-details-bin"
_BACKLOG = 128
_LONGEST_TOKEN = 8192
# Of the answer that ends a stream, to a client that does not read.
_LAST_ANSWER_S = 1.0
# Out of descriptors, for instance.
_ACCEPT_AGAIN_S = 0.1

Route = Callable[[pb.RouteRequest, Any], pb.RouteResponse]


class Peer:
    """A client's connection, as handlers and planes see a call's context."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._ended = select.poll()
        self._ended.register(connection, 0)  # POLLHUP and errors, which always come
        self._code: grpc.StatusCode | None = None
        self.token: str | None = None

    def time_remaining(self) -> float | None:
        """Messages say how long they have."""
        return None

    def is_active(self) -> bool:
        """Whether the client is still there."""
        return not self._ended.poll(0)

    def peer(self) -> str:
        """For the log."""
        return f"{SUFFIX} socket {self.connection.fileno()}"

    def code(self) -> grpc.StatusCode | None:
        """What the stream was ended with."""
        return self._code

    def cancel(self) -> None:
        """Ends the connection, from any thread."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def abort_with_status(self, status: grpc.Status) -> None:
        """Sends a status, the last thing that the client hears."""
        self._code = status.code
        details: Any = dict(status.trailing_metadata)[_DETAILS]
        self.connection.settimeout(_LAST_ANSWER_S)
        with suppress(OSError):  # it has left, or does not read
            self.connection.sendall(ANSWER.pack(True, len(details)) + details)

    def request(self, most: int) -> pb.RouteRequest | None:
        """The next message; None at the end. Raises InvalidField."""
        with suppress(ConnectionError):
            if (header := self._bytes(REQUEST.size)) is None:
                return None
            (size,) = REQUEST.unpack(header)
            if size == TOKEN:
                return self.request(most) if self._took_token() else None
            if size > most:
                raise InvalidField("request", f"{size} bytes", f"at most {most} in a message")
            if (data := self._bytes(size)) is None:
                return None
            try:
                return pb.RouteRequest.FromString(data)
            except DecodeError:
                expected = "a message of the method's type"
                raise InvalidField("request", f"{size} bytes", expected) from None
        return None

    def _took_token(self) -> bool:
        """Raises InvalidField."""
        if (header := self._bytes(REQUEST.size)) is None:
            return False
        (size,) = REQUEST.unpack(header)
        if size > _LONGEST_TOKEN or self.token is not None:
            raise InvalidField("token", f"{size} bytes", f"one of at most {_LONGEST_TOKEN}")
        if (data := self._bytes(size)) is None:
            return False
        self.token = data.decode(errors="replace")
        return True

    def answer(self, response: pb.RouteResponse) -> None:
        """Raises OSError when the client has left."""
        data = response.SerializeToString()
        self.connection.sendall(ANSWER.pack(False, len(data)) + data)

    def _bytes(self, size: int) -> bytes | None:
        """So many; None when the client has left before."""
        data = self.connection.recv(size)
        if len(data) == size:
            return data
        whole = np.empty(size, np.uint8)  # which takes memory only as bytes come
        view = whole.data
        view[: len(data)] = data
        view = view[len(data) :]
        while data and view and (read := self.connection.recv_into(view)):
            view = view[read:]
        return None if view else whole.tobytes()


class DirectServer:
    """Takes lookups at PATH.route from start() to stop()."""

    def __init__(
        self,
        path: str,
        plane: Plane,
        route: Route,
        most_bytes: int,
        authority: Authority,
        mode: int = OWN_USER,
    ) -> None:
        """`path`: gRPC's socket; `most_bytes`: of a message; `mode`: of the socket, see require_own_user()."""
        self._path, self._mode, self._authority = Path(path + SUFFIX), mode, authority
        self._plane, self._route, self._most_bytes = plane, route, most_bytes
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._accepting = threading.Thread(target=self._accept, name="direct", daemon=True)
        self._peers: set[Peer] = set()
        self._changed = threading.Condition()

    def start(self) -> None:
        """Takes the path, at which nobody may listen. Raises StorageError."""
        with storage_call(f"listen on {self._path}"):
            self._path.unlink(missing_ok=True)
            self._listener.bind(str(self._path))
            self._path.chmod(self._mode)
            self._listener.listen(_BACKLOG)
        self._accepting.start()

    def stop(self, drain_s: float) -> None:
        """Takes no more messages, and ends those that have no answer after `drain_s`. Stopping twice is allowed."""
        if self._accepting.ident is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._accepting.join()
            self._path.unlink(missing_ok=True)
        self._listener.close()
        self._end(socket.SHUT_RD)  # the answer under way is still sent
        if not self._are_gone(drain_s):
            self._end(socket.SHUT_RDWR)
            self._are_gone(None)

    def _end(self, how: int) -> None:
        with self._changed:
            for peer in self._peers:
                with suppress(OSError):
                    peer.connection.shutdown(how)

    def _are_gone(self, within_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._peers, within_s)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0 or error.errno == errno.EINVAL:
                    return  # stop()
                log.warning("a lookup's connection was not accepted: %s", error)
                time.sleep(_ACCEPT_AGAIN_S)
                continue
            peer = Peer(connection)
            with self._changed:
                self._peers.add(peer)
            self._plane.threads.submit(self._serve, peer)

    def _serve(self, peer: Peer) -> None:
        try:
            with peer.connection, errors_to_status(peer, _METHOD, self._plane.refused):
                self._answer_all(peer)
        except OSError as error:
            log.info("%s left: %s", peer.peer(), error)
        except Exception:
            log.exception("%s failed, and %s had left", _METHOD, peer.peer())
        finally:
            with self._changed:
                self._peers.discard(peer)
                self._changed.notify_all()

    def _answer_all(self, peer: Peer) -> None:
        """Each with a permit from its arrival until its answer is there."""
        plane, context = self._plane, cast("grpc.ServicerContext", peer)
        if self._mode == OWN_USER:
            require_own_user(peer.connection)
        with plane.room.beginning(context, plane.message_within_s):
            request, begun = peer.request(self._most_bytes), False
        with self._authority.call(_METHOD, peer.token, peer.peer) as call:
            while request is not None:
                call.require(request)
                with plane.working(request, context, begun=begun):
                    response, begun = self._route(request, context), True
                with plane.room.going_on(context):
                    peer.answer(response)
                    request = peer.request(self._most_bytes)
