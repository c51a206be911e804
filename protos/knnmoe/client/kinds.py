"""What a client must know about the kind of a memory."""

from __future__ import annotations

import grpc

from knnmoe.errors import KindMismatch
from knnmoe.v1.errors_pb2 import ERROR_REASON_KIND_MISMATCH, ErrorReason
from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_ASSIGNMENT,
    MEMORY_KIND_LOGIT_DELTA,
    MEMORY_KIND_LOGITS,
)

_BLENDS_LOGITS: dict[int, bool] = {
    MEMORY_KIND_ASSIGNMENT: False,
    MEMORY_KIND_LOGIT_DELTA: True,
    MEMORY_KIND_LOGITS: True,
}


def blends_logits(kind: int) -> bool:
    """Whether values have a number for each expert, and routing is given and answered as logits; else as assignments.

    Raises KindMismatch for a kind of a later version.
    """
    if kind not in _BLENDS_LOGITS:
        raise KindMismatch(
            f"the memory's values are of kind {kind}, which this version of knn-moe does not know; update it",
            code=grpc.StatusCode.FAILED_PRECONDITION,
            reason=ErrorReason.Name(ERROR_REASON_KIND_MISMATCH),
            target="",
        )
    return _BLENDS_LOGITS[kind]
