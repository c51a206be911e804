"""Processes of this backend: how they are started, and shards that live in one of their own.

An engine call holds the GIL; in a process of its own it is nobody else's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakSet

from router_service.backends.base import CollectionSpec, Compression
from router_service.backends.edge.engine import EngineShard
from router_service.backends.edge.files import CollectionFiles, Pointer
from router_service.errors import DirectoryInUse, StorageError

_PR_SET_PDEATHSIG = 1
_PARENT = "KNNMOE_PARENT_PROCESS"
_HOST = "router_service.backends.edge.engine_host"
_EXIT_S = 10.0
# How long the engine process of a service that was killed may take to let go of its files.
_ORPHAN_S = 5.0
_ORPHAN_POLL_S = 0.05
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def start_module(
    module: str,
    arguments: Sequence[str],
    *,
    stderr: int | None,
    pass_fds: Sequence[int] = (),
    niceness: int = 0,
) -> subprocess.Popen[bytes]:
    """`python -m module arguments` with this interpreter and its import path, stdin and stdout closed.

    Never a fork: a forked engine hangs at its first query.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,  # Ctrl-C is for the service, which ends its processes in order
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), _PARENT: str(os.getpid())},
    )
    if niceness:
        with suppress(ProcessLookupError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, process.pid, niceness)
    return process


def die_with_parent_thread() -> None:
    """The kernel kills this process, which start_module() made, when the thread that did so ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != os.environ.get(_PARENT):
        sys.exit("the service has ended")  # before it could be asked for


def _forwarded(
    method: Callable[Concatenate[EngineShard, _Arguments], _Result],
) -> Callable[Concatenate[HostedShard, _Arguments], _Result]:
    """A method of HostedShard: what that of the EngineShard in the process returns, or raises."""
    name = method.__name__

    def call(
        shard: HostedShard, /, *arguments: _Arguments.args, **keywords: _Arguments.kwargs
    ) -> _Result:
        found: _Result = shard.exchange((name, arguments, keywords))
        return found

    return call


class HostedShard:
    """An EngineShard in a process of its own, see engine_host. One call at a time."""

    search = _forwarded(EngineShard.search)
    upsert = _forwarded(EngineShard.upsert)
    delete = _forwarded(EngineShard.delete)
    scroll = _forwarded(EngineShard.scroll)
    retrieve = _forwarded(EngineShard.retrieve)
    counts = _forwarded(EngineShard.counts)
    flush = _forwarded(EngineShard.flush)
    _close = _forwarded(EngineShard.close)

    def __init__(self, directory: Path, spec: CollectionSpec, wanted: Compression) -> None:
        """Starts the process, which opens the shard. Raises what EngineShard.load() raises."""
        self._directory, self._closed = directory, False
        self._connection, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            arguments = [str(descriptor), str(directory)]
            self._process = start_module(_HOST, arguments, stderr=None, pass_fds=[descriptor])
        try:
            self.exchange((spec, wanted))
        except BaseException:
            self._end()
            raise

    @property
    def alive(self) -> bool:
        """Whether calls can still succeed; the process may have died."""
        return not self._closed and self._process.poll() is None

    def close(self) -> None:
        """Releases the files and ends the process. Closing twice is allowed."""
        if self._closed:
            return
        try:
            if self.alive:
                self._close()
        finally:
            self._end()

    def exchange(self, message: object) -> Any:
        """One question and its answer, pickled: both ends are the same program and nobody else has the pipe."""
        try:
            self._connection.send(message)
            found, error = self._connection.recv()
        except (OSError, EOFError) as gone:
            raise self._died() from gone
        if error is not None:
            raise error
        return found

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
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


Shard = EngineShard | HostedShard


class ShardOpener:
    """Opens the shards of a backend, large ones in processes of their own. Safe to call from several threads."""

    def __init__(self, isolate_above_bytes: int, workers: int) -> None:
        """`isolate_above_bytes`: of keys, above which a shard has a process, for at most `workers` of them."""
        self._isolate_above_bytes, self._workers = isolate_above_bytes, workers
        self._running: WeakSet[HostedShard] = WeakSet()
        self._starting = 0
        self._lock = threading.Lock()

    def open(
        self,
        files: CollectionFiles,
        pointer: Pointer,
        entries: int | None = None,
        replaced: Shard | None = None,
    ) -> Shard:
        """The shard of a generation with `entries` (None: not known yet), which serves instead of `replaced`.

        Raises what EngineShard.load() raises. Waits for the engine process of a killed service to end: the data
        directory is ours, so no other service can have the shard.
        """
        if entries is None:
            entries = files.entries_about(pointer)
        deadline = time.monotonic() + _ORPHAN_S
        with self._loader(entries * pointer.spec.dimension * 4, replaced) as load:
            while True:
                try:
                    return load(files.shard(pointer.generation), pointer.spec, pointer.compression)
                except DirectoryInUse:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_ORPHAN_POLL_S)

    @contextmanager
    def _loader(
        self, key_bytes: int, replaced: Shard | None
    ) -> Iterator[Callable[[Path, CollectionSpec, Compression], Shard]]:
        """How to open a shard: in a process of its own if it is large and there may be one more."""
        with self._lock:
            others = sum(host.alive for host in self._running if host is not replaced)
            free = others + self._starting < self._workers
            hosted = free and key_bytes > self._isolate_above_bytes
            self._starting += hosted
        try:
            yield self._hosted if hosted else EngineShard.load
        finally:
            with self._lock:
                self._starting -= hosted

    def _hosted(self, directory: Path, spec: CollectionSpec, wanted: Compression) -> HostedShard:
        host = HostedShard(directory, spec, wanted)
        with self._lock:
            self._running.add(host)
        return host
