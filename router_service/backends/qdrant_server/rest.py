"""The files of snapshots, which only Qdrant's REST side hands out: read, and sent back as a new collection."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import IO, Any, cast
from urllib.parse import quote

import httpx

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
        host, _, grpc_port = connection.host_and_port.rpartition(":")
        port = options.rest_port or int(grpc_port) - 1
        self.url = f"{'https' if options.secure else 'http'}://{host}:{port}"
        self._key, self._ca = options.api_key, options.ca_certificate
        self._sockets: list[socket.socket] = []
        self._ended = False
        self.passed_bytes = 0  # of the file under way

    def read(self, file: SnapshotFile) -> None:
        """Reads all of a snapshot. Raises SnapshotInvalid when it is not what the server made, or StorageError."""
        with self._transfer() as client, self._download(client, file) as blocks:
            for _ in blocks:
                pass

    def copy(self, file: SnapshotFile, target: str) -> None:
        """Makes a collection `target` of a snapshot, block by block; the server gets the last only when all were right.

        Raises SnapshotInvalid or StorageError; then there may be half of it.
        """
        wanted = {"priority": "snapshot", "wait": "true"}
        wanted |= {"checksum": file.sha256} if file.sha256 else {}
        path = f"/collections/{quote(target)}/snapshots/upload"
        with self._transfer() as client, self._download(client, file) as blocks:
            upload = cast("IO[bytes]", _Upload(blocks, file.content_bytes))
            patience = httpx.Timeout(_STALL_S, read=_RECOVERY_S)
            extensions = {"trace": self._note_sockets}
            answer = client.post(
                path,
                params=wanted,
                files={"snapshot": (UPLOAD, upload)},
                timeout=patience,
                extensions=extensions,
            )
            self._require_granted(answer)

    def abort(self) -> None:
        """Breaks what is under way; nothing can be done here any more."""
        self._ended = True
        for each in self._sockets:
            with suppress(OSError):  # closed already
                each.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _transfer(self) -> Iterator[httpx.Client]:
        """A client of the server's; maps what it raises inside."""
        key = {"api-key": self._key} if self._key else {}
        ca = None if self._ca is None else self._ca.decode(errors="replace")
        # Never through a proxy of the environment: the server is the operator's own.
        with (
            self._failures(),
            httpx.Client(
                base_url=self.url,
                headers=key,
                verify=ssl.create_default_context(cadata=ca),
                timeout=_STALL_S,
                trust_env=False,
            ) as client,
        ):
            yield client

    @contextmanager
    def _download(self, client: httpx.Client, file: SnapshotFile) -> Iterator[Iterator[bytes]]:
        """The blocks of a snapshot; the last one comes when all of it was right."""
        path = f"/collections/{quote(file.collection)}/snapshots/{quote(file.name)}"
        with client.stream("GET", path, extensions={"trace": self._note_sockets}) as answer:
            self._require_granted(answer)
            yield self._checked(answer, file)

    def _checked(self, answer: httpx.Response, file: SnapshotFile) -> Iterator[bytes]:
        digest, self.passed_bytes = hashlib.sha256(), 0
        for block in answer.iter_raw(_BLOCK):
            digest.update(block)
            self.passed_bytes += len(block)
            if self.passed_bytes > file.content_bytes:
                raise _changed(file, f"more than the {file.content_bytes} bytes that were made")
            yield block
        if self.passed_bytes < file.content_bytes:
            raise _changed(file, f"{self.passed_bytes} bytes, {file.content_bytes} were made")
        if file.sha256 and digest.hexdigest() != file.sha256:
            raise _changed(file, f"sha256 {digest.hexdigest()}, {file.sha256} was made")

    def _note_sockets(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by httpx with each step of a request: abort() needs the sockets, httpx hands them out nowhere else."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            stream = info["return_value"]
            self._sockets.append(stream.get_extra_info("socket"))
            if self._ended:  # abort() may have come before there was a socket
                stream.close()
                raise ConnectionAbortedError("ended")

    def _require_granted(self, answer: httpx.Response) -> None:
        """Raises StorageError when a request was refused."""
        if answer.status_code == HTTPStatus.OK:
            return
        text = shorten(_text_of(answer.read()), 300)
        if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            given = "the API key" if self._key else "a call without an API key"
            raise BackendMisconfigured(
                f"the Qdrant server at {self.url} refuses {given} ({text}); set ROUTER_SERVICE_QDRANT_API_KEY or "
                "--qdrant-api-key-file to one that may manage collections"
            )
        if answer.status_code == HTTPStatus.NOT_FOUND:
            raise SnapshotInvalid(f"the Qdrant server at {self.url} has it no more: {text}")
        raise StorageError(
            f"the Qdrant server at {self.url} failed with {answer.status_code}: {text}"
        )

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except RoutingServiceError:
            raise
        except (OSError, httpx.HTTPError) as error:
            if (untrusted := _certificate_error(error)) is not None:
                problem = f"the certificate of the Qdrant server at {self.url} is not trusted"
                raise BackendMisconfigured(
                    f"{problem} ({untrusted.verify_message}); set --qdrant-ca-file (ROUTER_SERVICE_QDRANT_CA_FILE)"
                ) from error
            cause = shorten(str(error) or type(error).__name__, 200)
            raise BackendUnavailable(
                f"the REST side of the Qdrant server at {self.url} does not answer as it should ({cause}); the files "
                f"of snapshots pass there: open its port, or set {_SETTING}"
            ) from error


class _Upload(io.RawIOBase):
    """Blocks of known length as a file: httpx asks for the length first, then reads on."""

    def __init__(self, blocks: Iterator[bytes], content_bytes: int) -> None:
        self._blocks, self._content_bytes, self._at = blocks, content_bytes, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves nothing: only the end is asked for, and the beginning again."""
        self._at = self._content_bytes if whence == io.SEEK_END else offset
        return self._at

    def tell(self) -> int:
        """Where seek() left it."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next block, whatever its size; b"" at the end."""
        return next(self._blocks, b"")


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """What lies behind an error of httpx, if it is that."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def _text_of(body: bytes) -> str:
    """What a refusal says: {"status": {"error": TEXT}}, or a plain text."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["status"]["error"])
    return body.decode(errors="replace").strip()


def _changed(file: SnapshotFile, what: str) -> SnapshotInvalid:
    return SnapshotInvalid(
        f"{file.name} of collection {file.collection!r} has {what}: it was damaged on the server; use another snapshot"
    )
