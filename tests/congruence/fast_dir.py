from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MEMORY_FILES = Path("/dev/shm")
NEEDED_BYTES = 2**30  # less, as in many containers, could end a mapped write in SIGBUS


@contextmanager
def ram_dir(otherwise: Path) -> Iterator[Path]:
    """A directory in RAM where there is room for one."""
    if not MEMORY_FILES.is_dir() or shutil.disk_usage(MEMORY_FILES).free < NEEDED_BYTES:
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=MEMORY_FILES) as directory:
        yield Path(directory)


@pytest.fixture
def fast_dir(tmp_path: Path) -> Iterator[Path]:
    """In RAM where it can be: these tests are about answers, not about disks."""
    with ram_dir(tmp_path) as directory:
        yield directory
