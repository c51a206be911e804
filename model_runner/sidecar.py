"""Starts a routing sidecar as a process of its own, and stops it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from knnmoe.client import ServiceUnavailable

# A sidecar that stops lets its calls end and flushes its memories first.
STOP_TIMEOUT_S = 20.0
_READY = "listening on "


@contextmanager
def running_sidecar(
    data: Path, log: Path, listen: str = "127.0.0.1:0", flags: Sequence[str] = ()
) -> Iterator[str]:
    """The address of a sidecar that serves `data` until the block is left; its log goes to a file.

    `flags`: more of `router-service serve`, e.g. --backend URL.

    Raises ServiceUnavailable with the end of the log when it does not start.
    """
    command = [sys.executable, "-m", "router_service", "serve", "--data", str(data)]
    command += ["--listen", listen, *flags]
    with log.open("w") as log_file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log_file, text=True)
        try:
            yield _address(process, log)
        finally:
            _stop(process)


def _address(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None  # noqa: S101  # it is a pipe
    line = process.stdout.readline().strip()
    if not line.startswith(_READY):
        process.wait()
        raise ServiceUnavailable(f"the sidecar did not start:\n{log.read_text()[-2000:]}")
    return line.removeprefix(_READY)


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
