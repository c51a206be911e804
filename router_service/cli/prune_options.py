"""The flags of `router-admin prune` as the plan that they mean."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum

from knnmoe.v1 import retention_pb2 as pb

from router_service.cli.admin_errors import BadInput

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class RankingName(StrEnum):
    """PruneRanking, as a flag."""

    AGE = "age"
    USE = "use"
    GAIN = "gain"
    STRENGTH = "strength"
    DISAGREEMENT = "disagreement"
    COVERAGE = "coverage"
    RANDOM = "random"

    @property
    def wire_name(self) -> str:
        """Of the enum on the wire."""
        return f"PRUNE_RANKING_{self.value.upper()}"


def filters(texts: Sequence[str] | None) -> list[pb.EntryFilter]:
    """SOURCE or SOURCE/EXAMPLE; the first slash divides. Raises BadInput."""
    found = []
    for text in texts or ():
        source, slash, example = text.partition("/")
        if not source or (slash and not example):
            raise BadInput(f"--forget: got {text!r}, expected SOURCE or SOURCE/EXAMPLE")
        found.append(pb.EntryFilter(source=source, example=example if slash else None))
    return found


def moment(flag: str, text: str | None) -> int | None:
    """Milliseconds since the epoch of a time, or of an age before now. Raises BadInput."""
    if text is None:
        return None
    age = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", text)
    try:
        if age is not None:
            unix_s = time.time() - float(age[1]) * _SECONDS[age[2]]
        else:
            given = datetime.fromisoformat(text)
            unix_s = (given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        expected = "an age such as 30d, 12h or 90s, or a time such as 2026-01-31T12:00 (UTC)"
        raise BadInput(f"{flag}: got {text!r}, expected {expected}") from error
    if unix_s < 0:
        raise BadInput(f"{flag}: got {text!r}, expected a time after 1970")
    return int(unix_s * 1000)


def size(text: str | None) -> tuple[int | None, float | None]:
    """A number of entries, or a share of them, of `5000` or `50%`. Raises BadInput."""
    if text is None:
        return None, None
    share = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%", text)
    if share is not None and 0 < float(share[1]) <= 100:
        return None, float(share[1]) / 100
    if re.fullmatch(r"\d{1,18}", text) and int(text) > 0:
        return int(text), None
    raise BadInput(f"--max-entries: got {text!r}, expected a number such as 5000, or 1% to 100%")
