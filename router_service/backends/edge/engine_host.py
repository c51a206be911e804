"""A process that holds one shard open and answers the service: engine calls hold the GIL, here it is nobody else's.

Run as `python -m router_service.backends.edge.engine_host FD DIRECTORY SPEC`, SPEC being JSON; FD is one end of a
socket pair. Ends when the other end is closed, so it does not outlive the service.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from router_service.arrays import ExampleRef
from router_service.backends.base import CollectionSpec, Compression, Metric, SearchOptions
from router_service.backends.edge.engine import EngineShard
from router_service.backends.edge.hosted_shard import (
    Array,
    Connection,
    Header,
    entries_message,
    entries_of_message,
)
from router_service.errors import StorageError

Answer = tuple[Header, list[Array]]


def main(descriptor: str, directory: str, text: str) -> None:
    """Opens the shard, says so, and answers until the service closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(socket.socket(fileno=int(descriptor)))
    try:
        shard = _open(Path(directory), json.loads(text))
    except StorageError as error:
        connection.send(_failure(error))
        return
    connection.send({})
    try:
        while (request := connection.receive()) is not None:
            connection.send(*_answer(shard, *request))
    finally:
        shard.close()


def _open(directory: Path, wanted: Header) -> EngineShard:
    spec = CollectionSpec(wanted["dimension"], Metric(wanted["metric"]), wanted["value_width"])
    return EngineShard.load(
        directory, spec, Compression.parse(wanted["compression"]), wanted["search_threads"]
    )


def _answer(shard: EngineShard, header: Header, arrays: list[Array]) -> Answer:
    try:
        return _CALLS[header["call"]](shard, header, arrays)
    except StorageError as error:
        return _failure(error), []


def _failure(error: StorageError) -> Header:
    return {"error": type(error).__name__, "message": str(error)}


def _search(shard: EngineShard, header: Header, arrays: list[Array]) -> Answer:
    examples: Sequence[ExampleRef | None] = [
        None if each is None else ExampleRef(*each) for each in header["examples"]
    ]
    excluded = [examples[number] for number in arrays[1].tolist()]
    options = SearchOptions(**header["options"])
    return {}, list(shard.search(arrays[0], header["limit"], options, excluded))


def _upsert(shard: EngineShard, header: Header, arrays: list[Array]) -> Answer:
    shard.upsert(entries_of_message(header, arrays), header["generation"])
    return {}, []


def _delete(shard: EngineShard, header: Header, arrays: list[Array]) -> Answer:
    shard.delete(arrays[0])
    return {}, []


def _scroll(shard: EngineShard, header: Header, arrays: list[Array]) -> Answer:
    provenance = header["provenance"]
    found = shard.scroll(
        header["after"], header["limit"], keys=header["keys"], provenance=provenance
    )
    return entries_message(found)


def _retrieve(shard: EngineShard, header: Header, arrays: list[Array]) -> Answer:
    return entries_message(shard.retrieve(arrays[0], keys=header["keys"]))


def _counts(shard: EngineShard, header: Header, arrays: list[Array]) -> Answer:
    return asdict(shard.counts(header["generation"])), []


def _flush(shard: EngineShard, header: Header, arrays: list[Array]) -> Answer:
    shard.flush()
    return {}, []


def _close(shard: EngineShard, header: Header, arrays: list[Array]) -> Answer:
    shard.close()
    return {}, []


_CALLS: dict[str, Callable[[EngineShard, Header, list[Array]], Answer]] = {
    "search": _search,
    "upsert": _upsert,
    "delete": _delete,
    "scroll": _scroll,
    "retrieve": _retrieve,
    "counts": _counts,
    "flush": _flush,
    "close": _close,
}


if __name__ == "__main__":
    main(*sys.argv[1:])
