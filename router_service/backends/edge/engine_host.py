"""A process that holds one shard open and answers the service, see HostedShard.

Run as `python -m router_service.backends.edge.engine_host FD DIRECTORY`; FD is one end of a pipe. Ends when the other
end is closed, so it does not outlive the service.
"""

from __future__ import annotations

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


if __name__ == "__main__":
    main(*sys.argv[1:])
