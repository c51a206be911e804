"""The files of snapshots, which only Qdrant's REST side hands out: read, and sent back as a new collection."""

from __future__ import annotations

import hashlib
import http.client
import json
import secrets
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from router_service.backends.qdrant_server.connection import Connection
from router_service.errors import (
    BackendMisconfigured,
    BackendUnavailable,
    RoutingServiceError,
    SnapshotInvalid,
    StorageError,
    shorten,
)

# The name of an upload, which the server keeps beside the new collection's snapshots.
UPLOAD = "restored.snapshot"
# Without a byte from the server; and until it has made a collection of what it was sent.
_STALL_S = 60.0
_RECOVERY_S = 3600.0
_BLOCK = 1 << 20
_SETTING = "--qdrant-rest-port (ROUTER_SERVICE_QDRANT_REST_PORT)"


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A snapshot of a collection; `sha256` empty: the server gave none."""

    collection: str
    name: str
    content_bytes: int
    sha256: str


class RestSide:
    """One transfer, on connections of its own; abort() ends it from another thread."""

    def __init__(self, connection: Connection) -> None:
        options = connection.options
        self._host, _, grpc_port = connection.host_and_port.rpartition(":")
        self._port = options.rest_port or int(grpc_port) - 1
        self.url = f"{'https' if options.secure else 'http'}://{self._host}:{self._port}"
        self._key, self._ca, self._secure = options.api_key, options.ca_certificate, options.secure
        self._open: list[http.client.HTTPConnection] = []
        self._ended = False
        self.passed_bytes = 0  # of the file under way

    def read(self, file: SnapshotFile) -> None:
        """Reads all of a snapshot. Raises SnapshotInvalid when it is not what the server made, or StorageError."""
        with self._failures(), self._request("GET", _path(file)) as answer:
            for _ in self._checked(answer, file):
                pass

    def copy(self, file: SnapshotFile, target: str) -> None:
        """Makes a collection `target` of a snapshot, block by block; the server gets the last only when all were right.

        Raises SnapshotInvalid or StorageError; then there may be half of it.
        """
        with self._failures(), self._request("GET", _path(file)) as answer:
            head, tail, content_type = _form()
            length = len(head) + file.content_bytes + len(tail)
            headers = {"content-type": content_type, "content-length": str(length)}
            wanted = {"priority": "snapshot", "wait": "true"}
            wanted |= {"checksum": file.sha256} if file.sha256 else {}
            path = f"/collections/{quote(target)}/snapshots/upload?{urlencode(wanted)}"
            with self._request("POST", path, self._body(head, answer, file, tail), headers) as done:
                done.read()

    def abort(self) -> None:
        """Breaks what is under way; nothing can be done here any more."""
        self._ended = True
        for each in self._open:
            with suppress(OSError, AttributeError):  # not connected yet, or not any more
                each.sock.shutdown(socket.SHUT_RDWR)

    def _body(
        self, head: bytes, answer: http.client.HTTPResponse, file: SnapshotFile, tail: bytes
    ) -> Iterator[bytes]:
        yield head
        yield from self._checked(answer, file)
        yield tail

    def _checked(self, answer: http.client.HTTPResponse, file: SnapshotFile) -> Iterator[bytes]:
        digest, self.passed_bytes = hashlib.sha256(), 0
        while block := answer.read(_BLOCK):
            digest.update(block)
            self.passed_bytes += len(block)
            if self.passed_bytes > file.content_bytes:
                raise _changed(file, f"more than the {file.content_bytes} bytes that were made")
            yield block
        if self.passed_bytes < file.content_bytes:
            raise _changed(file, f"{self.passed_bytes} bytes, {file.content_bytes} were made")
        if file.sha256 and digest.hexdigest() != file.sha256:
            raise _changed(file, f"sha256 {digest.hexdigest()}, {file.sha256} was made")

    @contextmanager
    def _request(
        self,
        method: str,
        path: str,
        body: Iterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer of a request that was granted. Raises StorageError when it was refused."""
        key = {"api-key": self._key} if self._key else {}
        with closing(self._connected()) as connection:
            self._open.append(connection)
            try:
                connection.connect()
                if self._ended:  # abort() may have come before there was a socket
                    raise ConnectionAbortedError("ended")
                refused = _send(connection, method, path, body, {**key, **(headers or {})})
                connection.sock.settimeout(_RECOVERY_S if body is not None else _STALL_S)
                answer = _answer(connection, refused)
                if answer.status != http.client.OK:
                    raise self._refusal(answer)
                yield answer
            finally:
                self._open.remove(connection)

    def _connected(self) -> http.client.HTTPConnection:
        host = self._host.strip("[]")
        if not self._secure:
            return http.client.HTTPConnection(host, self._port, timeout=_STALL_S)
        ca = None if self._ca is None else self._ca.decode(errors="replace")
        context = ssl.create_default_context(cadata=ca)
        return http.client.HTTPSConnection(host, self._port, timeout=_STALL_S, context=context)

    def _refusal(self, answer: http.client.HTTPResponse) -> StorageError:
        text = shorten(_text_of(answer.read(1 << 16)), 300)
        if answer.status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            given = "the API key" if self._key else "a call without an API key"
            return BackendMisconfigured(
                f"the Qdrant server at {self.url} refuses {given} ({text}); set ROUTER_SERVICE_QDRANT_API_KEY or "
                "--qdrant-api-key-file to one that may manage collections"
            )
        if answer.status == http.client.NOT_FOUND:
            return SnapshotInvalid(f"the Qdrant server at {self.url} has it no more: {text}")
        return StorageError(f"the Qdrant server at {self.url} failed with {answer.status}: {text}")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Maps what sockets, TLS and HTTP raise inside."""
        try:
            yield
        except RoutingServiceError:
            raise
        except ssl.SSLCertVerificationError as error:
            problem = f"the certificate of the Qdrant server at {self.url} is not trusted"
            raise BackendMisconfigured(
                f"{problem} ({error.verify_message}); set --qdrant-ca-file (ROUTER_SERVICE_QDRANT_CA_FILE)"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            cause = shorten(str(error) or type(error).__name__, 200)
            raise BackendUnavailable(
                f"the REST side of the Qdrant server at {self.url} does not answer as it should ({cause}); the files "
                f"of snapshots pass there: open its port, or set {_SETTING}"
            ) from error


def _send(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Iterator[bytes] | None,
    headers: dict[str, str],
) -> ConnectionError | None:
    """Sends a request; returns what broke it off, for a server that refuses may not read to the end."""
    try:
        connection.request(method, path, body=body, headers=headers)
    except ConnectionError as error:
        return error
    return None


def _answer(
    connection: http.client.HTTPConnection, broken: ConnectionError | None
) -> http.client.HTTPResponse:
    try:
        return connection.getresponse()
    except (OSError, http.client.HTTPException):
        if broken is not None:
            raise broken from None
        raise


def _path(file: SnapshotFile) -> str:
    return f"/collections/{quote(file.collection)}/snapshots/{quote(file.name)}"


def _form() -> tuple[bytes, bytes, str]:
    """What goes before and after the file of a form, and the form's content type."""
    boundary = secrets.token_hex(16)
    about = f'Content-Disposition: form-data; name="snapshot"; filename="{UPLOAD}"'
    head = f"--{boundary}\r\n{about}\r\nContent-Type: application/octet-stream\r\n\r\n"
    tail = f"\r\n--{boundary}--\r\n"
    return head.encode(), tail.encode(), f"multipart/form-data; boundary={boundary}"


def _text_of(body: bytes) -> str:
    """What a refusal says: {"status": {"error": TEXT}}, or a plain text."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["status"]["error"])
    return body.decode(errors="replace").strip()


def _changed(file: SnapshotFile, what: str) -> SnapshotInvalid:
    return SnapshotInvalid(
        f"{file.name} of collection {file.collection!r} has {what}: it was damaged on the server; use another snapshot"
    )
