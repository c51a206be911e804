"""Snapshots of collections: an archive of the shard and the configuration, with its checksum beside it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.collection import SHARD, Collection
from tests.qdrant_standin.errors import ApiError, bad_input, not_found
from tests.qdrant_standin.store import Store

_CONFIG = "config.json"
_LENGTH = "standin.length"


class Snapshots:
    """The snapshots of all collections of a store, in a directory for each collection."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.root = store.directory / "snapshots"

    def create(self, name: str) -> pb.SnapshotDescription:
        """Packs a collection. A second one within the same second replaces the first, as on the real server."""
        collection = self._store.get(name)
        moment = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime())
        directory = self.directory(collection.name)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{collection.name}-{self._store.peer_id}-{moment}.snapshot"
        partial = path.with_suffix(".tmp")
        _pack(collection, partial)
        _checksum(path).write_text(sha256(partial))
        partial.replace(path)
        return _description(path)

    def list(self, name: str) -> list[pb.SnapshotDescription]:
        """All snapshots of a collection."""
        directory = self.directory(self._store.get(name).name)
        return [_description(path) for path in sorted(directory.glob("*.snapshot"))]

    def delete(self, name: str, snapshot: str) -> None:
        """Deletes a snapshot. Raises ApiError (NOT_FOUND)."""
        path = self.path(name, snapshot)
        path.unlink()
        _checksum(path).unlink(missing_ok=True)

    def path(self, name: str, snapshot: str) -> Path:
        """The file of a snapshot. Raises ApiError (NOT_FOUND)."""
        directory = self.directory(self._store.get(name).name)
        if not directory.is_dir():
            raise not_found(f"Snapshot directory: {directory} not found")
        path = directory / snapshot
        if "/" in snapshot or not path.is_file():
            raise not_found(f"Snapshot {snapshot} not found")
        return path

    def directory(self, collection: str) -> Path:
        """Where the snapshots of a collection are."""
        return self.root / quote(collection, safe="~")

    def recover(self, name: str, path: Path) -> None:
        """Replaces the points of a collection by those of a snapshot, or creates it. Raises ApiError."""
        with self._unpacked(path) as (config, shard):
            try:
                collection = self._store.get(name)
            except ApiError:
                self._store.create(name, config)
                collection = self._store.get(name)
            _check_same(collection.config.params, config.params)
            collection.replace(shard)
        self._store.optimizers.request(collection, pending=True)

    @contextmanager
    def _unpacked(self, path: Path) -> Iterator[tuple[pb.CollectionConfig, Path]]:
        with TemporaryDirectory(dir=self._store.directory) as directory:
            try:
                _unpack(path, Path(directory))
                config = json.loads((Path(directory) / _CONFIG).read_text())
            except (tarfile.TarError, OSError, EOFError) as error:
                text = f"Service internal error: failed to unpack snapshot archive: {error}"
                raise ApiError(grpc.StatusCode.INTERNAL, text) from error
            yield ParseDict(config, pb.CollectionConfig()), Path(directory) / SHARD


def _check_same(stored: pb.CollectionParams, found: pb.CollectionParams) -> None:
    if stored.vectors_config != found.vectors_config:
        raise bad_input(
            "Snapshot is not compatible with existing collection: Collection vectors: "
            f"{stored.vectors_config} Snapshot Vectors: {found.vectors_config}"
        )
    if stored.shard_number != found.shard_number:
        raise bad_input(
            "Snapshot is not compatible with existing collection: Collection shard number: "
            f"{stored.shard_number} Snapshot shard number: {found.shard_number}"
        )


def _pack(collection: Collection, path: Path) -> None:
    """With its write-ahead log: without it the engine would count writes anew, and take later ones for old."""
    config = json.dumps(MessageToDict(collection.config, preserving_proto_field_name=True)).encode()
    with collection.still() as shard, tarfile.open(path, "w") as archive:
        about = tarfile.TarInfo(_CONFIG)
        about.size = len(config)
        archive.addfile(about, io.BytesIO(config))
        for source in sorted(shard.rglob("*")):
            _add(archive, source, f"{SHARD}/{source.relative_to(shard)}")


def _add(archive: tarfile.TarFile, source: Path, name: str) -> None:
    """Leaves out the hole at the end of a sparse file; its length goes into a header."""
    about = archive.gettarinfo(source, name)
    if source.is_dir():
        archive.addfile(about)
        return
    with source.open("rb") as file:
        about.pax_headers = {_LENGTH: str(about.size)}
        about.size = _end_of_data(file.fileno(), about.size)
        file.seek(0)
        archive.addfile(about, file)


def _end_of_data(file: int, size: int) -> int:
    end = 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return end
            raise
        end = os.lseek(file, start, os.SEEK_HOLE)
    return end


def _unpack(path: Path, directory: Path) -> None:
    with tarfile.open(path) as archive:
        # Python before 3.11.4, Debian 12's for one, has no filters.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(directory)  # noqa: S202
        for member in archive.getmembers():
            if _LENGTH in member.pax_headers:
                os.truncate(directory / member.name, int(member.pax_headers[_LENGTH]))


def _checksum(path: Path) -> Path:
    return path.with_name(f"{path.name}.checksum")


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _description(path: Path) -> pb.SnapshotDescription:
    stat, checksum = path.stat(), _checksum(path)
    found = pb.SnapshotDescription(name=path.name, size=stat.st_size)
    found.creation_time.FromSeconds(int(stat.st_mtime))
    if checksum.exists():
        found.checksum = checksum.read_text()
    return found
