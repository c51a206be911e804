"""Settings of a service: defaults < environment (ROUTER_SERVICE_*) < command-line flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from knnmoe.channels import MAX_MESSAGE_BYTES
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from router_service.backends.qdrant_server.options import (
    BACKEND_SETTING,
    PREFIX,
    ServerOptions,
    WriteOrdering,
    is_url,
    urls_of,
    without_key,
)
from router_service.errors import InvalidField

EDGE, EXACT = "edge", "exact"
_OTHER_NAMES = {"embedded": EDGE}


def check_backend(place: str) -> str:
    """The name of a backend, or the URL of a server or those of a cluster, each once. Raises ValueError."""
    place = _OTHER_NAMES.get(place, place)
    if place in (EDGE, EXACT):
        return place
    if not is_url(place):
        raise ValueError(
            f"got {without_key(place)!r}, expected edge, exact, or the URL of a Qdrant server"
        )
    try:
        return ",".join(urls_of(place))
    except InvalidField as error:
        raise ValueError(f"got {error.value}, expected {error.expected}") from error


def _octal(mode: object) -> str:
    """Raises ValueError."""
    if not re.fullmatch("0?[67][0-7][0-7]", str(mode)):
        raise ValueError(
            f"got {mode!r}, expected an octal mode that lets the own user in, e.g. 660"
        )
    return str(mode)


class QdrantSettings(BaseSettings):
    """How to use a Qdrant server; each is also an environment variable. Names are Qdrant's own."""

    model_config = SettingsConfigDict(
        env_prefix="ROUTER_SERVICE_QDRANT_", frozen=True, extra="forbid"
    )

    api_key: SecretStr | None = Field(None, description="From the environment only.")
    api_key_file: Path | None = Field(
        None,
        description="File with the API key of the Qdrant server, e.g. /run/secrets/qdrant; or set "
        "ROUTER_SERVICE_QDRANT_API_KEY.",
    )
    ca_file: Path | None = Field(
        None,
        description="PEM file of the authority that signed the Qdrant server's certificate, e.g. /etc/ssl/qdrant.pem; "
        "when not given, those that this machine trusts.",
    )
    prefix: str = Field(
        "knnmoe",
        pattern=f"^{PREFIX.pattern}$",
        description="What the names of this service's collections begin with, e.g. knnmoe-test; services that share "
        "memories share it.",
    )
    shard_number: int | None = Field(
        None,
        ge=1,
        description="Shards of a new layer's collection, e.g. 3; the server's default when not given.",
    )
    replication_factor: int | None = Field(
        None,
        ge=1,
        description="Copies of each shard on a cluster, e.g. 2; the server's default when not given.",
    )
    write_consistency_factor: int | None = Field(
        None,
        ge=1,
        description="Copies that must have a write before it is acknowledged, e.g. 2; the server's default when not "
        "given.",
    )
    on_disk: bool | None = Field(
        None,
        description="Keep keys and payload indexes on disk rather than in RAM, e.g. --qdrant-on-disk; compressed "
        "search keys stay in RAM.",
    )
    wait: bool = Field(
        True,
        description="Acknowledge writes when lookups see them, not when the server has noted them, e.g. "
        "--no-qdrant-wait.",
    )
    write_ordering: WriteOrdering = Field(
        WriteOrdering.WEAK,
        description="Ordering of writes to one entry: weak, medium or strong, e.g. medium.",
    )
    timeout_s: float = Field(
        1.0, gt=0, description="Seconds that a lookup may take the Qdrant server, e.g. 0.2."
    )
    connections: int = Field(
        4,
        ge=1,
        le=64,
        description="Connections to the Qdrant server, or to all nodes of a cluster together (to each at least one), "
        "e.g. 8.",
    )

    def options(self, url: str, named_by: str = BACKEND_SETTING) -> ServerOptions:
        """For what is at `url`, which `named_by` named. Raises InvalidField on a file that cannot be read."""
        key = self.api_key.get_secret_value() if self.api_key else None
        if self.api_key_file is not None:
            key = _read("--qdrant-api-key-file", self.api_key_file).decode(errors="replace").strip()
        ca = None if self.ca_file is None else _read("--qdrant-ca-file", self.ca_file)
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise InvalidField(
                "ROUTER_SERVICE_QDRANT_API_KEY", "a key with odd characters", "printable ASCII"
            )
        return ServerOptions(
            url=",".join(urls_of(url)),
            api_key=key,
            ca_certificate=ca,
            ordering=self.write_ordering,
            named_by=named_by,
            **self.model_dump(exclude={"api_key", "api_key_file", "ca_file", "write_ordering"}),
        )


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidField(
            setting, str(path), f"a file that can be read ({error.strerror})"
        ) from error


