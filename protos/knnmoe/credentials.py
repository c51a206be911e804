"""What a client shows a service, and by what it knows the service: files that arguments or the environment name.

A secret is never an argument, which every user of a machine sees. Without any of them the environment counts:
KNNMOE_CA_FILE, KNNMOE_CERT_FILE, KNNMOE_KEY_FILE, KNNMOE_TOKEN_FILE, and KNNMOE_INSECURE=1.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from knnmoe.watched import Watched

FILES = ("ca_file", "cert_file", "key_file", "token_file")
INSECURE = "KNNMOE_INSECURE"
_PREFIXES = ("dns:///", "dns:", "ipv4:", "ipv6:")


def variable(name: str) -> str:
    """The environment variable of one of FILES."""
    return f"KNNMOE_{name.upper()}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of one client.

    Attributes:
        ca_file: PEM of the authorities that may have signed the service's certificate. With it HOST:PORT is spoken to
            in TLS; for those that the machine trusts name its bundle, e.g. /etc/ssl/certs/ca-certificates.crt.
        cert_file: PEM of the client's own certificate, for a service that asks for one.
        key_file: PEM of its key.
        token_file: the token, on one line; read again when it changes.
        insecure: the token may go in plain text to another machine.

    Raises BadCredentials when a file cannot be used.

    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    token_file: Path | None = None
    insecure: bool = False
    _token: Watched[str] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in FILES:
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(given))
        if (self.cert_file is None) != (self.key_file is None):
            raise bad_credentials("cert_file and key_file go together: give both, or none")
        if self.cert_file is not None and self.ca_file is None:
            raise bad_credentials("cert_file is for TLS, which takes a ca_file too")
        if (path := self.token_file) is not None:
            token = _usable(lambda: Watched([path], lambda: _read_token(path), secret=[path]))
            object.__setattr__(self, "_token", token)

    @staticmethod
    def of_environment(**given: Path | None) -> Credentials:
        """Those that the environment names, maybe none; what is `given` of FILES comes first. Raises BadCredentials."""
        named = {name: given.get(name) or os.environ.get(variable(name)) for name in FILES}
        found = {name: Path(path) for name, path in named.items() if path}
        return Credentials(**found, insecure=os.environ.get(INSECURE, "") not in ("", "0"))

    def channel(self, target: str, options: list[tuple[str, Any]]) -> grpc.Channel:
        """To `host:port` or `unix:PATH`, connected lazily."""
        self._require_private(target)
        if self.speaks_tls(target):
            channel = grpc.secure_channel(target, _usable(self._tls), options=options)
        else:
            channel = grpc.insecure_channel(target, options=options)
        return channel if self._token is None else grpc.intercept_channel(channel, _Bearer(self))

    def speaks_tls(self, target: str) -> bool:
        """Over a Unix socket nobody does."""
        return self.ca_file is not None and not target.startswith("unix")

    def token(self) -> str | None:
        """As the file has it now."""
        return None if self._token is None else self._token.get()

    def mismatch(self, target: str, within_s: float) -> str | None:
        """Why no connection comes about that is one in TLS, or in plain text, with the remedy; None: for other reasons.

        Asked after gRPC failed, whose own words do not say it ("Socket closed").
        """
        if target.startswith("unix"):
            return None
        try:
            return self._tls_mismatch(target, within_s)
        except (OSError, ValueError):  # nobody is there, for instance: gRPC has said so
            return None

    def _tls_mismatch(self, target: str, within_s: float) -> str | None:
        host, port = _host_and_port(target)
        verify = self.speaks_tls(target)
        context = ssl.create_default_context(cafile=str(self.ca_file)) if verify else _unverified()
        context.set_alpn_protocols(["h2"])
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        with socket.create_connection((host, port), within_s) as plain:
            try:
                with context.wrap_socket(plain, server_hostname=host) as encrypted:
                    if not verify:
                        return "it speaks TLS: name its authority with --ca-file or KNNMOE_CA_FILE"
                    if encrypted.recv(1):
                        return None
                    return self._not_wanted("it ended the connection")
            except ssl.SSLCertVerificationError as error:
                return (
                    f"its certificate is not one for {host} that {self.ca_file} vouches for: {error.verify_message}; "
                    "name the right authority with --ca-file or KNNMOE_CA_FILE"
                )
            except ssl.SSLError as error:
                if not verify:
                    return None
                if "ALERT" in (error.reason or ""):
                    return self._not_wanted(str(error.reason))
                return "it does not speak TLS: leave out --ca-file and KNNMOE_CA_FILE, or start it with --tls-cert"

    def _not_wanted(self, why: str) -> str:
        what = (
            "needs a client's certificate"
            if self.cert_file is None
            else "refuses this client's certificate"
        )
        return f"it {what} ({why}): --cert-file and --key-file, or KNNMOE_CERT_FILE and KNNMOE_KEY_FILE"

    def _tls(self) -> grpc.ChannelCredentials:
        ca, key, chain = (
            None if path is None else path.read_bytes()
            for path in (self.ca_file, self.key_file, self.cert_file)
        )
        return grpc.ssl_channel_credentials(ca, key, chain)

    def _require_private(self, target: str) -> None:
        if self._token is None or self.insecure or self.speaks_tls(target) or is_local(target):
            return
        raise bad_credentials(
            f"the token would go to {target} in plain text: name the service's authority with --ca-file or "
            "KNNMOE_CA_FILE, or say so with KNNMOE_INSECURE=1"
        )


def is_local(target: str) -> bool:
    """Whether an address is on this machine whatever a name server says."""
    if target.startswith("unix"):
        return True
    host, _ = _host_and_port(target)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bad_credentials(message: str) -> Exception:
    """Imported when there is one: the health probe needs none of what comes with it."""
    from knnmoe.errors import BadCredentials

    return BadCredentials(message)


def _usable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError as error:
        raise bad_credentials(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise bad_credentials(str(error)) from error


def _read_token(path: Path) -> str:
    """Raises OSError, and ValueError, which does not quote it."""
    token = path.read_bytes().strip()
    if not token or not all(0x21 <= byte <= 0x7E for byte in token):
        raise ValueError(f"{path}: expected one line with a token of printable ASCII, no spaces")
    return token.decode()


def _host_and_port(target: str) -> tuple[str, int]:
    for prefix in _PREFIXES:
        target = target.removeprefix(prefix)
    host, _, port = target.rpartition(":")
    return host.strip("[]"), int(port) if port.isdigit() else 0


def _unverified() -> ssl.SSLContext:
    """To find out whether somebody speaks TLS at all; nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Sends the token with each call."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def _intercepted(self, continuation: Any, details: Any, request: Any) -> Any:
        token = ("authorization", f"Bearer {self._credentials.token()}")
        return continuation(details._replace(metadata=[*(details.metadata or ()), token]), request)

    intercept_unary_unary: Any = _intercepted
    intercept_unary_stream: Any = _intercepted
    intercept_stream_unary: Any = _intercepted
    intercept_stream_stream: Any = _intercepted
