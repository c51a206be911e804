"""Messages between the service and an engine process: a JSON header and arrays, over a stream socket.

u64 bytes of what follows | u64 bytes of the header | header (JSON, padded to 8 bytes) | arrays, each padded to 8
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_service import errors
from router_service.arrays import F32, U64, Entries, ExampleRef, Provenance
from router_service.backends.base import CollectionSpec, Compression, Quantization, SearchOptions
from router_service.backends.edge.child_process import start_module
from router_service.backends.edge.shard import ShardCounts
from router_service.errors import StorageError

Array = NDArray[Any]
Header = dict[str, Any]

_SIZES = struct.Struct("<QQ")
_ALIGN = 8
_PROVENANCE = ("source", "example", "position", "token", "gain", "created_unix_ms")


class Connection:
    """One end of a socket; messages go out and come in whole."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, header: Header, arrays: Sequence[Array] = ()) -> None:
        """Sends a message. Raises OSError when the other end is gone."""
        packed = [np.ascontiguousarray(array) for array in arrays]
        shapes = [[array.dtype.str, array.shape] for array in packed]
        text = json.dumps(header | {"arrays": shapes}).encode()
        parts: list[Any] = [_padded(text)]
        for array in packed:
            parts += [array.reshape(-1).view(np.uint8).data, _padding(array.nbytes)]
        size = _SIZES.size - 8 + sum(map(len, parts))
        self._send_all([_SIZES.pack(size, len(text)), *parts])

    def receive(self) -> tuple[Header, list[Array]] | None:
        """The next message, its arrays writable views of one buffer; None when the other end is closed."""
        sizes = self._read(_SIZES.size)
        if sizes is None:
            return None
        size, header_bytes = _SIZES.unpack(sizes)
        body = self._read(size - 8)
        if body is None:
            return None
        header: Header = json.loads(bytes(body[:header_bytes]))
        return header, _arrays(body, header_bytes, header.pop("arrays"))

    def close(self) -> None:
        """Closing twice is allowed."""
        self._socket.close()

    def _send_all(self, parts: list[Any]) -> None:
        views = [memoryview(part) for part in parts if len(part)]
        while views:
            sent = self._socket.sendmsg(views[:512])
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def _read(self, size: int) -> bytearray | None:
        buffer = bytearray(size)
        view, got = memoryview(buffer), 0
        while got < size:
            count = self._socket.recv_into(view[got:])
            if not count:
                return None
            got += count
        return buffer


def _arrays(body: bytearray, header_bytes: int, shapes: list[Any]) -> list[Array]:
    start = header_bytes + len(_padding(header_bytes))
    arrays: list[Array] = []
    for dtype, shape in shapes:
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(body, np.dtype(dtype), count, start)
        arrays.append(array.reshape(shape))
        start += array.nbytes + len(_padding(array.nbytes))
    return arrays


def _padding(size: int) -> bytes:
    return bytes(-size % _ALIGN)


def _padded(text: bytes) -> bytes:
    return text + _padding(len(text))


def entries_message(entries: Entries) -> tuple[Header, list[Array]]:
    """Entries as header and arrays; provenance that says nothing is left out."""
    rows = [[getattr(each, name) for name in _PROVENANCE] for each in entries.provenance]
    return {"provenance": rows}, [entries.ids, entries.keys, entries.values]


def entries_of_message(header: Header, arrays: Sequence[Array]) -> Entries:
    """Inverse of entries_message."""
    ids, keys, values = arrays
    provenance = [
        Provenance(**dict(zip(_PROVENANCE, row, strict=True))) for row in header["provenance"]
    ]
    return Entries(ids, keys, values, provenance)


_HOST = "router_service.backends.edge.engine_host"
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
