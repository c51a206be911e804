"""Snapshots of collections: a packed copy of the shard and the configuration, with its checksum beside it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO
from urllib.parse import quote

import grpc
import qdrant_client.grpc as pb
from google.protobuf.json_format import MessageToDict, ParseDict

from tests.qdrant_standin.collection import SHARD, Collection
from tests.qdrant_standin.errors import ApiError, bad_input, not_found
from tests.qdrant_standin.store import PEER_ID, Store

_CONFIG = "config.json"
_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)


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
        path = directory / f"{collection.name}-{PEER_ID}-{moment}.snapshot"
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
    """Compressed, for the files of a shard are sparse; without its write-ahead log, which is flushed."""
    config = json.dumps(MessageToDict(collection.config, preserving_proto_field_name=True)).encode()
    with collection.still() as shard, tarfile.open(path, "w:gz", compresslevel=1) as archive:
        about = tarfile.TarInfo(_CONFIG)
        about.size = len(config)
        archive.addfile(about, io.BytesIO(config))
        archive.add(shard, SHARD, filter=lambda info: None if _is_log(info.name) else info)


def _is_log(name: str) -> bool:
    return name == f"{SHARD}/wal"


def _unpack(path: Path, directory: Path) -> None:
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            inside = tarfile.data_filter(member, str(directory))
            source = archive.extractfile(member)
            if source is None:
                (directory / inside.name).mkdir(parents=True, exist_ok=True)
                continue
            with (directory / inside.name).open("wb") as target:
                _copy_sparsely(source, target)


def _copy_sparsely(source: IO[bytes], target: IO[bytes]) -> None:
    while block := source.read(_BLOCK):
        if block == _ZEROS[: len(block)]:
            target.seek(len(block), io.SEEK_CUR)
        else:
            target.write(block)
    target.truncate()


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
