"""Ids of memory entries: the same entry always gets the same id, so that writing it again replaces it."""

from __future__ import annotations

import hashlib
import json


def entry_id(source: str, example: str, position: int) -> int:
    """Id in [0, 2^63) of the entry at a token position of an example."""
    place = json.dumps([source, example, position], separators=(",", ":")).encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1
