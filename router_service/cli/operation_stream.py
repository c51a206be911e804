"""How a command follows a long operation: progress on stderr, and Ctrl-C cancels it rather than leaves it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from knnmoe.v1 import operations_pb2 as pb

from router_service.cli.admin_errors import AdminError, Interrupted
from router_service.cli.admin_session import Session


def followed(session: Session, method: Any, request: Any) -> Iterator[Any]:
    """Begins an operation; yields its replies, each within the deadline. Raises AdminError.

    At Ctrl-C the operation is cancelled, its last words are awaited, and Interrupted is raised; a second Ctrl-C does
    not wait.
    """
    watcher = _Watcher(session)
    with watcher.interruptible(), session.output.operation() as show:
        call = method(request)
        try:
            for reply in session.client.replies(call, long=True):
                watcher.heard(call, reply.operation)
                show(reply.operation)
                yield reply
        except AdminError as error:
            if watcher.interrupted:
                raise Interrupted(f"interrupted: {error}") from error
            raise


class _Watcher:
    """Turns the first SIGINT into a CancelOperation, as soon as the operation's id is known."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._asked = False
        self.interrupted = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Only the main thread hears signals; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def heard(self, call: Any, operation: pb.Operation) -> None:
        """A reply came; they come a few times a second."""
        if self.interrupted and not self._asked:
            self._asked = True
            self._cancel(call, operation)

    def _on_interrupt(self, *_: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _cancel(self, call: Any, operation: pb.Operation) -> None:
        told = f"router-admin: cancelling operation {operation.id}; Ctrl-C again leaves at once"
        self._session.output.remark(told)
        try:
            cancel = self._session.client.operations.CancelOperation
            cancel(pb.CancelOperationRequest(id=operation.id), timeout=10)
        except grpc.RpcError:  # then the end of the call cancels it
            call.cancel()
