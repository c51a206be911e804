"""Memories in RAM or on a server that take the place of others: the intent first, then the names, then the record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from router_service.backends.base import Backend
from router_service.backends.renaming import Renaming
from router_service.catalogue import Announcing, Catalogue, Catalogued, Takeover
from router_service.errors import BackendUnavailable, StorageError
from router_service.memory_layers import collection_names
from router_service.routing_memory import MemoryRecord

log = logging.getLogger(__name__)


class Takeovers:
    """Of one backend and its catalogue. Whoever reads the catalogue after a crash finishes what it announces."""

    def __init__(self, backend: Backend, catalogue: Catalogue) -> None:
        self._backend, self._catalogue = backend, catalogue

    def begin(self, takeover: Takeover, other: MemoryRecord) -> None:
        """The collections of the memory `other` have the names of those of `takeover.record` from here on.

        end() it later. Raises Busy and StorageError; nothing has changed then, unless a server went away: it may be
        finished later.
        """
        backend, catalogue = self._able()
        try:
            catalogue.begin_takeover(takeover)
            self._switch(backend, takeover, other)
        except BackendUnavailable as error:
            raise BackendUnavailable(
                f"{error}; whether {takeover.by!r} takes the place of {takeover.record.name!r} shows within minutes of "
                "the server's return"
            ) from error

    def end(self, takeover: Takeover) -> None:
        """Removes the collections that were replaced, and the other memory's record. Raises StorageError."""
        backend, _ = self._able()
        for name in _names(takeover):
            backend.drop_replaced(name)
        self._catalogue.remove(replace(takeover.record, name=takeover.by))

    def finished(self, let_go: Callable[[str], None], *, stale_only: bool = False) -> Catalogued:
        """What the catalogue holds, once those that a crash cut short are finished. Raises StorageError.

        `let_go` closes the memory of a name, if it is open. `stale_only`: not those that may be under way elsewhere.
        """
        found = self._catalogue.read()
        cut_short = [each for each in found.takeovers if each.stale or not stale_only]
        for takeover in cut_short:
            let_go(takeover.by)
            self._resume(takeover, found.records)
        return self._catalogue.read() if cut_short else found

    def _resume(self, takeover: Takeover, records: Sequence[MemoryRecord]) -> None:
        log.warning("memory %s takes the place of %s at last", takeover.by, takeover.record.name)
        backend, _ = self._able()
        committed = any(_same_memory(record, takeover.record) for record in records)
        with backend.taking_over(_names(takeover)):
            if not committed:
                self._catalogue.commit(takeover.record)
        self.end(takeover)

    def _switch(self, backend: Renaming, takeover: Takeover, other: MemoryRecord) -> None:
        switched = False
        try:
            with backend.taking_over(_names(takeover)):
                switched = True
                self._catalogue.commit(takeover.record)
        except BackendUnavailable:  # who knows what it did: what is announced is finished
            raise
        except BaseException:
            if not switched:
                self._catalogue.commit(other)
            raise

    def _able(self) -> tuple[Renaming, Announcing]:
        backend, catalogue = self._backend, self._catalogue
        if isinstance(backend, Renaming) and isinstance(catalogue, Announcing):
            return backend, catalogue
        raise StorageError(
            f"a memory cannot take the place of another here ({self._catalogue.place})"
        )


def _same_memory(one: MemoryRecord, other: MemoryRecord) -> bool:
    """Settings aside, which may have been changed since."""
    return (one.name, one.created_unix_ms) == (other.name, other.created_unix_ms)


def _names(takeover: Takeover) -> dict[str, str]:
    """Collections by the names that they are to have."""
    record = takeover.record
    return dict(zip(collection_names(record), collection_names(record, takeover.by), strict=True))
