"""Which versions of a Qdrant server this release works with, and what changes from one to the next."""

from __future__ import annotations

import re
from typing import Final

# Since when, and what that changes here. docs/qdrant-server.md prints it.
SUPPORTED: Final[dict[str, str]] = {
    "1.13": "the oldest; quantization int8, binary and product",
    "1.16": "what is sent again, and comes late, undoes no newer write (`update_filter`)",
    "1.17": "of two services that create a memory of one name at the same moment the first counts (before: the later; "
    "`update_mode`); the indexes on `source` and `example` add no links to the graph (before: about 95 bytes an "
    "entry); `read_fan_out_delay_ms` of a collection",
    "1.18": "quantization turbo4, turbo2 and turbo1; the suite has run on 1.18.3, a server and a cluster of three",
    "1.20": "the newest known: that of the images and of the messages (qdrant-client 1.20)",
}
FIRST_TOO_NEW: Final = (2, 0)
OLDEST: Final = next(iter(SUPPORTED))
NEWEST: Final = next(reversed(SUPPORTED))


def numbers_of(version: str) -> tuple[int, int]:
    """Of 1.20.0: (1, 20); of what is no version: (0, 0)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_supported(version: str) -> bool:
    """Whether this release speaks to it; later 1.x are taken to be like the newest known."""
    return numbers_of(OLDEST) <= numbers_of(version) < FIRST_TOO_NEW


def is_known(version: str) -> bool:
    """Whether it is none that came after this release."""
    return numbers_of(version) <= numbers_of(NEWEST)
