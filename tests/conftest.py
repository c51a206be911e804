"""What every test starts from."""

import os

import pytest
from hypothesis import settings

from tests import engines
from tests.engines import server_url, standin_url

__all__ = ["server_url", "standin_url"]

# Timings on a shared machine say nothing about the code.
settings.register_profile("shared_machine", deadline=None)
settings.load_profile("shared_machine")

# One thread: the tests share the machine with the sidecars that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which engines the run exercised."""
    terminalreporter.write_line(engines.summary())
