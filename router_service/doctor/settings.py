"""Settings of a memory that look like nobody has thought about them."""

from __future__ import annotations

from shlex import quote

from router_service.doctor.findings import Findings, warning
from router_service.memory_settings import MemorySettings, Similarity
from router_service.routing_memory import MemoryRecord


def check_settings(record: MemoryRecord) -> Findings:
    """A bandwidth that is still the default."""
    settings, untouched = record.settings, MemorySettings().gamma
    if settings.similarity is Similarity.RBF and set(settings.gamma) == set(untouched):
        yield warning(
            record.name,
            f"gamma is {untouched[0]:g} everywhere, the default: it was never calibrated to the model's distances",
            f"router-admin calibrate {quote(record.name)}",
        )
