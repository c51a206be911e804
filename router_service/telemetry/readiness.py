"""Whether a service answers lookups, and why not."""

from __future__ import annotations

from enum import StrEnum


class Readiness(StrEnum):
    """What /readyz says."""

    OPENING = "the memories are being opened"
    READY = "ready"
    BACKEND_AWAY = "the Qdrant server does not answer"
    DRAINING = "the service is shutting down"
