"""A gRPC server before a service: passes calls on, and stops one method's messages after so many.

Whoever sent the message that is stopped waits for its answer, and so cannot come to its own end before it is killed,
interrupted, or let go on.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from knnmoe.channels import message_size_options, open_channel

PATIENCE_S = 120.0
_WORKERS = 16
_LOOK_S = 0.1


class MessageGate(grpc.GenericRpcHandler):
    """On TCP from __enter__ to __exit__; calls that are held then are cancelled."""

    def __init__(self, target: str, method: str, passes: int) -> None:
        """Before the service at `target`. `passes`: how many messages to `method`, e.g. "Upsert", get through."""
        self.target = ""
        self._method, self._left = method, passes
        self._stopped, self._go_on = threading.Event(), threading.Event()
        self._closed = False
        self._lock = threading.Lock()
        self._channel = open_channel(target)
        self._pool = ThreadPoolExecutor(_WORKERS, "message-gate")
        self._server = grpc.server(self._pool, handlers=[self], options=message_size_options())

    def __enter__(self) -> MessageGate:
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._go_on.set()
        self._server.stop(None).wait()
        self._channel.close()
        self._pool.shutdown()

    def wait_until_stopped(self, sender: subprocess.Popen[str]) -> None:
        """Until a message has come that does not get through; those before it are on their way."""
        give_up = time.monotonic() + PATIENCE_S
        while not self._stopped.wait(_LOOK_S):
            assert sender.poll() is None, sender.communicate()
            assert time.monotonic() < give_up, f"{self._left} more {self._method} get through"

    def open(self) -> None:
        """What waits gets through, and whatever comes later."""
        self._go_on.set()

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler:
        """Every method, of either side one or many messages: on the wire these are the same."""
        method = handler_call_details.method

        def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            passed = self._passed(requests) if method.endswith(f"/{self._method}") else requests
            call = self._channel.stream_stream(method)(passed)
            context.add_callback(call.cancel)  # also at the caller's deadline
            try:
                yield from call
            except grpc.RpcError as error:
                context.set_trailing_metadata(error.trailing_metadata() or ())
                context.abort(error.code(), error.details() or "")

        return grpc.stream_stream_rpc_method_handler(answer)

    def _passed(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        for request in requests:
            with self._lock:
                self._left -= 1
                passes = self._left >= 0
            if not passes:
                self._stopped.set()
                self._go_on.wait()
            if self._closed:
                return
            yield request
