"""A Shard in a process of its own (engine_host): what the engine does there stops no thread of the service."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import numpy as np

from router_service import errors
from router_service.arrays import F32, U64, Entries, ExampleRef
from router_service.backends.base import CollectionSpec, Compression, Quantization, SearchOptions
from router_service.backends.child_process import start_module
from router_service.backends.shard import ShardCounts
from router_service.backends.shard_wire import (
    Array,
    Connection,
    Header,
    entries_message,
    entries_of_message,
)
from router_service.errors import StorageError

_HOST = "router_service.backends.engine_host"
_EXIT_S = 10.0


class HostedShard:
    """See Shard. One call at a time."""

    def __init__(self, process: Popen[bytes], connection: Connection, directory: Path) -> None:
        """Made by load()."""
        self._process, self._connection = process, connection
        self._directory = directory
        self._closed = False

    @staticmethod
    def load(
        directory: Path,
        spec: CollectionSpec,
        wanted: Compression | Quantization,
        search_threads: int,
    ) -> HostedShard:
        """Starts the process, which opens the shard. Raises what EngineShard.load() raises."""
        request = asdict(spec) | {
            "compression": Compression.of(wanted).label,
            "search_threads": search_threads,
        }
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), str(directory), json.dumps(request)]
            process = start_module(_HOST, arguments, stderr=None, pass_fds=[theirs.fileno()])
        shard = HostedShard(process, Connection(ours), directory)
        try:
            shard._reply()
        except BaseException:
            shard._end()
            raise
        return shard

    @property
    def alive(self) -> bool:
        """See Shard.alive."""
        return not self._closed and self._process.poll() is None

    @property
    def process_id(self) -> int:
        """Of the process that holds the shard."""
        return self._process.pid

    def search(
        self,
        queries: F32,
        limit: int,
        options: SearchOptions,
        excluded: Sequence[ExampleRef | None],
    ) -> tuple[U64, F32]:
        """See Shard.search."""
        distinct = list(dict.fromkeys(excluded))
        number = {example: position for position, example in enumerate(distinct)}
        rows = np.fromiter((number[each] for each in excluded), np.int32, len(excluded))
        header = {
            "limit": limit,
            "options": asdict(options),
            "examples": [
                None if each is None else [each.source, each.example] for each in distinct
            ],
        }
        _, (ids, scores) = self._call("search", header, [queries, rows])
        return ids, scores

    def upsert(self, entries: Entries, generation: int) -> None:
        """See Shard.upsert."""
        header, arrays = entries_message(entries)
        self._call("upsert", header | {"generation": generation}, arrays)

    def delete(self, ids: U64) -> None:
        """See Shard.delete."""
        self._call("delete", {}, [ids])

    def scroll(
        self, after: int | None, limit: int, *, keys: bool = True, provenance: bool = True
    ) -> Entries:
        """See Shard.scroll."""
        header = {"after": after, "limit": limit, "keys": keys, "provenance": provenance}
        return entries_of_message(*self._call("scroll", header))

    def retrieve(self, ids: U64, *, keys: bool = False) -> Entries:
        """See Shard.retrieve."""
        return entries_of_message(*self._call("retrieve", {"keys": keys}, [ids]))

    def counts(self, generation: int) -> ShardCounts:
        """See Shard.counts."""
        return ShardCounts(**self._call("counts", {"generation": generation})[0])

    def flush(self) -> None:
        """See Shard.flush."""
        self._call("flush", {})

    def close(self) -> None:
        """See Shard.close; the process ends."""
        if self._closed:
            return
        try:
            if self.alive:
                self._call("close", {})
        finally:
            self._end()

    def _call(
        self, call: str, header: Header, arrays: Sequence[Array] = ()
    ) -> tuple[Header, list[Array]]:
        try:
            self._connection.send(header | {"call": call}, arrays)
            return self._reply()
        except OSError as error:
            raise self._died() from error

    def _reply(self) -> tuple[Header, list[Array]]:
        message = self._connection.receive()
        if message is None:
            raise self._died()
        header, arrays = message
        if "error" in header:
            raise _storage_error(header["error"], header["message"])
        return header, arrays

    def _died(self) -> StorageError:
        """What to say of a process that is gone: a full disk kills it with SIGBUS."""
        self._end()
        return StorageError(
            f"the engine process of {self._directory} ended with status {self._process.returncode}; it is started "
            "again at the next call (status -7: the disk was full)"
        )

    def _end(self) -> None:
        self._closed = True
        self._connection.close()
        try:
            self._process.wait(_EXIT_S)
        except TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _storage_error(name: str, message: str) -> StorageError:
    """The error that was raised in the process."""
    kind = getattr(errors, name, StorageError)
    return kind(message) if issubclass(kind, StorageError) else StorageError(message)
