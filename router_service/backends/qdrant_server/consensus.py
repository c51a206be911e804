"""What all nodes of a cluster have to agree on: collections, aliases, indexes of fields.

Qdrant answers when a change is agreed on and every node has it, or the time is up: with a node away it takes all of
it. So the time is short, and whether the change is made is looked at by the side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

from router_service.backends.qdrant_server.connection import (
    ADMIN_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    Connection,
)
from router_service.backends.qdrant_server.failures import Meaning, failure_of
from router_service.errors import BackendUnavailable

# Whole seconds that Qdrant is to wait, in one try after the other.
_AGREE_S = (1, 2, 5, 10)
_AGAIN_S, _UNREACHED = 0.2, 2


def agree(
    connection: Connection, service: str, method: str, request: Any, done: Callable[[], bool]
) -> None:
    """Asks for a change, again as long as that passes. `done`: whether it is made, when no answer said so.

    Raises what call() raises.
    """
    until, unreached = time.monotonic() + ADMIN_TIMEOUT_S, 0
    for wait_s in chain(_AGREE_S, repeat(_AGREE_S[-1])):
        request.timeout, answered_s = wait_s, wait_s + WRITE_TIMEOUT_S
        try:
            connection.call(service, method, request, answered_s, repeat=False)
        except BackendUnavailable as error:
            if done():
                return
            unreached += not _passes(error)
            if unreached > _UNREACHED or time.monotonic() > until:
                raise
            time.sleep(_AGAIN_S)
        else:
            return


def _passes(error: BackendUnavailable) -> bool:
    """Whether a node answered, and waits for the others."""
    cause = error.__cause__
    return cause is not None and failure_of(cause).meaning in (Meaning.PASSING, Meaning.LATE)
