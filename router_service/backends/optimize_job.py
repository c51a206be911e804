"""Starts the process that optimizes a copy of a shard, waits for it, and stops it when asked."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from router_service.backends.base import CollectionSpec, Quantization
from router_service.backends.boundary import storage_call
from router_service.errors import StorageError

_CHILD = "router_service.backends.optimize_child"
_STDERR_TAIL = 2000


class OptimizeJob:
    """One run of the child; never a fork: a forked engine hangs at its first query."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, shard: Path, spec: CollectionSpec, quantization: Quantization) -> None:
        """Optimizes the shard in place. Raises StorageError with the end of the child's stderr when it fails."""
        with storage_call(f"optimize {shard}"):
            process = self._start([str(shard), str(spec.dimension), spec.metric, quantization])
            stderr = _wait(process)
        if self._stopped:
            raise StorageError(f"optimizing {shard} was stopped")
        if process.returncode:
            tail = stderr.decode(errors="replace")[-_STDERR_TAIL:].strip()
            raise StorageError(
                f"optimizing {shard} failed with status {process.returncode}: {tail}"
            )

    def stop(self) -> None:
        """Kills the child, now or as soon as it starts; run() raises."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopped:
                raise StorageError("the optimization was stopped before it began")
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _CHILD, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            return self._process


def _wait(process: subprocess.Popen[bytes]) -> bytes:
    """What the child wrote to stderr until it ended; it does not outlive an interrupt."""
    try:
        return process.communicate()[1]
    except BaseException:
        process.kill()
        process.wait()
        raise
