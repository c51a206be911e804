"""What a shell asks while somebody types: it must be quick, and say nothing where there is nothing to say."""

from __future__ import annotations

from pathlib import Path

import grpc

from knnmoe.channels import open_channel
from knnmoe.credentials import Credentials
from knnmoe.errors import BadCredentials
from knnmoe.v1 import memory_admin_pb2, memory_admin_pb2_grpc


def memory_names(
    target: str, start: str = "", within_s: float = 0.5, **files: Path | None
) -> list[str]:
    """Names of the service's memories that begin with `start`; none when it does not answer in that time.

    files: as of Credentials, before those of the environment.
    """
    try:
        opened = open_channel(target, credentials=Credentials.of_environment(**files))
    except BadCredentials:
        return []
    with opened as channel:
        stub = memory_admin_pb2_grpc.MemoryAdminServiceStub(channel)
        try:
            reply = stub.ListMemories(memory_admin_pb2.ListMemoriesRequest(), timeout=within_s)
        except grpc.RpcError:  # a completion cannot say it; the command itself will
            return []
    return [memory.name for memory in reply.memories if memory.name.startswith(start)]
