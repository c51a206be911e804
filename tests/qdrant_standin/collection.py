"""A collection: its configuration in JSON, and its points in one shard of the engine."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import qdrant_edge as qe
from google.protobuf.json_format import MessageToDict, ParseDict

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.checks import vector_params
from tests.qdrant_standin.configs import engine_config
from tests.qdrant_standin.errors import ApiError, engine_call, no_collection
from tests.qdrant_standin.field_indexes import schema_message
from tests.qdrant_standin.writes import Write

_MANIFEST = "collection.json"
SHARD = "shard"
_FLUSH_INTERVAL_S = 5.0
_Answer = TypeVar("_Answer")


class Collection:
    """Points under one name. All calls may come from many threads; one at a time reaches the engine."""

    def __init__(self, directory: Path, name: str, config: pb.CollectionConfig, created: float):
        self.directory, self.name, self.config, self.created = directory, name, config, created
        self.requests = 0  # for work that the optimizer has not done
        self._asleep = False  # there is work, and nobody asked for it since the start
        self._failure = ""  # of the optimizer
        self._settled = True  # what is stored has the indexes of the configuration
        self._operations = 0
        self._flushed = time.monotonic()
        self._lock = threading.RLock()
        self._shard: Any = None

    @staticmethod
    def create(root: Path, name: str, config: pb.CollectionConfig) -> Collection:
        """A new collection in a directory of its own under `root`."""
        collection = Collection(root / uuid4().hex, name, config, time.time())
        shard = collection.directory / SHARD
        shard.mkdir(parents=True)
        with engine_call():
            collection._shard = qe.EdgeShard.create(str(shard), engine_config(config))
        collection._save()
        return collection

    @staticmethod
    def load(directory: Path) -> Collection | None:
        """What an earlier process left there; None, and nothing is left, if it did not finish creating it."""
        manifest = directory / _MANIFEST
        if not manifest.exists():
            shutil.rmtree(directory)
            return None
        stored = json.loads(manifest.read_text())
        config = ParseDict(stored["config"], pb.CollectionConfig())
        collection = Collection(directory, stored["name"], config, stored["created"])
        collection._settled = stored["settled"]
        collection._open()
        collection._asleep = not collection._settled or collection.outgrown()
        return collection

    def _save(self) -> None:
        stored = {
            "name": self.name,
            "created": self.created,
            "settled": self._settled,
            "config": MessageToDict(self.config, preserving_proto_field_name=True),
        }
        save_json(self.directory / _MANIFEST, stored)

    def _open(self) -> None:
        directory = self.directory / SHARD
        # Without it the engine takes the configuration as a whole: else a quantization would stay.
        (directory / "edge_config.json").unlink(missing_ok=True)
        with engine_call():
            self._shard = qe.EdgeShard.load(str(directory), engine_config(self.config))

    def call(self, use: Callable[[Any], _Answer]) -> _Answer:
        """The answer of the engine. Raises ApiError, also when the collection has been deleted meanwhile."""
        with self._lock, engine_call():
            if self._shard is None:
                raise no_collection(self.name)
            return use(self._shard)

    def bound(self, request: Any) -> Collection:
        """The collection as this request asks for it: one server has one consistency and one ordering."""
        return self

    def write(self, write: Write) -> int:
        """Writes all of it, and returns the number of the operation."""
        return self.update(write.whole())

    def update(self, operation: Any) -> int:
        """Writes, and returns the number of the operation."""
        with self._lock:
            self.call(lambda shard: shard.update(operation))
            self._operations += 1
            return self._operations - 1

    def configure(self, config: pb.CollectionConfig) -> None:
        """Takes another configuration; what is stored is indexed anew by the next optimize()."""
        with self._lock:
            self.config, self._settled = config, False
            self._save()

    def optimize(self) -> None:
        """Indexes and quantizes what the configuration wants. Blocks the whole process."""
        with self._lock:
            self._asleep = False
            try:
                self._optimize()
            except ApiError as error:
                self._failure = error.text

    def _optimize(self) -> None:
        if self._shard is None:
            return
        if not self._settled:
            self._flush()
            self._release()
            self._open()
        changed = self.call(lambda shard: shard.optimize())
        if changed or time.monotonic() > self._flushed + _FLUSH_INTERVAL_S:
            self._flush()
        if not self._settled:
            self._settled = True
            self._save()

    def _flush(self) -> None:
        """Cuts the write-ahead log."""
        self.call(lambda shard: shard.flush())
        self._flushed = time.monotonic()

    def outgrown(self) -> bool:
        """Whether points without an index are more than the indexing threshold."""
        threshold_kb = self.config.optimizer_config.indexing_threshold
        kb_per_point = 4 * sum(params.size for params in self.vectors.values()) / 1024
        info = self.call(lambda shard: shard.info())
        points = info.points_count - info.indexed_vectors_count / max(1, len(self.vectors))
        return bool(threshold_kb) and points * kb_per_point > threshold_kb

    @property
    def _status(self) -> pb.CollectionStatus.ValueType:
        if self._failure:
            return pb.Red
        if self.requests:
            return pb.Yellow
        return pb.Grey if self._asleep else pb.Green

    @property
    def vectors(self) -> dict[str, pb.VectorParams]:
        """The vectors of the points by name; the unnamed one is ""."""
        return vector_params(self.config.params.vectors_config)

    def info(self) -> pb.CollectionInfo:
        """What Collections.Get answers."""
        with self._lock:
            return self._info(self.call(lambda shard: shard.info()))

    def _info(self, found: Any) -> pb.CollectionInfo:
        message = pb.CollectionInfo(
            status=self._status,
            optimizer_status=pb.OptimizerStatus(ok=not self._failure, error=self._failure),
            segments_count=found.segments_count,
            config=self.config,
            points_count=found.points_count,
            indexed_vectors_count=found.indexed_vectors_count,
            update_queue=pb.UpdateQueueInfo(length=0),
            payload_schema={
                field: schema_message(index) for field, index in found.payload_schema.items()
            },
        )
        if "created_at" in message.DESCRIPTOR.fields_by_name:  # qdrant-client 1.19 has none
            message.created_at.FromMilliseconds(int(self.created * 1000))
        return message

    @contextmanager
    def still(self) -> Iterator[Path]:
        """The directory of the shard, flushed, while nothing writes to it."""
        with self._lock:
            self._flush()
            yield self.directory / SHARD

    def replace(self, shard: Path) -> None:
        """Serves the points of another shard, whose directory becomes this collection's."""
        with self._lock:
            self.call(lambda _: None)
            self._release()
            shutil.rmtree(self.directory / SHARD)
            shard.rename(self.directory / SHARD)
            self._open()

    def close(self) -> None:
        """Releases the files; every later call finds no collection."""
        with self._lock:
            if self._shard is not None:
                self._flush()
                self._release()

    def _release(self) -> None:
        with engine_call():
            self._shard.close()
        self._shard = None

    def delete(self) -> None:
        """Removes the collection and its files."""
        with self._lock:
            (self.directory / _MANIFEST).unlink()
            self._release()
            shutil.rmtree(self.directory)


def save_json(path: Path, content: Any) -> None:
    """Replaces a file in one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)
