"""Processes of this backend: how they are started, and shards that live in one of their own.

An engine call holds the GIL; in a process of its own it is nobody else's.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakSet

from router_service.arrays import F32, U64, ExampleRef
from router_service.backends.base import CollectionSpec, Compression, Engines, SearchOptions
from router_service.backends.disk import storage_call
from router_service.backends.edge.engine import EngineShard
from router_service.backends.edge.files import CollectionFiles, Pointer
from router_service.backends.edge.frames import read_answer, search_frame
from router_service.children import start_module
from router_service.errors import DirectoryInUse, EngineStopped

log = logging.getLogger(__name__)

_HOST = "router_service.backends.edge.engine_host"
_EXIT_S = 10.0
# An engine process that has not answered for so long, and has not worked meanwhile, is ended: what reads answers within
# seconds; what writes waits for the disk; when the service stops.
_READ_S, _WRITE_S, _STOP_S = 10.0, 60.0, 2.0
_READS = ("search", "scroll", "retrieve", "counts", "ids", "audit", "problems", "close")
_LOOK_EVERY_S = 0.5
# How long the engine process of a service that was killed may take to let go of its files.
_ORPHAN_S = 5.0
_ORPHAN_POLL_S = 0.05
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _forwarded(
    method: Callable[Concatenate[EngineShard, _Arguments], _Result],
) -> Callable[Concatenate[HostedShard, _Arguments], _Result]:
    """A method of HostedShard: what that of the EngineShard in the process returns, or raises."""
    name = method.__name__

    def call(
        shard: HostedShard, /, *arguments: _Arguments.args, **keywords: _Arguments.kwargs
    ) -> _Result:
        found: _Result = shard.exchange(name, pickle.dumps((name, arguments, keywords)))
        return found

    return call


class HostedShard:
    """An EngineShard in a process of its own, see engine_host. One call at a time."""

    upsert = _forwarded(EngineShard.upsert)
    delete = _forwarded(EngineShard.delete)
    scroll = _forwarded(EngineShard.scroll)
    retrieve = _forwarded(EngineShard.retrieve)
    counts = _forwarded(EngineShard.counts)
    ids = _forwarded(EngineShard.ids)
    audit = _forwarded(EngineShard.audit)
    problems = _forwarded(EngineShard.problems)
    flush = _forwarded(EngineShard.flush)
    _close = _forwarded(EngineShard.close)

    def __init__(
        self,
        directory: Path,
        spec: CollectionSpec,
        wanted: Compression,
        watch: Callable[[HostedShard], object] = lambda _: None,
    ) -> None:
        """Starts the process, lets `watch` know, and opens the shard.

        Raises what EngineShard.load() raises, and StorageError where no process can be started.
        """
        self._directory, self._closed = directory, False
        self._wait_s: Callable[[], float] | None = None
        self._owed = 0  # answers that are due, those that nobody waits for any more among them
        self._call, self._still_since, self._cpu_s = "", 0.0, 0.0  # of the call under way
        with (
            storage_call(f"start the engine process of {directory}"),
            ExitStack() as unless_started,
        ):
            self._connection, theirs = Pipe()
            unless_started.enter_context(self._connection)
            with theirs:
                descriptor = theirs.fileno()
                arguments = [str(descriptor), str(directory)]
                self._process = start_module(_HOST, arguments, stderr=None, pass_fds=[descriptor])
            unless_started.pop_all()
        self._readable = select.poll()  # kept: Connection.poll() makes one for each look
        self._readable.register(self._connection, select.POLLIN)
        watch(self)
        try:
            self.exchange("open", pickle.dumps(("open", (spec, wanted), {})))
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

    @contextmanager
    def waiting(self, wait_s: Callable[[], float]) -> Iterator[None]:
        """Inside, what `wait_s` raises ends the wait for an answer; it is called again after the seconds it returns."""
        self._wait_s = wait_s
        try:
            yield
        finally:
            self._wait_s = None

    def search(
        self,
        queries: F32,
        limit: int,
        options: SearchOptions,
        excluded: Sequence[ExampleRef | None],
    ) -> tuple[U64, F32]:
        """See EngineShard; without pickling."""
        found: tuple[U64, F32] = self.exchange(
            "search", search_frame(queries, limit, options, excluded)
        )
        return found

    def exchange(self, call: str, frame: bytes) -> Any:
        """One question, see frames, and its answer; `call`: the method that it asks for."""
        try:
            while self._owed:
                self._receive()
            self._call, self._still_since = call, time.monotonic()
            self._owed += 1
            self._connection.send_bytes(frame)
            found, error = read_answer(self._receive())
        except (OSError, EOFError) as gone:
            raise self._died() from gone
        if error is not None:
            raise error
        return found

    def _receive(self) -> bytes:
        while self._wait_s is not None and not self._readable.poll(1000 * self._wait_s()):
            pass
        answer = self._connection.recv_bytes()
        self._owed -= 1
        return answer

    def end_if_stuck(self, *, stopping: bool) -> None:
        """Ends the process when its answer has been due for too long. SIGKILL works on one that was stopped, too."""
        now, cpu_s = time.monotonic(), _cpu_s(self._process.pid)
        if not self._owed or cpu_s != self._cpu_s or self._has_answered():
            self._still_since, self._cpu_s = now, cpu_s
            return
        within_s = _STOP_S if stopping else _READ_S if self._call in _READS else _WRITE_S
        if now > self._still_since + within_s:
            log.error("the engine process of %s does not answer, and is ended", self._directory)
            self._process.kill()

    def _has_answered(self) -> bool:
        """Whether an answer is there that nobody waits for any more, or will ever be none."""
        try:
            return self._connection.poll(0)
        except (OSError, EOFError):
            return True

    def _died(self) -> EngineStopped:
        """What to say of a process that is gone: a full disk kills it with SIGBUS."""
        self._end()
        return EngineStopped(
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


def _cpu_s(process: int) -> float:
    """Processor time that a process has had; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


