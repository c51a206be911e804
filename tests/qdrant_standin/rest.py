"""The REST side, as far as snapshots need it: download, upload and recovery, which gRPC does not have."""

from __future__ import annotations

import errno
import json
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import grpc
from google.protobuf.json_format import MessageToDict

from tests.qdrant_standin.errors import ApiError
from tests.qdrant_standin.faults import Faults
from tests.qdrant_standin.gate import ApiKey
from tests.qdrant_standin.http_bodies import BadBody, read_body, uploaded_file
from tests.qdrant_standin.recovery import recover_from_url, recover_upload
from tests.qdrant_standin.snapshots import Snapshots

TITLE = "qdrant - vector search engine"
_OPEN = ("/", "/healthz", "/readyz", "/livez")
_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: HTTPStatus.CONFLICT,
    grpc.StatusCode.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    grpc.StatusCode.DATA_LOSS: HTTPStatus.BAD_REQUEST,
}


class RestServer:
    """Serves from __init__ to close()."""

    def __init__(
        self,
        port: int,
        snapshots: Snapshots,
        cluster_status: Callable[[], dict[str, Any]],
        key: ApiKey,
        faults: Faults,
        certificate: tuple[bytes, bytes] | None,
    ) -> None:
        """`port` is taken if it is free, and another one if not."""
        self.snapshots, self.cluster_status = snapshots, cluster_status
        self.key, self.faults = key, faults
        self._server = _listening(port)
        self._server.daemon_threads = True
        self._server.rest = self  # type: ignore[attr-defined]
        if certificate is not None:
            context = _tls(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Takes no more requests."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _listening(port: int) -> ThreadingHTTPServer:
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        return ThreadingHTTPServer(("127.0.0.1", 0), _Handler)


def _tls(private_key: bytes, chain: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with NamedTemporaryFile() as both:
        both.write(private_key + b"\n" + chain)
        both.flush()
        context.load_cert_chain(both.name)
    return context


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: the tests look at answers."""

    @property
    def _rest(self) -> RestServer:
        return self.server.rest  # type: ignore[attr-defined]

    def _answer(self) -> None:
        started = time.perf_counter()
        split = urlsplit(self.path)
        try:
            self._check_key(split.path)
            self._route(split.path, {k: v[0] for k, v in parse_qs(split.query).items()}, started)
        except ApiError as error:
            self._refuse(error, started)
        except BadBody as error:
            self._send(HTTPStatus.BAD_REQUEST, str(error).encode(), "text/plain")

    def _check_key(self, path: str) -> None:
        if path not in _OPEN:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self._rest.key.check(headers)

    def _refuse(self, error: ApiError, started: float) -> None:
        if error.code == grpc.StatusCode.UNAUTHENTICATED:
            self._send(HTTPStatus.UNAUTHORIZED, error.text.encode(), "text/plain")
            return
        status = _STATUSES.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
        since = time.perf_counter() - started
        self._send_json(status, {"status": {"error": error.text}, "time": since})

    def _route(self, path: str, query: dict[str, str], started: float) -> None:
        if path in _OPEN:
            self._about(path)
            return
        match [unquote(part) for part in path.strip("/").split("/")]:
            case ["cluster"] if self.command == "GET":
                self._done(self._rest.cluster_status, query, started)
            case ["collections", name, "snapshots", *rest]:
                self._snapshots(name, rest, query, started)
            case _:
                self._send(HTTPStatus.NOT_FOUND, b"", "text/plain")

    def _about(self, path: str) -> None:
        if path == "/":
            about = {"title": TITLE, "version": self._rest.faults.version, "commit": ""}
            self._send_json(HTTPStatus.OK, about)
        else:
            self._send(HTTPStatus.OK, f"{path[1:-1]} check passed".encode(), "text/plain")

    def _snapshots(self, name: str, rest: list[str], query: dict[str, str], started: float) -> None:
        snapshots = self._rest.snapshots
        match self.command, rest:
            case "GET", []:
                found = [_description(each) for each in snapshots.list(name)]
                self._done(lambda: found, query, started)
            case "POST", []:
                self._done(lambda: _description(snapshots.create(name)), query, started)
            case "POST", ["upload"]:
                self._upload(name, query, started)
            case "PUT", ["recover"]:
                wanted = _json(self._body())
                self._done(lambda: recover_from_url(snapshots, name, wanted), query, started)
            case "GET", [snapshot]:
                self._send_file(snapshots.path(name, snapshot))
            case "DELETE", [snapshot]:
                self._done(lambda: _deleted(snapshots, name, snapshot), query, started)
            case _:
                self._send(HTTPStatus.NOT_FOUND, b"", "text/plain")

    def _upload(self, name: str, query: dict[str, str], started: float) -> None:
        content_type = self.headers.get("content-type", "")
        file_name, content = uploaded_file(content_type, self._body(), "snapshot")
        snapshots, checksum = self._rest.snapshots, query.get("checksum")
        self._done(
            lambda: recover_upload(snapshots, name, file_name, content, checksum), query, started
        )

    def _done(self, action: Callable[[], Any], query: dict[str, str], started: float) -> None:
        """Answers when the action is done; with wait=false at once."""
        if query.get("wait") == "false":
            threading.Thread(target=_quietly, args=(action,)).start()
            self._send_json(HTTPStatus.ACCEPTED, {"status": "accepted", "time": 0.0})
            return
        result = action()
        since = time.perf_counter() - started
        self._send_json(HTTPStatus.OK, {"result": result, "status": "ok", "time": since})

    def _body(self) -> bytes:
        return read_body(self.headers, self.rfile)

    def _send_json(self, status: HTTPStatus, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send_file(self, path: Path) -> None:
        self._send(HTTPStatus.OK, path.read_bytes(), "application/octet-stream")

    def _send(self, status: HTTPStatus, content: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(content)))
        if status >= HTTPStatus.BAD_REQUEST:  # the rest of the body may not have been read
            self.send_header("connection", "close")
            self.close_connection = True
        with suppress(OSError):  # whoever asked may be gone
            self.end_headers()
            self.wfile.write(content)


def _json(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except ValueError as error:
        raise BadBody(f"Format error in JSON body: {error}") from error
    if not isinstance(content, dict) or "location" not in content:
        raise BadBody("Format error in JSON body: missing field `location`")
    return content


def _deleted(snapshots: Snapshots, name: str, snapshot: str) -> bool:
    snapshots.delete(name, snapshot)
    return True


def _quietly(action: Callable[[], Any]) -> None:
    """The real server logs what fails after it accepted; nobody reads the log here."""
    with suppress(ApiError):
        action()


def _description(message: Any) -> dict[str, Any]:
    found = MessageToDict(message, preserving_proto_field_name=True)
    moment = message.creation_time.ToJsonString().removesuffix("Z")
    return found | {"size": message.size, "creation_time": moment}
