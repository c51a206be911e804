"""Spans of OpenTelemetry where the program around has set it up; elsewhere a look into a dict, and nothing else."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

# Whoever traces has imported it; nobody else pays for its import.
_API = "opentelemetry.trace"
_NOTHING: AbstractContextManager[Any] = nullcontext()


def span(name: str, **attributes: str | int) -> AbstractContextManager[Any]:
    """Around work that is a span of its own, with attributes `knnmoe.NAME`; what it raises is noted there."""
    api = sys.modules.get(_API)
    if api is None:
        return _NOTHING
    provider = api.get_tracer_provider()
    if isinstance(provider, api.ProxyTracerProvider):  # imported by another library, and not set up
        return _NOTHING
    named = {f"knnmoe.{key}": value for key, value in attributes.items()}
    tracer: Any = provider.get_tracer("knnmoe")
    made: AbstractContextManager[Any] = tracer.start_as_current_span(
        f"knnmoe.{name}", attributes=named
    )
    return made


def traceparent() -> str:
    """Of the span that this is in, as in W3C Trace Context; "" outside of any."""
    api = sys.modules.get(_API)
    if api is None:
        return ""
    of = api.get_current_span().get_span_context()
    if not of.is_valid:
        return ""
    return f"00-{of.trace_id:032x}-{of.span_id:016x}-{of.trace_flags:02x}"
