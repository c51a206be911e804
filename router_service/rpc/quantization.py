"""The handlers that change and measure the compression of search keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import grpc
from knnmoe.v1 import quantization_pb2 as pb
from knnmoe.v1 import quantization_pb2_grpc

from router_service import checks
from router_service.arrays import F32
from router_service.backends.base import Compression, Quantization
from router_service.errors import InvalidField
from router_service.jobs.measure import Measurement, Plan, measured
from router_service.jobs.optimize import Indexed, quantized
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory
from router_service.memories.store import MemoryStore
from router_service.operations import Operations
from router_service.rpc import codec
from router_service.rpc.operations import encoded

DEFAULT_SAMPLE = 500
MAX_SAMPLE = 10_000
MAX_OVERSAMPLING = 100


class QuantizationService(quantization_pb2_grpc.QuantizationServiceServicer):
    """Quantize, measure."""

    def __init__(
        self, store: MemoryStore, operations: Operations, min_free_bytes: int | None
    ) -> None:
        self._store, self._operations = store, operations
        self._min_free_bytes = min_free_bytes

    def Quantize(  # noqa: N802
        self, request: pb.QuantizeRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.QuantizeResponse]:
        """Layer after layer."""
        store, memory = self._store, self._store.get(request.memory)
        compression = decode_compression(memory, "compression", request.compression)
        layers, oversampling = memory.chosen_layers(request.layers), _oversampling(request)
        steps = self._operations.run(
            "quantize",
            request.memory,
            lambda report: quantized(store, memory, layers, compression, oversampling, report),
        )
        return encoded(steps, pb.QuantizeResponse, lambda done: encode_indexed(memory, done))

    def MeasureQuantization(  # noqa: N802
        self, request: pb.MeasureQuantizationRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.MeasureQuantizationResponse]:
        """One measurement per layer and compression."""
        memory = self._store.get(request.memory)
        labels = list(request.compressions) or list(Quantization)
        for number, label in enumerate(labels):
            decode_compression(memory, f"compressions[{number}]", label)
        sample = request.sample or DEFAULT_SAMPLE
        if sample > MAX_SAMPLE:
            raise InvalidField("sample", sample, f"0 to {MAX_SAMPLE}")
        plan = Plan(tuple(labels), _oversampling(request), sample, self._min_free_bytes)
        layers = _layers(memory, request)
        steps = self._operations.run(
            "measure-quantization",
            request.memory,
            lambda report: measured(memory, layers, plan, report),
        )
        return encoded(steps, pb.MeasureQuantizationResponse, _encode_measurement)


def decode_compression(memory: RoutingMemory, field: str, label: str) -> Compression:
    """Raises InvalidField when it is no compression of the memory's keys."""
    if not label:
        raise InvalidField(field, "nothing", "a compression such as int8")
    dimension = memory.record.fingerprint.hidden_size
    expected = (
        ", ".join(Quantization)
        + f", pcaP or randomP with 1 <= P < {dimension}, or both as in pca16+int8"
    )
    try:
        compression = Compression.parse(label)
    except ValueError:
        raise InvalidField(field, label, expected) from None
    if compression.search_dimension >= dimension:
        raise InvalidField(field, label, expected)
    return compression


def _oversampling(request: pb.QuantizeRequest | pb.MeasureQuantizationRequest) -> float:
    """0: not given."""
    if request.oversampling and not 1 <= request.oversampling <= MAX_OVERSAMPLING:
        raise InvalidField("oversampling", request.oversampling, f"1 to {MAX_OVERSAMPLING}")
    return float(request.oversampling)


def _layers(
    memory: RoutingMemory, request: pb.MeasureQuantizationRequest
) -> Sequence[tuple[LayerMemory, F32 | None]]:
    """With router inputs where they are given. Raises InvalidField when no layer has entries."""
    if request.inputs:
        return [
            (memory.layer(item.layer), _inputs(memory, item.router_inputs))
            for item in request.inputs
        ]
    chosen = memory.chosen_layers(request.layers) if request.layers else filled_layers(memory)
    return [(layer, None) for layer in chosen]


def filled_layers(memory: RoutingMemory) -> list[LayerMemory]:
    """The layers that are read and hold entries. Raises InvalidField when there are none."""
    read = [x for x in memory.layers if memory.record.settings.speaks_for(x.layer)]
    filled = [layer for layer in read if layer.info().entries]
    if not filled:
        raise InvalidField("memory", "no entries", "a memory with entries; upsert first")
    return filled


def _inputs(memory: RoutingMemory, tensor: Any) -> F32:
    field, model = "inputs.router_inputs", memory.record.fingerprint
    inputs = codec.decode_floats(field, tensor)
    checks.require_matrix(field, inputs, None, model.hidden_size, "hidden_size of the model")
    checks.require_finite(field, inputs)
    if not len(inputs):
        raise InvalidField(field, "no rows", "at least one router input")
    return inputs


def encode_indexed(memory: RoutingMemory, done: Indexed) -> dict[str, Any]:
    """A layer that was indexed or quantized."""
    layer = codec.encode_layer(memory, done.layer)
    return {"layer": layer, "elapsed_s": done.elapsed_s, "recall": done.recall}


def _encode_measurement(measurement: Measurement) -> dict[str, Any]:
    return {"measurement": pb.CompressionMeasurement(**asdict(measurement))}
