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

    data: Path = Field(description="Directory of the memories; made when it is not there.")
    listen: str = Field("127.0.0.1:50051", description="HOST:PORT, or unix:PATH.")
    backend: BackendName = Field(BackendName.EDGE, description="Storage engine.")
    max_in_flight: int = Field(64, ge=1, description="Calls in flight before RESOURCE_EXHAUSTED.")
    max_message_bytes: int = Field(MAX_MESSAGE_BYTES, ge=1024, description="Largest gRPC message.")
    flush_interval_s: float = Field(
        5.0, gt=0, description="Longest time between background flushes."
    )
    drain_s: float = Field(
        10.0, ge=0, description="How long calls in flight may finish on SIGTERM."
    )
    insecure: bool = Field(
        False, description="Allow an address that other machines can reach, without authentication."
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")