Shard = EngineShard | HostedShard


class ShardOpener:
    """Opens the shards of a backend, large ones in processes of their own. Safe to call from several threads."""

    def __init__(self, isolate_above_bytes: int, workers: int) -> None:
        """`isolate_above_bytes`: of keys, above which a shard has a process, for at most `workers` of them."""
        self._isolate_above_bytes, self._workers = isolate_above_bytes, workers
        self._running: WeakSet[HostedShard] = WeakSet()
        self._starting = self._restarts = 0
        self._lock = threading.Lock()
        self._stopping = False
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._end_stuck, name="engines", daemon=True)

    def open(
        self,
        files: CollectionFiles,
        pointer: Pointer,
        entries: int | None = None,
        replaced: object = None,
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
        self, key_bytes: int, replaced: object
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

    def engines(self) -> Engines:
        """See Hosting."""
        with self._lock:
            return Engines(sum(host.alive for host in self._running), self._restarts)

    def note_restart(self) -> None:
        """A process that died was started again."""
        with self._lock:
            self._restarts += 1

    def hurry(self) -> None:
        """From here on engine processes have seconds to answer, whatever they are asked."""
        self._stopping = True

    def close(self) -> None:
        """When no shard is open any more."""
        self._ended.set()

    def _hosted(self, directory: Path, spec: CollectionSpec, wanted: Compression) -> HostedShard:
        return HostedShard(directory, spec, wanted, self._watched)

    def _watched(self, host: HostedShard) -> None:
        with self._lock:
            self._running.add(host)
            if not self._watch.is_alive():
                self._watch.start()

    def _end_stuck(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            with self._lock:
                hosts = [host for host in self._running if host.alive]
            for host in hosts:
                host.end_if_stuck(stopping=self._stopping)
