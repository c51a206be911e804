"""What both ends of a channel agree on: sizes of messages."""

from __future__ import annotations

import grpc

from knnmoe.credentials import Credentials

# 2,048 tokens of hidden size 4,096 in f32 take 32 MiB.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024


def message_size_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, int]]:
    """GRPC options that raise the 4 MiB message limit, the same on both sides."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]


def open_channel(
    target: str,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    credentials: Credentials | None = None,
) -> grpc.Channel:
    """A channel to `host:port` or `unix:PATH`. Connects lazily; never goes through an HTTP proxy.

    credentials: those of the environment when not given. Raises BadCredentials.
    """
    options = [
        *message_size_options(max_message_bytes),
        ("grpc.enable_http_proxy", 0),
        # A sidecar that was restarted is found again within a second or two.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # In spite of its name the time that one attempt gets: a busy machine takes a while to accept.
        ("grpc.min_reconnect_backoff_ms", 5000),
    ]
    return (credentials or Credentials.of_environment()).channel(target, options)
