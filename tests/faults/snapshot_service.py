"""A service that does nothing but make and restore snapshots, for tests that kill it.

It says what it begins and what it has done: `restoring WEEKDAY`, `restored WEEKDAY`, `snapshot NAME`, and so on.
"""

from __future__ import annotations

import sys
from itertools import cycle
from pathlib import Path

from router_service.snapshots import local
from tests.unit.router_service.numbered_memory import open_store


def main(directory: Path) -> None:
    with open_store(directory / "data") as store:
        snapshot_store = directory / "snapshots"
        for weekday in cycle(["monday", "tuesday"]):
            say(f"restoring {weekday}")
            path = local.find(snapshot_store, "bible", weekday)
            local.restore(store, path, "bible", replacing=True, min_free_bytes=0, retire_after_s=0)
            say(f"restored {weekday}")
            made = local.create(store, "bible", snapshot_store, min_free_bytes=0)
            say(f"snapshot {made.name}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
