"""What every test starts from."""

import os
import signal
from typing import Any

import pytest
from hypothesis import settings

from tests import engines
from tests.browser import browser
from tests.engines import server_url, standin_url

__all__ = ["browser", "server_url", "standin_url"]

# Timings on a shared machine say nothing about the code.
settings.register_profile("shared_machine", deadline=None)
settings.load_profile("shared_machine")

# One thread: the tests share the machine with the sidecars that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A job in the background is started with Ctrl-C ignored, and so is what it starts: commands under test must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_LONG_MODULES = ("tests/faults/", "tests/integration/", "tests/congruence/")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rooms of long modules, which wait more than they work, come first: the end of a run keeps all workers busy."""
    rooms = {room: number for number, room in enumerate(_LONG_MODULES)}
    items.sort(
        key=lambda item: next(
            (n for r, n in rooms.items() if item.nodeid.startswith(r)), len(rooms)
        )
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist tells its engines to the process that sums up."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["engines"] = engines.seen()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """That process hears of them."""
    engines.add(getattr(node, "workeroutput", {}).get("engines", engines.seen()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which engines the run exercised."""
    terminalreporter.write_line(engines.summary())
