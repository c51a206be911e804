"""`router-service serve`: runs the routing sidecar."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from router_service.cli import setting_options as options
from router_service.cli.dashboard import Dashboard
from router_service.cli.errors import BadInput
from router_service.cli.given_settings import Given
from router_service.cli.options import ExampleCommand
from router_service.cli.probes import Probes
from router_service.errors import InvalidRequest, RoutingServiceError
from router_service.rpc.audit import audit_to
from router_service.rpc.server import RoutingServer
from router_service.settings import ServiceSettings
from router_service.telemetry.logs import configure as configure_logging

log = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

# Python's 5 ms is what a lookup waits for the interpreter beside an upsert; with this, p99 falls from 9.6 to 8.6 ms.
_SWITCH_INTERVAL_S = 0.0005
# What the service writes is nobody else's to read.
_OWNER_ONLY = 0o077
# Arenas of glibc's allocator, 8 for each core by default. Each keeps what it was once given, and threads come to all of
# them: beside snapshots that are restored and deleted the heap grew from 52 to 77 MiB, with two from 51 to 55.
_ARENAS, _M_ARENA_MAX = 2, -8
EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
_help = partial(options.setting_help, ServiceSettings)


@app.command(cls=ExampleCommand)
def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            envvar="ROUTER_SERVICE_CONFIG",
            help="Options from a TOML file, by their names without the dashes (max-in-flight = 16); the command line "
            "and the environment come before it, e.g. /etc/knnmoe/router-service.toml.",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help=_help("data"), show_default=False)] = None,
    listen: Annotated[str | None, typer.Option(help=_help("listen"))] = None,
    backend: Annotated[str | None, typer.Option(help=_help("backend"))] = None,
    snapshot_dir: Annotated[
        Path | None, typer.Option(help=_help("snapshot_dir"), show_default=False)
    ] = None,
    pack_dir: Annotated[
        Path | None, typer.Option(help=_help("pack_dir"), show_default=False)
    ] = None,
    dashboard: Annotated[
        str | None, typer.Option(help=_help("dashboard"), show_default=False)
    ] = None,
    metrics: Annotated[str | None, typer.Option(help=_help("metrics"), show_default=False)] = None,
    otlp: Annotated[str | None, typer.Option(help=_help("otlp"), show_default=False)] = None,
    max_in_flight: Annotated[int | None, typer.Option(help=_help("max_in_flight"))] = None,
    message_timeout_s: Annotated[
        float | None, typer.Option(help=_help("message_timeout_s"))
    ] = None,
    max_message_bytes: Annotated[int | None, typer.Option(help=_help("max_message_bytes"))] = None,
    flush_interval_s: Annotated[float | None, typer.Option(help=_help("flush_interval_s"))] = None,
    drain_s: Annotated[float | None, typer.Option(help=_help("drain_s"))] = None,
    min_free_mib: Annotated[int | None, typer.Option(help=_help("min_free_mib"))] = None,
    workers: Annotated[int | None, typer.Option(help=_help("workers"))] = None,
    isolate_above_mib: Annotated[int | None, typer.Option(help=_help("isolate_above_mib"))] = None,
    optimize_above_mib: Annotated[
        int | None, typer.Option(help=_help("optimize_above_mib"))
    ] = None,
    qdrant_api_key_file: options.ApiKeyFile = None,
    qdrant_ca_file: options.CaFile = None,
    qdrant_prefix: options.Prefix = None,
    qdrant_shard_number: options.ShardNumber = None,
    qdrant_replication_factor: options.ReplicationFactor = None,
    qdrant_write_consistency_factor: options.WriteConsistencyFactor = None,
    qdrant_on_disk: options.OnDisk = None,
    qdrant_wait: options.Wait = None,
    qdrant_write_ordering: options.Ordering = None,
    qdrant_timeout_s: options.Timeout = None,
    qdrant_connections: options.Connections = None,
    tls_cert: Annotated[Path | None, typer.Option(help=_help("tls_cert"))] = None,
    tls_key: Annotated[Path | None, typer.Option(help=_help("tls_key"))] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help=_help("tls_client_ca"))] = None,
    tokens: Annotated[Path | None, typer.Option(help=_help("tokens"))] = None,
    audit_log: Annotated[Path | None, typer.Option(help=_help("audit_log"))] = None,
    socket_mode: Annotated[
        str | None, typer.Option(metavar="MODE", help=_help("socket_mode"))
    ] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help=_help("insecure"))] = None,
    log_level: Annotated[str | None, typer.Option(help=_help("log_level"))] = None,
    log_format: Annotated[str | None, typer.Option(help=_help("log_format"))] = None,
) -> None:
    """Serve the memories of a directory, or of a Qdrant server, until SIGTERM or Ctrl-C.

    Prints one line with the address on stdout when it is ready, another one each for --dashboard and --metrics; logs go
    to stderr.

    Example:
      router-service serve --data /var/lib/knnmoe --listen unix:/run/knnmoe.sock
      router-service serve --data /var/lib/knnmoe --dashboard 127.0.0.1:8080
      router-service serve --data /var/lib/knnmoe --metrics 127.0.0.1:9464 --log-format json
      ROUTER_SERVICE_DATA=/var/lib/knnmoe router-service serve --listen 127.0.0.1:0
      router-service serve --backend http://localhost:6334 --qdrant-replication-factor 2
      router-service serve --config /etc/knnmoe/router-service.toml

    """
    flags = {name: value for name, value in locals().items() if value is not None}
    flags.pop("config", None)
    with _ending():
        given = Given.read(flags, config)
        settings = given.settings()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    os.umask(_OWNER_ONLY)  # of engine processes too
    limit_arenas()
    with _ending(given):
        configure_logging(settings.log_level, settings.log_format)
        if settings.audit_log is not None:
            audit_to(settings.audit_log)
        with closing(Dashboard(settings)) as page, closing(Probes(settings)) as probes:
            _run(RoutingServer(settings), page, probes)


def limit_arenas() -> None:
    """Of malloc in this process, before it has threads; unless MALLOC_ARENA_MAX says how many, or it is not glibc's."""
    libc = ctypes.CDLL(None)
    if "MALLOC_ARENA_MAX" not in os.environ and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_ARENA_MAX, _ARENAS)


