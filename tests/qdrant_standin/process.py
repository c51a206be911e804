"""The stand-in, or a cluster of it, in a process of its own, which can be killed."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc

READY_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 60.0
_ROOT = Path(__file__).parents[2]


class _Process:
    """`python -m tests.qdrant_standin` with flags, from start() to kill() or stop()."""

    def __init__(self, directory: Path, flags: Sequence[str]) -> None:
        self._flags = ["--data", str(directory), *flags]
        self._log = directory.parent / f"{directory.name}.{time.monotonic_ns()}.stderr"

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()

    @property
    def stderr(self) -> str:
        """What the process complained of so far."""
        return self._log.read_text()

    def _start(self, *flags: str) -> tuple[str, str]:
        """What it says of its gRPC and its REST side. Raises AssertionError with its stderr."""
        command = [sys.executable, "-m", "tests.qdrant_standin", *self._flags, *flags]
        pipe = subprocess.PIPE
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, cwd=_ROOT, bufsize=0
            )
        line = self.read_line()
        if not line.startswith("listening on "):
            self.__exit__()
            raise AssertionError(f"the stand-in did not start: {line!r}\n{self.stderr}")
        return line.removeprefix("listening on "), self.read_line().removeprefix("REST on ")

    def kill(self) -> None:
        """SIGKILL: nothing is flushed or closed."""
        self.process.kill()
        self._wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        return self._wait()

    def send(self, call: str, peer: int | None = None, **arguments: Any) -> Any:
        """What a call gives; AssertionError when the process did not take it."""
        assert self.process.stdin is not None
        line = json.dumps({"call": call, "peer": peer, "arguments": arguments})
        self.process.stdin.write(f"{line}\n".encode())
        answer = self.read_line()
        assert answer.startswith("ok "), answer
        return json.loads(answer.removeprefix("ok "))

    def read_line(self) -> str:
        """A line of its stdout; empty when it ended or took too long."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], READY_TIMEOUT_S)
        return self.process.stdout.readline().decode().strip() if ready else ""

    def _wait(self) -> int:
        code = self.process.wait(EXIT_TIMEOUT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return code


class StandInProcess(_Process):
    """One server, from __init__ to __exit__, on one port and directory."""

    def __init__(
        self,
        directory: Path,
        *,
        port: int = 0,
        api_key: str | None = None,
        version: str = "1.20.0",
        indexing_threshold_kb: int = 10_000,
    ) -> None:
        """Returns when it listens. Raises AssertionError with its stderr when it does not."""
        flags = ["--version", version, "--indexing-threshold-kb", str(indexing_threshold_kb)]
        flags += [] if api_key is None else ["--api-key", api_key]
        super().__init__(directory, flags)
        self.faults = RemoteFaults(self)
        self.port = port
        self.restart()

    def __enter__(self) -> StandInProcess:
        return self

    def restart(self) -> None:
        """Serves again after kill() or stop(), what was acknowledged before included."""
        self.url, self.rest_url = self._start("--port", str(self.port))
        self.port = int(self.url.rsplit(":", 1)[1])


class ClusterProcess(_Process):
    """A QdrantCluster in a process of its own, for what is timed; its peers are lost and come back as there."""

    def __init__(self, directory: Path, peers: int = 3, *, time_scale: float = 0.1) -> None:
        """Returns when all listen. Raises AssertionError with its stderr when they do not."""
        super().__init__(directory, ["--peers", str(peers), "--time-scale", str(time_scale)])
        urls, rest_urls = (each.split(",") for each in self._start())
        self.peers = [
            RemotePeer(self, number, url, rest_url)
            for number, (url, rest_url) in enumerate(zip(urls, rest_urls, strict=True))
        ]

    def __enter__(self) -> ClusterProcess:
        return self

    @property
    def urls(self) -> list[str]:
        """Of all peers."""
        return [peer.url for peer in self.peers]

    def wait_whole(self) -> None:
        """See QdrantCluster."""
        self.send("wait_whole")

    def collections(self) -> list[str]:
        """See QdrantCluster."""
        return list(self.send("collections"))

    def replicas_differ(self, collection: str) -> list[str]:
        """See QdrantCluster."""
        return list(self.send("replicas_differ", collection=collection))


class RemotePeer:
    """A peer of a ClusterProcess. See Peer."""

    def __init__(self, process: ClusterProcess, number: int, url: str, rest_url: str) -> None:
        self.url, self.rest_url, self.port = url, rest_url, int(url.rsplit(":", 1)[1])
        self.faults = RemoteFaults(process, number)
        self.kill = partial(process.send, "kill", number)
        self.stop = partial(process.send, "stop", number)
        self.start = partial(process.send, "start", number)
        self.hang = partial(process.send, "hang", number)
        self.resume = partial(process.send, "resume", number)
        self.cut_off = partial(process.send, "cut_off", number)
        self.join = partial(process.send, "join", number)


class RemoteFaults:
    """The faults of a process, as in Faults; a restarted process has none."""

    def __init__(self, process: _Process, peer: int | None = None) -> None:
        self._process, self._peer = process, peer

    def delay(self, seconds: float, method: str | None = None, calls: int | None = None) -> None:
        """See Faults.delay."""
        self.send("delay", seconds=seconds, method=method, calls=calls)

    def black_hole(self, method: str | None = None, calls: int | None = None) -> None:
        """See Faults.black_hole."""
        self.send("black_hole", method=method, calls=calls)

    def fail(
        self,
        code: grpc.StatusCode,
        text: str = "injected",
        method: str | None = None,
        calls: int | None = None,
        trailing: Sequence[tuple[str, str]] = (),
    ) -> None:
        """See Faults.fail."""
        pairs = list(map(list, trailing))
        self.send("fail", code=code.name, text=text, method=method, calls=calls, trailing=pairs)

    def rate_limit(
        self, retry_after_s: int, method: str | None = None, calls: int | None = None
    ) -> None:
        """See Faults.rate_limit."""
        self.send("rate_limit", retry_after_s=retry_after_s, method=method, calls=calls)

    def blind(self, pattern: str) -> None:
        """See Faults.blind."""
        self.send("blind", pattern=pattern)

    def version(self, version: str) -> None:
        """What HealthCheck says from now on."""
        self.send("version", version=version)

    def lift(self) -> None:
        """See Faults.lift."""
        self.send("lift")

    def send(self, call: str, **arguments: Any) -> None:
        """AssertionError when the process did not take it."""
        self._process.send(call, self._peer, **arguments)
