"""Channels to a routing service, and the structured errors that come back over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

# 2,048 tokens of hidden size 4,096 in f32 take 32 MiB.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
ERROR_DOMAIN = "knnmoe.dev"


def message_size_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, int]]:
    """GRPC options that raise the 4 MiB message limit, the same on both sides."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]


def open_channel(target: str, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.Channel:
    """An insecure channel to `host:port` or `unix:PATH`. Connects lazily; never goes through an HTTP proxy."""
    options = [
        *message_size_options(max_message_bytes),
        ("grpc.enable_http_proxy", 0),
        # A sidecar that was restarted is found again within a second or two.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # In spite of its name the time that one attempt gets: a busy machine takes a while to accept.
        ("grpc.min_reconnect_backoff_ms", 5000),
    ]
    return grpc.insecure_channel(target, options=options)


@dataclass(frozen=True, slots=True)
class ServiceError:
    """What a routing service said when it refused a call."""

    code: grpc.StatusCode
    message: str
    # Name of an ErrorReason, or "" when the error did not come from the service itself.
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    # field -> description
    violations: dict[str, str] = field(default_factory=dict)


def service_error(error: Any) -> ServiceError:
    """The structured form of a failed call (a grpc.RpcError, which is also a grpc.Call)."""
    reason, metadata, violations = "", {}, {}
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                violations = {v.field: v.description for v in bad.field_violations}
    return ServiceError(error.code(), error.details() or "", reason, metadata, violations)
