"""Clients that send a service ten times what it can serve: `python -m tests.faults.crowd --target ... --memory ...`.

Lines on stdin are orders. "measure": how many lookups a second are answered when as many callers as there are permits
ask one after the other. "begin": from now on so many times that are sent, whether answers come or not. "end": stops,
and says what became of them. Answers are lines of JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import grpc
import numpy as np
from knnmoe import tensors
from knnmoe.channels import open_channel
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1.routing_pb2_grpc import RoutingServiceStub

DEADLINE_S = 1.0
_MEASURED_S = 1.0
# Calls that have no answer yet: more are not sent, but counted as late.
_MOST_OPEN = 2000
_EXIT_S = 30.0


class Crowd:
    """A process of such clients, from __enter__ to __exit__."""

    def __init__(self, target: str, memory: str, *, tokens: int, callers: int, times: int) -> None:
        command = [sys.executable, "-m", "tests.faults.crowd", "--target", target]
        command += ["--memory", memory, "--tokens", str(tokens)]
        command += ["--callers", str(callers), "--times", str(times)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.kill()
        self._process.wait(_EXIT_S)

    def order(self, what: str) -> dict[str, Any]:
        """What the clients say to an order. Raises AssertionError when they have ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the clients have ended before {what!r}"
        return dict(json.loads(line))


class _Clients:
    """All of them, in this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._channel = open_channel(options.target)
        self._stub = RoutingServiceStub(self._channel)
        described = self._stub.Describe(pb.DescribeRequest(memory=options.memory)).memory
        model, rng = described.fingerprint, np.random.default_rng(0)
        inputs, logits = (
            rng.normal(size=(options.tokens, width)).astype(np.float32)
            for width in (model.hidden_size, model.num_experts)
        )
        self._request = pb.RouteRequest(
            memory=options.memory,
            layer=model.num_layers - 1,
            model_digest=described.model_digest,
            router_inputs=tensors.to_tensor(inputs),
            router_logits=tensors.to_tensor(logits),
        )
        self._answered_per_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_all, daemon=True)
        self._changed = threading.Condition()  # of the counts
        self._counts: Counter[str] = Counter()
        self._open = 0
        self._sent_s = 0.0

    def measure(self) -> dict[str, Any]:
        """Answers a second to callers that wait for each."""
        ended: list[str] = []
        began = time.monotonic()

        def ask() -> None:
            while time.monotonic() < began + _MEASURED_S:
                ended.append(_kind(self._stub.Route.future(self._request)))

        callers = [threading.Thread(target=ask) for _ in range(self._options.callers)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        counts = Counter(ended)
        self._answered_per_s = counts["answered"] / (time.monotonic() - began)
        return {"could_serve_per_s": self._answered_per_s, **counts}

    def begin(self) -> dict[str, Any]:
        """Sends from now on."""
        self._thread.start()
        return {}

    def end(self) -> dict[str, Any]:
        """Sends no more; what became of each."""
        self._ended.set()
        self._thread.join()
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
        sent = sum(n for kind, n in self._counts.items() if kind != "not_sent")
        return {"sent": sent, "sent_per_s": sent / self._sent_s, **self._counts}

    def _send_all(self) -> None:
        """At an even pace; what is late is sent at once."""
        began, number = time.monotonic(), 0
        pace = self._options.times * self._answered_per_s
        while not self._ended.wait(max(0.0, began + number / pace - time.monotonic())):
            number += 1
            self._send_one()
        self._sent_s = time.monotonic() - began

    def _send_one(self) -> None:
        with self._changed:
            if self._open >= _MOST_OPEN:
                self._counts["not_sent"] += 1
                return
            self._open += 1
        self._stub.Route.future(self._request, timeout=DEADLINE_S).add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        kind = _kind(call)
        with self._changed:
            self._counts[kind] += 1
            self._open -= 1
            self._changed.notify_all()


def _kind(call: Any) -> str:
    """What a call has ended with, once it has."""
    code = call.code()
    return "answered" if code is grpc.StatusCode.OK else code.name.lower()


def main() -> None:
    """Takes orders until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.crowd")
    parser.add_argument("--target", required=True)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--tokens", type=int, required=True, help="in each lookup")
    parser.add_argument("--callers", type=int, required=True, help="that measure")
    parser.add_argument("--times", type=int, default=10, help="what can be served")
    clients = _Clients(parser.parse_args())
    orders = {"measure": clients.measure, "begin": clients.begin, "end": clients.end}
    for line in sys.stdin:
        sys.stdout.write(json.dumps(orders[line.strip()]()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
