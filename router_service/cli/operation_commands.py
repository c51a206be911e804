"""`router-admin operations`: list, show, cancel; and how every command follows a long operation.

Its progress is on stderr, and Ctrl-C cancels it rather than leaves it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from knnmoe.client import ServiceError
from knnmoe.v1 import operations_pb2 as pb

from router_service.cli.errors import Interrupted, admin_error
from router_service.cli.options import AdminTyper, complete_memory
from router_service.cli.output import Session, plain, session_of, utc


def followed(session: Session, method: Any, request: Any, *results: str) -> Iterator[Any]:
    """Begins an operation; yields its replies with one of the `results`, each within the deadline. Raises ServiceError.

    At Ctrl-C the operation is cancelled, its last words are awaited, and Interrupted is raised; a second Ctrl-C does
    not wait.
    """
    with first_interrupt(signal.default_int_handler) as pressed, session.output.operation() as show:
        call, cancelled = method(request), False
        try:
            # Replies come a few times a second, so an interrupt is seen soon; the first one has the operation's id.
            for reply in session.client.replies(call, long=True):
                if pressed.is_set() and not cancelled:
                    cancelled = True
                    _cancel(session, call, reply.operation)
                show(reply.operation)
                if any(map(reply.HasField, results)):
                    yield reply
        except ServiceError as error:
            if pressed.is_set():
                raise Interrupted(f"interrupted: {admin_error(error)}") from error
            raise


def _cancel(session: Session, call: Any, operation: pb.Operation) -> None:
    remark = f"router-admin: cancelling operation {operation.id}; Ctrl-C again leaves at once"
    session.output.remark(remark)
    try:
        request = pb.CancelOperationRequest(id=operation.id)
        session.client.unary(session.client.operations.CancelOperation, request)
    except ServiceError:  # then the end of the call cancels it
        call.cancel()


@contextmanager
def first_interrupt(second: Any) -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets; the next one finds `second` as its handler.

    Only the main thread hears signals; elsewhere nothing changes.
    """
    pressed = threading.Event()

    def on_interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, second)  # first: Event.set() must not be entered twice
        pressed.set()

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


app = AdminTyper("Look at and cancel long operations: optimize, prune, snapshots.")

OperationId = Annotated[
    str,
    typer.Argument(metavar="ID", help="Id of the operation, e.g. 5f0c11d2.", show_default=False),
]


@app.command("list")
def list_operations(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            autocompletion=complete_memory,
            help="Only operations on this memory, e.g. bible; all when left out.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """List the operations that run and the last 100 that ended, oldest first.

    Example:
      router-admin operations list
      router-admin --json operations list bible

    """
    session = session_of(context)
    request = pb.ListOperationsRequest(memory=name)
    reply = session.client.unary(session.client.operations.ListOperations, request)
    columns = ("id", "kind", "memory", "state", "stage", "done", "started", "took_s")
    rows = [_summary(operation) for operation in reply.operations]
    session.output.table(plain(reply), columns, rows)


@app.command("show")
def show(context: typer.Context, operation_id: OperationId) -> None:
    """Show one operation: how far it is, or how it ended.

    Example:
      router-admin operations show 5f0c11d2

    """
    session = session_of(context)
    request = pb.GetOperationRequest(id=operation_id)
    reply = session.client.unary(session.client.operations.GetOperation, request)
    document = plain(reply.operation)
    session.output.table(document, ("operation", ""), list(document.items()))


@app.command("cancel")
def cancel(context: typer.Context, operation_id: OperationId) -> None:
    """Ask an operation to end. It does within moments, and leaves a sound state.

    Example:
      router-admin operations cancel 5f0c11d2

    """
    session = session_of(context)
    request = pb.CancelOperationRequest(id=operation_id)
    reply = session.client.unary(session.client.operations.CancelOperation, request)
    document = plain(reply.operation)
    running = reply.operation.state == pb.OPERATION_STATE_RUNNING
    ended = f"had ended already: {document['state']}"
    line = f"operation {operation_id} " + ("is asked to end" if running else ended)
    session.output.line(document, line)


def _summary(operation: pb.Operation) -> list[Any]:
    document = plain(operation)
    took_ms = max(0, operation.ended_unix_ms - operation.started_unix_ms)
    return [
        *(document[name] for name in ("id", "kind", "memory", "state", "stage")),
        f"{operation.done} of {operation.total}" if operation.total else str(operation.done),
        utc(operation.started_unix_ms),
        took_ms / 1000 if operation.ended_unix_ms else "",
    ]
