"""Settings of a service: defaults < environment (ROUTER_SERVICE_*) < command-line flags."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from knnmoe.channels import MAX_MESSAGE_BYTES
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class BackendName(StrEnum):
    """Where entries live."""

    EDGE = "edge"  # Qdrant Edge in this process, on disk
    EXACT = "exact"  # NumPy in RAM; nothing is kept


class ServiceSettings(BaseSettings):
    """Every setting of `router-service serve`; each is also an environment variable."""

    model_config = SettingsConfigDict(env_prefix="ROUTER_SERVICE_", frozen=True, extra="forbid")

    data: Path = Field(
        description="Directory of the memories, e.g. /var/lib/knnmoe; made when it is not there."
    )
    listen: str = Field(
        "127.0.0.1:50051",
        description="HOST:PORT (port 0: any free one) or unix:PATH, e.g. unix:/run/knnmoe.sock.",
    )
    backend: BackendName = Field(
        BackendName.EDGE,
        description="Storage engine: edge (Qdrant Edge, on disk) or exact (NumPy in RAM, nothing is kept), e.g. exact.",
    )
    max_in_flight: int = Field(
        64,
        ge=1,
        description="Calls in flight before RESOURCE_EXHAUSTED; an open stream is one, e.g. 16.",
    )
    max_message_bytes: int = Field(
        MAX_MESSAGE_BYTES, ge=1024, description="Largest gRPC message in bytes, e.g. 134217728."
    )
    flush_interval_s: float = Field(
        5.0,
        gt=0,
        description="Seconds between background flushes: what a loss of power may cost, e.g. 1.",
    )
    drain_s: float = Field(
        10.0, ge=0, description="Seconds that calls in flight have to finish on SIGTERM, e.g. 30."
    )
    min_free_mib: int | None = Field(
        None,
        ge=0,
        description="Free disk in MiB below which writes are refused, e.g. 4096; when not given 1 GiB, or 5 % of a "
        "disk above 20 GiB.",
    )
    workers: int = Field(
        64,
        ge=0,
        description="Engine processes at most, one per layer with much to hold, so that nothing the engine does stops "
        "the service; further layers are held in the service's own process, e.g. 16.",
    )
    isolate_above_mib: int = Field(
        8,
        ge=0,
        description="MiB of keys above which a layer has an engine process of its own, e.g. 64.",
    )
    optimize_above_mib: int = Field(
        8,
        ge=0,
        description="MiB of keys that are not indexed above which a layer is indexed again by itself; 0: only on "
        "command, e.g. 32.",
    )
    insecure: bool = Field(
        False,
        description="Allow an address that other machines can reach, without authentication, e.g. --insecure.",
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR, e.g. WARNING.")

    @property
    def min_free_bytes(self) -> int | None:
        """min_free_mib in bytes."""
        return None if self.min_free_mib is None else self.min_free_mib << 20