@contextmanager
def _ending(given: Given | None = None) -> Iterator[None]:
    """What cannot be used as lines on stderr, then the exit."""
    try:
        yield
    except (BadInput, RoutingServiceError) as error:
        invalid = isinstance(error, InvalidRequest)
        said = given.explained(error) if given and isinstance(error, InvalidRequest) else str(error)
        for line in said.splitlines():
            typer.echo(f"router-service: {line}", err=True)
        bad = invalid or isinstance(error, BadInput)
        raise typer.Exit(EXIT_BAD_INPUT if bad else EXIT_FAILED) from error


def _run(server: RoutingServer, page: Dashboard, probes: Probes) -> None:
    stop_asked = _stop_signals()
    try:
        url_of_metrics = probes.start(server.pages())
        server.start()
        typer.echo(f"listening on {server.address}")
        where = server.for_own_clients() if page.is_on else ("", None)
        if (url := page.start(*where)) is not None:
            typer.echo(f"dashboard on {url}")
        if url_of_metrics is not None:
            typer.echo(f"metrics on {url_of_metrics}")
        _tell_systemd("READY=1")
        os.read(stop_asked, 1)
        _tell_systemd("STOPPING=1")
    finally:
        page.close()
        server.stop()


def _tell_systemd(state: str) -> None:
    """Of a unit of Type=notify, see sd_notify(3); elsewhere there is nobody to tell."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    place = f"\0{address[1:]}" if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.sendto(state.encode(), place)
    except OSError as error:  # a variable that was inherited from elsewhere ends no service
        log.warning("NOTIFY_SOCKET %s: %s", address, error)


def _stop_signals() -> int:
    """A file descriptor that becomes readable on SIGTERM or Ctrl-C.

    The kernel may hand a signal to one of gRPC's threads, and a main thread that waits on a lock would sleep on.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return readable
