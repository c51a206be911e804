"""Lookups as spans of their clients' traces, sent by OTLP. The libraries are imported when they are used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from router_service import __version__
from router_service.errors import InvalidField, StorageError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_OPTION = "--otlp"
_LIBRARIES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")
# That a collector may take, also when the service stops.
_WITHIN_S = 2


class StageTimes(Protocol):
    """Of a lookup; see knnmoe.v1.StageTimes."""

    decode_ns: int
    search_ns: int
    blend_ns: int
    encode_ns: int


class Traces:
    """Spans of lookups whose client traces them, and of no others."""

    def __init__(self, url: str) -> None:
        """`url`: of a collector of OTLP over gRPC. Raises InvalidField, and StorageError without the libraries."""
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise InvalidField(_OPTION, url, "the URL of a collector, e.g. http://localhost:4317")
        if not all(map(_is_there, _LIBRARIES)):
            raise StorageError(
                f"{_OPTION} needs OpenTelemetry, which cannot be found: pip install 'knn-moe[otel]'"
            )
        self._provider = _provider(url)
        self._tracer = self._provider.get_tracer("knnmoe", __version__)

    @contextmanager
    def lookup(self, request: Any) -> Iterator[Callable[[StageTimes], None]]:
        """Around the lookup of a RouteRequest; its stages are said at the end."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        client = TraceContextTextMapPropagator().extract({"traceparent": request.traceparent})
        attributes = {
            "knnmoe.memory": request.memory,
            "knnmoe.layer": request.layer,
            "knnmoe.request_id": request.request_id,
        }
        began = time.time_ns()
        with self._tracer.start_as_current_span(
            "knnmoe.route", client, SpanKind.SERVER, attributes, start_time=began
        ) as span:
            yield lambda times: self._add_stages(began, times) if span.is_recording() else None

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()

    def _add_stages(self, began: int, times: StageTimes) -> None:
        ended = time.time_ns()
        searched = began + times.decode_ns + times.search_ns
        stages = {
            "decode": (began, began + times.decode_ns),
            "search": (began + times.decode_ns, searched),
            "blend": (searched, searched + times.blend_ns),
            "encode": (ended - times.encode_ns, ended),
        }
        for stage, (start, end) in stages.items():
            self._tracer.start_span(f"knnmoe.{stage}", start_time=start).end(end)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it stands in
        return False


def _provider(url: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

    resource = Resource.create({"service.name": "router-service", "service.version": __version__})
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF), resource=resource)
    exporter = OTLPSpanExporter(endpoint=url, timeout=_WITHIN_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
