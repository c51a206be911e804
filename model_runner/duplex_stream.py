"""A bidirectional stream with a timeout on every wait; gRPC's own response iterator has none."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import grpc

from model_runner.errors import RoutingUnavailable, RunnerError
from model_runner.rpc_errors import DEADLINE, runner_error

Request = TypeVar("Request")
Response = TypeVar("Response")


class DuplexStream(Generic[Request, Response]):
    """Requests out, responses in, in order. After an error it is closed: open another.

    Args:
        method: the stub's stream-stream method.
        target: the sidecar's address, for messages.

    """

    def __init__(self, method: Callable[[Iterator[Request]], Any], target: str) -> None:
        self._target = target
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._responses: queue.SimpleQueue[Response | RunnerError] = queue.SimpleQueue()
        self._call = method(iter(self._requests.get, None))
        self._reader = threading.Thread(target=self._read, name="duplex-stream", daemon=True)
        self._reader.start()

    def send(self, request: Request) -> None:
        """Queues a request; never blocks."""
        self._requests.put(request)

    def receive(self, timeout_s: float) -> Response:
        """The next response.

        Raises RoutingUnavailable (also when `timeout_s` passes), RoutingRefused or ModelMismatch.
        """
        try:
            response = self._responses.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise RoutingUnavailable(
                f"sidecar at {self._target}: no answer within {timeout_s:.3g} s", DEADLINE
            ) from None
        if isinstance(response, RunnerError):
            self.close()
            raise response
        return response

    def exchange(self, request: Request, timeout_s: float) -> Response:
        """Send and receive; raises as receive()."""
        self.send(request)
        return self.receive(timeout_s)

    def close(self) -> None:
        """Ends the stream. Closing twice is allowed."""
        self._requests.put(None)
        self._call.cancel()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._responses.put(response)
            self._responses.put(
                RoutingUnavailable(f"sidecar at {self._target}: it ended the stream", passing=True)
            )
        except grpc.RpcError as error:
            self._responses.put(runner_error(error, self._target))