class ServiceSettings(BaseSettings):
    """Every setting of `router-service serve`; each is also an environment variable."""

    model_config = SettingsConfigDict(env_prefix="ROUTER_SERVICE_", frozen=True, extra="forbid")

    data: Path | None = Field(
        None,
        description="Directory of the memories, e.g. /var/lib/knnmoe; made when it is not there. With a Qdrant server "
        "optional: hit counts, unfinished writes, snapshots and packs are kept there.",
    )
    listen: str = Field(
        "127.0.0.1:50051",
        description="HOST:PORT (port 0: any free one) or unix:PATH, e.g. unix:/run/knnmoe.sock.",
    )
    backend: Annotated[str, AfterValidator(check_backend)] = Field(
        EDGE,
        description="Where entries are kept: edge (Qdrant Edge, embedded, in --data), exact (NumPy in RAM, nothing is "
        "kept), or the URL of a Qdrant server, e.g. http://localhost:6334, or those of the nodes of a cluster, e.g. "
        "http://a:6334,http://b:6334.",
    )
    snapshot_dir: Path | None = Field(
        None,
        description="Directory that snapshots are kept in, e.g. /backup/snapshots, which services may share; "
        "DATA/snapshots when not given.",
    )
    pack_dir: Path | None = Field(
        None,
        description="The one directory that `snapshot pack` writes to, e.g. /backup; DATA/packs when not given.",
    )
    dashboard: str | None = Field(
        None,
        description="HOST:PORT of a page that shows in a browser what the service holds and does, e.g. 127.0.0.1:8080 "
        "(port 0: any free one); it only reads. Needs knn-moe[dashboard]. Off when not given.",
    )
    metrics: str | None = Field(
        None,
        description="HOST:PORT that answers HTTP at /metrics (Prometheus), /livez and /readyz, e.g. 127.0.0.1:9464 "
        "(port 0: any free one). Off when not given.",
    )
    otlp: str | None = Field(
        None,
        description="URL of a collector of OpenTelemetry (OTLP over gRPC) that the spans of lookups are sent to whose "
        "clients trace them, e.g. http://localhost:4317. Needs knn-moe[otel]. Off when not given.",
    )
    max_in_flight: int = Field(
        64,
        ge=1,
        description="Calls at work before RESOURCE_EXHAUSTED, on the data plane and on the admin plane each; one "
        "memory gets three quarters of them. Four times as many calls and streams may wait for their clients, then "
        "the one that has waited longest is ended, e.g. 16.",
    )
    message_timeout_s: float = Field(
        20.0,
        gt=0,
        description="Seconds that the first message of a call may take to arrive before the call is ended, e.g. 60.",
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
    tls_cert: Path | None = Field(
        None,
        description="PEM file of the certificate that clients at HOST:PORT are shown, with its chain, e.g. "
        "/etc/knnmoe/tls.crt: connections are TLS. Read again when it changes, as its key and the clients' authority.",
    )
    tls_key: Path | None = Field(
        None, description="PEM file of the certificate's key, e.g. /etc/knnmoe/tls.key."
    )
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of the authorities that clients' certificates have to be signed by (mutual TLS), e.g. "
        "/etc/knnmoe/clients.crt; when not given, clients need none.",
    )
    tokens: Path | None = Field(
        None,
        description="TOML file of the tokens that callers have to show, each with a role and memories "
        "(docs/security.md), e.g. /etc/knnmoe/tokens.toml. Read again when it changes. Without it whoever reaches the "
        "address may do everything.",
    )
    audit_log: Path | None = Field(
        None,
        description="File that gets a line of JSON for each call that changes something and for what is refused to its "
        "caller (counted where it goes on and on), e.g. /var/log/knnmoe/audit.jsonl; the log when not given.",
    )
    socket_mode: Annotated[str, BeforeValidator(_octal)] = Field(
        "600",
        description="Mode of the Unix socket, which says who may connect, e.g. 660 for the group too; more than the "
        "own user needs --tokens or --insecure.",
    )
    insecure: bool = Field(
        False,
        description="Allow an address that other machines, or a socket that other users can reach, without TLS and "
        "tokens, e.g. --insecure.",
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR, e.g. WARNING.")
    log_format: str = Field(
        "text",
        description="text, or json: an object a line, with the request that it belongs to, e.g. json.",
    )
    qdrant: QdrantSettings = Field(
        default_factory=lambda: QdrantSettings.model_validate({}), exclude=True
    )

    @model_validator(mode="after")
    def _data_where_needed(self) -> ServiceSettings:
        if self.data is None and not is_url(self.backend):
            raise ValueError(f"--data: required with --backend {self.backend}")
        return self

    @model_validator(mode="after")
    def _tls_complete(self) -> ServiceSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together: give both, or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca: goes with --tls-cert and --tls-key")
        return self

    @property
    def others_connect(self) -> bool:
        """Whether the Unix socket lets other users in than its own."""
        return int(self.socket_mode, 8) & 0o077 != 0

    def on_disk(self, name: str) -> Path | None:
        """A directory under `data`; None where memories are not kept there."""
        return self.data / name if self.data is not None and self.backend == EDGE else None

    @property
    def snapshots(self) -> Path | None:
        """Where snapshots are kept; None: nowhere."""
        return self._beside_data(self.snapshot_dir, "snapshots")

    @property
    def packs(self) -> Path | None:
        """Where archives of snapshots are written; None: nowhere."""
        return self._beside_data(self.pack_dir, "packs")

    def _beside_data(self, given: Path | None, name: str) -> Path | None:
        if self.backend == EXACT:
            return None
        return given or (None if self.data is None else self.data / name)

    @property
    def min_free_bytes(self) -> int | None:
        """min_free_mib in bytes."""
        return None if self.min_free_mib is None else self.min_free_mib << 20
