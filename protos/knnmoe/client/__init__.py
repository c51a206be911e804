"""The client of a routing service: its data plane, its admin plane, one tree of errors. Needs no torch."""

from knnmoe.client.admin import AdminClient, Upserter, require_same_model
from knnmoe.client.calls import NO_PAUSES_S, PAUSES_S
from knnmoe.client.completion import memory_names
from knnmoe.client.kinds import blends_logits
from knnmoe.client.replication import ReplicaStream, ReplicationClient
from knnmoe.client.routing import ExampleRef, RoutingClient
from knnmoe.credentials import Credentials
from knnmoe.errors import (
    BadCredentials,
    ClientClosed,
    ConnectionMismatch,
    KindMismatch,
    MemoryNotFound,
    ModelMismatch,
    ReplicaBehind,
    ServiceError,
    ServiceRefused,
    ServiceUnavailable,
    service_error,
)

__all__ = [
    "NO_PAUSES_S",
    "PAUSES_S",
    "AdminClient",
    "BadCredentials",
    "ClientClosed",
    "ConnectionMismatch",
    "Credentials",
    "ExampleRef",
    "KindMismatch",
    "MemoryNotFound",
    "ModelMismatch",
    "ReplicaBehind",
    "ReplicaStream",
    "ReplicationClient",
    "RoutingClient",
    "ServiceError",
    "ServiceRefused",
    "ServiceUnavailable",
    "Upserter",
    "blends_logits",
    "memory_names",
    "require_same_model",
    "service_error",
]
