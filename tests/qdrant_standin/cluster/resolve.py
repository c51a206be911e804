"""One answer of several replicas: what all of them, or most of them, agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from router_service.backends.qdrant_server.wire import q as pb


def required(consistency: pb.ReadConsistency, replicas: int) -> tuple[int, bool]:
    """How many answers a read wants, and whether most of them agreeing is enough."""
    if consistency.WhichOneof("value") == "type":
        match consistency.type:
            case pb.All:
                return replicas, False
            case pb.Majority:
                return replicas, True
        return replicas // 2 + 1, False
    return min(max(1, consistency.factor), replicas), False


def counts(answers: Sequence[int], majority: bool) -> int:
    """The smallest; of a majority the one in the middle."""
    return sorted(answers)[len(answers) // 2] if majority else min(answers)


def points(
    answers: Sequence[Sequence[Any]], majority: bool, content: Callable[[Any], Any]
) -> list[Any]:
    """Those that enough answers have with the same content, in the order of the answers."""
    enough = len(answers) // 2 + 1 if majority else len(answers)
    seen = Counter((repr(each.id), content(each)) for answer in answers for each in answer)
    found: dict[str, Any] = {}
    for answer in answers:
        for each in answer:
            if seen[repr(each.id), content(each)] >= enough:
                found.setdefault(repr(each.id), each)
    return list(found.values())


def record(found: Any) -> str:
    """The content of a retrieved point."""
    return repr((found.payload, found.vector))


def scored(found: Any) -> str:
    """The content of a found point; versions are numbers of each replica's own."""
    return repr((found.payload, found.vector, found.score))
