"""The runner's client of a sidecar's admin plane: make, fill, count and calibrate a memory. Fails closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import grpc
import numpy as np
from knnmoe import tensors
from knnmoe.channels import open_channel
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import routing_pb2
from knnmoe.v1.memory_admin_pb2_grpc import MemoryAdminServiceStub
from knnmoe.v1.types_pb2 import MemorySettings
from torch import Tensor

from model_runner.errors import BadInput, ModelMismatch, RoutingRefused, RoutingUnavailable
from model_runner.fingerprint import ModelFingerprint
from model_runner.retries import Retries
from model_runner.rpc_errors import MEMORY_NOT_FOUND, runner_error
from model_runner.upserter import Upserter
from model_runner.wire import encode_fingerprint, encode_floats

Reply = TypeVar("Reply")

ADMIN_TIMEOUT_S = 10.0
# Making a memory opens a collection per layer; calibrating and indexing a layer read every key.
LONG_TIMEOUT_S = 600.0


class MemoryClient:
    """Admin calls on one sidecar. Every failure raises; see errors.py.

    Calls that may be repeated are, at most twice inside their deadline, when the sidecar is restarted meanwhile.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self._channel = open_channel(target)
        self._stub = MemoryAdminServiceStub(self._channel)
        self._retries = Retries()

    def __enter__(self) -> MemoryClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def find(self, name: str) -> routing_pb2.MemoryDescription | None:
        """A memory, or None when there is none of that name."""
        try:
            return self.describe(name)
        except RoutingRefused as refused:
            if refused.reason == MEMORY_NOT_FOUND:
                return None
            raise

    def describe(self, name: str) -> routing_pb2.MemoryDescription:
        """A memory; raises RoutingRefused when there is none of that name."""
        return self._call(self._stub.DescribeMemory, pb.DescribeMemoryRequest(memory=name)).memory

    def find_or_create(
        self, name: str, fingerprint: ModelFingerprint, settings: MemorySettings
    ) -> routing_pb2.MemoryDescription:
        """The memory of that name; made when it is not there.

        Raises ModelMismatch or BadInput when it is there for another model or of another kind.
        """
        found = self.find(name)
        if found is None:
            return self._create(name, fingerprint, settings)
        require_same_model(found, fingerprint)
        if settings.HasField("kind") and found.settings.kind != settings.kind:
            raise BadInput(f"memory {name!r} holds another kind of values; choose another name")
        return found

    def delete(self, name: str) -> int:
        """Removes a memory; returns the entries that it held."""
        request = pb.DeleteMemoryRequest(memory=name)
        # Not repeated: a delete whose answer was lost would find no memory.
        return int(self._once(self._stub.DeleteMemory, request, LONG_TIMEOUT_S).entries)

    def update_settings(self, name: str, settings: MemorySettings) -> routing_pb2.MemoryDescription:
        """Changes how a memory is read."""
        request = pb.UpdateSettingsRequest(memory=name, settings=settings)
        return self._call(self._stub.UpdateSettings, request).memory

    def count(
        self, name: str, layer: int | None = None, ids: np.ndarray[Any, Any] | None = None
    ) -> int:
        """Entries of a memory or of one layer; with ids (u64 [n]), how many of these are there."""
        request = pb.CountRequest(memory=name, layer=layer)
        if ids is not None:
            request.ids.CopyFrom(tensors.to_tensor(ids))
        return int(self._call(self._stub.Count, request).total)

    def calibrate(
        self,
        name: str,
        lambda0: float,
        inputs: Mapping[int, Tensor] | None = None,
        *,
        quantile: float = 0.5,
        dry_run: bool = False,
    ) -> pb.CalibrateResponse:
        """Sets gamma per layer from router inputs [n, d] by layer, or (None) leave-one-example-out in the memory."""
        request = pb.CalibrateRequest(
            memory=name, lambda0=lambda0, quantile=quantile, dry_run=dry_run
        )
        if inputs is None:
            return self._call(self._stub.Calibrate, request, LONG_TIMEOUT_S)
        response = pb.CalibrateResponse()
        for layer, rows in sorted(inputs.items()):  # every layer's in one message would be too much
            del request.inputs[:]
            request.inputs.add(layer=layer, router_inputs=encode_floats(rows))
            one = self._call(self._stub.Calibrate, request, LONG_TIMEOUT_S)
            response.layers.extend(one.layers)
            response.memory.CopyFrom(one.memory)
        return response

    def optimize(self, name: str, quantization: str = "") -> None:
        """Builds the index of one layer after the other; returns when all are done.

        `quantization`: e.g. "int8"; empty keeps each layer's own.
        """
        for layer in self.describe(name).layers:
            request = pb.OptimizeRequest(
                memory=name, layers=[layer.layer], quantization=quantization
            )
            try:
                for _ in self._stub.Optimize(request, timeout=LONG_TIMEOUT_S):
                    pass
            except grpc.RpcError as error:
                raise runner_error(error, self.target) from error

    def upserter(self, timeout_s: float = ADMIN_TIMEOUT_S) -> Upserter:
        """A stream of upserts; close it."""
        return Upserter(self._stub.Upsert, self.target, timeout_s, self._retries)

    def _create(
        self, name: str, fingerprint: ModelFingerprint, settings: MemorySettings
    ) -> routing_pb2.MemoryDescription:
        request = pb.CreateMemoryRequest(
            name=name, fingerprint=encode_fingerprint(fingerprint), settings=settings
        )
        try:
            return self._once(self._stub.CreateMemory, request, LONG_TIMEOUT_S).memory
        except RoutingUnavailable:
            made = self.find(name)  # by this very call, when only its answer was lost
            if made is None:
                raise
            require_same_model(made, fingerprint)
            return made

    def _call(
        self, method: Callable[..., Reply], request: object, timeout_s: float = ADMIN_TIMEOUT_S
    ) -> Reply:
        return self._retries.run(partial(self._once, method, request), timeout_s)

    def _once(self, method: Callable[..., Reply], request: object, timeout_s: float) -> Reply:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise runner_error(error, self.target) from error


def require_same_model(
    memory: routing_pb2.MemoryDescription, fingerprint: ModelFingerprint
) -> None:
    """Raises ModelMismatch, with the fields that differ, when the memory was made for another model."""
    if memory.model_digest != fingerprint.digest():
        raise ModelMismatch(
            f"memory {memory.name!r} was made for another model ({_both_sides(memory, fingerprint)})"
        )


def _both_sides(memory: routing_pb2.MemoryDescription, model: ModelFingerprint) -> str:
    """The fields that differ, as the memory and the model have them."""
    return "; ".join(
        f"{name}: memory {getattr(memory.fingerprint, name)!r}, this model {value!r}"
        for name, value in asdict(model).items()
        if getattr(memory.fingerprint, name) != value
    )
