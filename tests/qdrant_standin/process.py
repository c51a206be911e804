"""The stand-in in a process of its own, which can be killed."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

READY_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 60.0
_ROOT = Path(__file__).parents[2]


class StandInProcess:
    """`python -m tests.qdrant_standin` from __init__ to __exit__, on one port and directory."""

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
        self._flags = ["--data", str(directory), "--version", version]
        self._flags += ["--indexing-threshold-kb", str(indexing_threshold_kb)]
        self._flags += [] if api_key is None else ["--api-key", api_key]
        self._log = directory.parent / f"{directory.name}.{time.monotonic_ns()}.stderr"
        self.faults = RemoteFaults(self)
        self.port = port
        self.restart()

    def __enter__(self) -> StandInProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()

    @property
    def stderr(self) -> str:
        """What the process complained of so far."""
        return self._log.read_text()

    def restart(self) -> None:
        """Serves again after kill() or stop(), what was acknowledged before included."""
        command = [sys.executable, "-m", "tests.qdrant_standin", *self._flags]
        command += ["--port", str(self.port)]
        pipe = subprocess.PIPE
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, cwd=_ROOT, bufsize=0
            )
        line = self.read_line()
        if not line.startswith("listening on "):
            self.__exit__()
            raise AssertionError(f"the stand-in did not start: {line!r}\n{self.stderr}")
        self.url = line.removeprefix("listening on ")
        self.rest_url = self.read_line().removeprefix("REST on ")
        self.port = int(self.url.rsplit(":", 1)[1])

    def kill(self) -> None:
        """SIGKILL: nothing is flushed or closed."""
        self.process.kill()
        self._wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        return self._wait()

    def read_line(self) -> str:
        """A line of its stdout; empty when it ended or took too long."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], READY_TIMEOUT_S)
        return self.process.stdout.readline().decode().strip() if ready else ""

    def write_line(self, line: str) -> None:
        """A line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def _wait(self) -> int:
        code = self.process.wait(EXIT_TIMEOUT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return code


class RemoteFaults:
    """The faults of a process, as in Faults; a restarted process has none."""

    def __init__(self, process: StandInProcess) -> None:
        self._process = process

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
        """A line of JSON; AssertionError when the process did not take it."""
        self._process.write_line(json.dumps({"call": call, "arguments": arguments}))
        answer = self._process.read_line()
        assert answer == "ok", answer
