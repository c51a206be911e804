"""Ctrl-C waits for a moment at which the work is sound; the second one does not wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from router_service.cli.errors import Interrupted
from router_service.cli.migrate_command import interruptible


def test_the_next_look_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible("ended") as check:
        check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="ended"):
            check()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ends_the_process() -> None:
    program = (
        "import os, signal\n"
        "from router_service.cli.migrate_command import interruptible\n"
        "with interruptible('ended'):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


def test_other_threads_hear_no_signals() -> None:
    looked: list[int] = []

    def work() -> None:
        with interruptible("ended") as check:
            check()
            looked.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert looked == [1]
