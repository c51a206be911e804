"""Processes of the service's own: modules of this package, run beside it, which end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_PARENT = "KNNMOE_PARENT_PROCESS"


def start_module(
    module: str,
    arguments: Sequence[str],
    *,
    stderr: int | None,
    pass_fds: Sequence[int] = (),
    niceness: int = 0,
) -> subprocess.Popen[bytes]:
    """`python -m module arguments` with this interpreter and its import path, stdin and stdout closed.

    Never a fork: a forked engine hangs at its first query.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,  # Ctrl-C is for the service, which ends its processes in order
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), _PARENT: str(os.getpid())},
    )
    if niceness:
        with suppress(ProcessLookupError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, process.pid, niceness)
    return process


def die_with_parent_thread() -> None:
    """The kernel kills this process, which start_module() made, when the thread that did so ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != os.environ.get(_PARENT):
        sys.exit("the service has ended")  # before it could be asked for
