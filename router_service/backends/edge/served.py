"""The generation that a collection serves, and the locks that all who use it take."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from router_service.backends.base import Versions
from router_service.backends.disk import fsync_tree
from router_service.backends.edge.generation import Generation, Resources
from router_service.backends.edge.processes import HostedShard, Shard
from router_service.errors import CollectionClosed


class FifoLock:
    """Handed on in the order of asking: a loop of short writes cannot starve a search. Not reentrant.

    threading.Lock lets the thread that just released it take it again before those that wait.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False

    def __enter__(self) -> None:
        self._take(None)

    def __exit__(self, *_: object) -> None:
        self._give()

    @contextmanager
    def held(self, wait_s: Callable[[], float] | None) -> Iterator[None]:
        """Like `with`, with a wait that what `wait_s` raises ends; it is called again after the seconds it returns."""
        self._take(wait_s)
        try:
            yield
        finally:
            self._give()

    def _take(self, wait_s: Callable[[], float] | None) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            while not turn.acquire(timeout=-1 if wait_s is None else wait_s()):
                pass
        except BaseException:
            self._leave(turn)
            raise

    def _leave(self, turn: threading.Lock) -> None:
        with self._mutex:
            if turn in self._waiting:
                self._waiting.remove(turn)
                return
        self._give()  # it was its turn already

    def _give(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()  # who waited longest holds it now
            else:
                self._held = False


class ServedGeneration:
    """The generation that a collection serves now, and the locks that all who use it take. Open until close()."""

    def __init__(self, generation: Generation, resources: Resources) -> None:
        self.now = generation  # changed under all three locks
        self.files = generation.files
        self.versions = Versions()
        self.changes = 0  # of the entries; this collection's own, where a version is the memory's
        self._resources = resources
        # The order of locks, outermost first; who needs only a later one takes only that.
        # 1. One optimize at a time; close() waits for it.
        self.optimizing = threading.Lock()
        # 2. One writer at a time. Held while files are copied and generations are swapped too: then writes wait.
        self.writing = threading.Lock()
        # 3. One engine call at a time. The only one that searches take; never held over a copy or a build.
        self._engine = FifoLock()
        self._frozen = False
        self._closing = False  # engine_call() raises CollectionClosed
        self.closed = False  # whether close() was called

    @contextmanager
    def engine_call(self, wait_s: Callable[[], float] | None = None) -> Iterator[Generation]:
        """The generation, for one call of its shard, which is opened again when its process has died.

        `wait_s`: of a caller who may leave, see SearchOptions; only for calls that change nothing.
        Raises CollectionClosed, and what `wait_s` raises.
        """
        with self._engine.held(wait_s):
            self.require_use()
            if not self.now.shard.alive:
                self.now.revive(self._resources)
                self.changed()
            if wait_s is not None and isinstance(shard := self.now.shard, HostedShard):
                with shard.waiting(wait_s):
                    yield self.now
            else:
                yield self.now

    def changed(self) -> None:
        """Inside engine_call(): the entries are, or may be, others than before."""
        self.changes += 1
        self.versions.advance()

    def written(self) -> Shard:
        """Inside engine_call(): the shard, to be written to. Raises StorageError."""
        return self.now.written(self._resources)

    def before_write(self) -> None:
        """For who holds `writing`. Raises CollectionClosed, CorruptMemory, StorageError."""
        self.require_use()
        if not self.now.shard.alive:
            # What the write that it died in became is known before the next begins
            with self.engine_call():
                pass
        if self.now.log_is_long:
            with self.engine_call() as generation:
                generation.flush()
            self.now.keep()

    def require_use(self) -> None:
        """Raises CollectionClosed, or CorruptMemory when the collection is set apart."""
        if self._closing:
            raise CollectionClosed(self.files.directory)
        if self.now.damage is not None:
            raise self.now.damage

    def flush(self) -> None:
        """Makes every write durable. Returns at once while the files are frozen, for they were flushed before."""
        if self.now.damage is not None:
            return
        if not self.now.flushed and not self._frozen:
            # Beside the engine, so that little is left for its own flush, during which no search is answered.
            with suppress(OSError):  # a file that is being replaced
                fsync_tree(self.files.shard(self.now.pointer.generation) / "segments")
        with self.engine_call() as generation:
            if not self._frozen:
                generation.flush()

    @contextmanager
    def frozen(self) -> Iterator[Generation]:
        """Inside, the files on disk are complete and nobody changes them; searches go on."""
        self.flush()  # so that little is left to do while writes wait
        with self.writing:
            try:
                with self.engine_call() as generation:
                    generation.flush()
                    self._frozen = True
                yield generation
            finally:
                self._frozen = False

    def swap(self, successor: Generation) -> Generation:
        """Serves `successor`, of the same entries, from the next engine call on; returns what served until now.

        For who holds `optimizing` and `writing`.
        """
        with self._engine:
            replaced, self.now = self.now, successor
        return replaced

    def refuse_calls(self) -> None:
        """From here on engine_call() raises CollectionClosed: what goes on ends soon, and close() waits for it."""
        self._closing = True

    def close(self) -> None:
        """After refuse_calls(): flushes and releases the files. Closing twice is allowed."""
        with self.optimizing, self.writing, self._engine:
            if not self.closed:
                self.closed = True
                self.now.close()
