"""One trace from a model's forward pass to the search in the service, as a collector of OpenTelemetry gets it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from model_runner.router_hooks import RouterHooks
from model_runner.routing_policy import RetrievalPolicy
from tests.integration.runner_parts import LAYERS, PROMPT, build, client_of, loaded_model
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    random_keys,
    refusal,
    route_request,
)

STAGES = {"knnmoe.decode", "knnmoe.search", "knnmoe.blend", "knnmoe.encode"}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{}"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it gets, by name."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Any]] = {}
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._lock:
            for of_resource in request.resource_spans:
                for span in [span for scope in of_resource.scope_spans for span in scope.spans]:
                    self.spans.setdefault(span.name, []).append(span)
        return trace_service_pb2.ExportTraceServiceResponse()

    def close(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collecting = Collector()
    yield collecting
    collecting.close()


@pytest.mark.parametrize("socket", ["tcp", "unix"])
def test_a_forward_pass_and_its_lookups_are_one_trace(
    socket: str, collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen = "127.0.0.1:0" if socket == "tcp" else f"unix:{tmp_path}/s"
    flags = ("--otlp", collector.url)
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(collector.url)))
    with Sidecar(tmp_path / "data", backend="exact", listen=listen, flags=flags) as sidecar:
        build(sidecar.target, "bible", "recommended")
        monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
        loaded = loaded_model()
        ids = torch.tensor([loaded.tokenizer(PROMPT)["input_ids"]])
        with (
            client_of(sidecar.target, "bible") as client,
            RouterHooks(loaded.model, RetrievalPolicy(client)),
            torch.no_grad(),
        ):
            loaded.model(ids)
        sidecar.stop_cleanly()  # what is left is sent
    provider.shutdown()
    spans = collector.spans
    [forward] = spans["knnmoe.forward"]
    lookups = {span.span_id: span for span in spans["knnmoe.lookup"]}
    routes = {span.span_id: span for span in spans["knnmoe.route"]}
    assert len(lookups) == len(routes) == LAYERS
    assert {span.parent_span_id for span in lookups.values()} == {forward.span_id}
    assert {span.parent_span_id for span in routes.values()} == set(lookups)
    for stage in STAGES:
        assert {span.parent_span_id for span in spans[stage]} == set(routes)
    every = [span for named in spans.values() for span in named]
    assert {span.trace_id for span in every} == {forward.trace_id}
    for route in routes.values():
        asked = lookups[route.parent_span_id]
        assert asked.start_time_unix_nano <= route.start_time_unix_nano
        assert route.end_time_unix_nano <= asked.end_time_unix_nano


def test_only_lookups_that_a_client_traces_are_sent_and_errors_are_said(
    collector: Collector, tmp_path: Path
) -> None:
    flags = ("--otlp", collector.url, "--log-format", "json", "--log-level", "DEBUG")
    with Sidecar(tmp_path / "data", backend="exact", flags=flags) as sidecar:
        digest = sidecar.create("bible", kind=LOGIT_DELTA, gamma=[1.0])
        rng = np.random.default_rng(0)
        request = route_request("bible", digest, random_keys(rng, 1), random_keys(rng, 1, EXPERTS))
        for traceparent in ("", "nonsense", "00-1-2-3", TRACEPARENT.format("00")):
            request.traceparent = traceparent
            sidecar.route(request)
        request.traceparent, request.layer = TRACEPARENT.format("01"), 9
        refusal(sidecar.routing.Route, request)
        sidecar.stop_cleanly()
        lines = [json.loads(line) for line in sidecar.stderr.splitlines()]
    assert list(collector.spans) == ["knnmoe.route"]
    [refused] = collector.spans["knnmoe.route"]
    assert "layer" in refused.status.message
    assert refused.trace_id.hex() == TRACEPARENT.split("-")[1]
    [line] = [each for each in lines if "was refused" in each["message"]]
    assert line["trace_id"] == refused.trace_id.hex()


def test_a_collector_that_is_not_there_ends_nothing(tmp_path: Path) -> None:
    flags = ("--otlp", "http://127.0.0.1:9")
    with Sidecar(tmp_path / "data", backend="exact", flags=flags) as sidecar:
        digest = sidecar.create("bible", kind=LOGIT_DELTA, gamma=[1.0])
        rng = np.random.default_rng(0)
        request = route_request("bible", digest, random_keys(rng, 1), random_keys(rng, 1, EXPERTS))
        request.traceparent = TRACEPARENT.format("01")
        sidecar.route(request)
        sidecar.stop_cleanly()


def test_who_does_not_trace_imports_nothing_of_it() -> None:
    code = (
        "import sys, knnmoe.client, router_service.rpc.server; "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=CALL_TIMEOUT_S, check=False)
    assert ended.returncode == 0
