"""A process that holds one shard open and answers the service, see HostedShard.

Run as `python -m router_service.backends.edge.engine_host FD DIRECTORY`; FD is one end of a pipe. Ends when the other
end is closed, so it does not outlive the service.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from router_service.backends.edge.engine import EngineShard
from router_service.backends.edge.frames import found_frame, read_call
from router_service.errors import StorageError


def main(descriptor: str, directory: str) -> None:
    """Opens the shard, says so, and answers until the service closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(
        EOFError, ConnectionError
    ):  # the service has ended, perhaps in the middle of a call
        _serve(Connection(int(descriptor)), Path(directory))


def _serve(connection: Connection, directory: Path) -> None:
    _, (spec, compression), _ = read_call(connection.recv_bytes())
    try:
        shard = EngineShard.load(directory, spec, compression)
    except StorageError as error:
        connection.send((None, error))
        return
    _unmap(directory)
    try:
        connection.send((None, None))
        while True:
            connection.send_bytes(_answer(shard, connection.recv_bytes()))
    finally:
        shard.close()


def _answer(shard: EngineShard, frame: bytes) -> bytes:
    call, arguments, keywords = read_call(frame)
    try:
        found = getattr(shard, call)(*arguments, **keywords)
    except StorageError as error:
        return pickle.dumps((None, error))
    return found_frame(*found) if call == "search" else pickle.dumps((found, None))


def _unmap(directory: Path) -> None:
    """Lets go of the engine's files that opening has read: they stay in the page cache, and are mapped when used.

    The engine maps all keys, of which lookups read few, and its whole log, which nothing reads again: 205 MB of a layer
    of 20,000 x 2,048 whose search keys are int8.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):  # not Linux
        return
    libc, under = ctypes.CDLL(None), f"{directory.resolve()}/"
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, *_, path = line.split(maxsplit=5)
        if permissions.endswith("s") and path.startswith(under):  # shared: nothing written is lost
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


if __name__ == "__main__":
    main(*sys.argv[1:])
