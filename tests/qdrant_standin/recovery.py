"""Collections from snapshots that are uploaded, lie in the server's directory, or are fetched from elsewhere."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import grpc

from tests.qdrant_standin import checks
from tests.qdrant_standin.errors import ApiError, bad_input, invalid
from tests.qdrant_standin.snapshots import Snapshots, sha256

_FETCH_TIMEOUT_S = 60.0


def recover_upload(
    snapshots: Snapshots, name: str, file_name: str, content: bytes, checksum: str | None
) -> bool:
    """Keeps an upload beside the collection's snapshots and recovers from it. Raises ApiError."""
    checks.collection_name(name, new=True)
    directory = snapshots.directory(name)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / (file_name or str(uuid4()))
    path.write_bytes(content)
    found = sha256(path)
    if checksum is not None and found != checksum:
        path.unlink()
        text = f"Checksum mismatch: expected {found}, actual {checksum}"
        raise ApiError(grpc.StatusCode.DATA_LOSS, text)
    snapshots.recover(name, path)
    return True


def recover_from_url(snapshots: Snapshots, name: str, wanted: dict[str, Any]) -> bool:
    """Recovers from the `location` of a request, file:// or http(s)://. Raises ApiError."""
    location = urlsplit(wanted["location"])
    with TemporaryDirectory(dir=snapshots.root.parent) as directory:
        match location.scheme:
            case "file":
                path = _inside(snapshots.root, Path(unquote(location.path)))
            case "http" | "https":
                path = Path(directory) / "fetched"
                _fetch(wanted["location"], wanted.get("api_key"), path)
            case scheme:
                text = f"URL {wanted['location']} with scheme {scheme} is not supported"
                raise invalid(f"Bad request: {text}")
        _check(path, wanted.get("checksum"))
        snapshots.recover(name, path)
    return True


def _inside(root: Path, path: Path) -> Path:
    if not path.exists():
        raise invalid(f'Bad request: Snapshot file "{path}" does not exist')
    if not path.resolve().is_relative_to(root.resolve()):
        text = f'Forbidden: Snapshot file path must be inside the snapshots directory "{root}"'
        raise ApiError(grpc.StatusCode.PERMISSION_DENIED, text)
    return path


def _fetch(url: str, api_key: str | None, path: Path) -> None:
    headers = {} if api_key is None else {"api-key": api_key}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310
    try:
        with (
            urllib.request.urlopen(request, timeout=_FETCH_TIMEOUT_S) as answer,  # noqa: S310
            path.open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)
    except urllib.error.URLError as error:
        text = f"Service internal error: Failed to download snapshot from {url}: {error}"
        raise ApiError(grpc.StatusCode.INTERNAL, text) from error


def _check(path: Path, checksum: str | None) -> None:
    if checksum is not None and (found := sha256(path)) != checksum:
        raise bad_input(f"Snapshot checksum mismatch: expected {checksum}, got {found}")
