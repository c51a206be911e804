"""A search on its way to an engine process and back: a header of fixed size and the arrays' bytes.

Everything else that an engine process is asked travels pickled, and so does a failure. For one token pickling cost as
much as half of the engine's own work (benchmarks/README.md).
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from router_service.arrays import F32, U64, ExampleRef
from router_service.backends.base import SearchOptions

# First byte of a frame that is not pickled; a pickle begins with 0x80.
_SEARCH, _FOUND = b"s", b"f"
# Whether exact; queries, their dimension, neighbours, candidate list; oversampling. What follows is aligned.
_ASKED = struct.Struct("<c?2xIIIId")
# Queries, neighbours.
_ANSWERED = struct.Struct("<c3xII4x")


def search_frame(
    queries: F32, limit: int, options: SearchOptions, excluded: Sequence[ExampleRef | None]
) -> bytes:
    """The arguments of EngineShard.search(); of the options what the engine reads."""
    tokens, dimension = queries.shape
    header = _ASKED.pack(
        _SEARCH, options.exact, tokens, dimension, limit, options.hnsw_ef, options.oversampling
    )
    refused = pickle.dumps(list(excluded)) if any(excluded) else b""
    return b"".join((header, queries.astype("<f4", order="C", copy=False).data, refused))


def read_call(frame: bytes) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """The method of a shard that a frame asks for, and its arguments."""
    if frame[:1] != _SEARCH:
        name, arguments, keywords = pickle.loads(frame)  # noqa: S301  # both ends are the same program
        return name, arguments, keywords
    _, exact, tokens, dimension, limit, hnsw_ef, oversampling = _ASKED.unpack_from(frame)
    end = _ASKED.size + 4 * tokens * dimension
    queries = np.frombuffer(frame, "<f4", tokens * dimension, _ASKED.size)
    excluded = pickle.loads(frame[end:]) if len(frame) > end else [None] * tokens  # noqa: S301
    options = SearchOptions(hnsw_ef, oversampling, exact)
    return "search", (queries.reshape(tokens, dimension), limit, options, excluded), {}


def found_frame(ids: U64, scores: F32) -> bytes:
    """What EngineShard.search() returned."""
    return b"".join((_ANSWERED.pack(_FOUND, *ids.shape), ids.data, scores.data))


def read_answer(frame: bytes) -> tuple[Any, BaseException | None]:
    """What a method of the shard returned, and what it raised."""
    if frame[:1] != _FOUND:
        found, error = pickle.loads(frame)  # noqa: S301  # both ends are the same program
        return found, error
    _, tokens, limit = _ANSWERED.unpack_from(frame)
    ids = np.frombuffer(frame, np.uint64, tokens * limit, _ANSWERED.size)
    scores = np.frombuffer(frame, np.float32, tokens * limit, _ANSWERED.size + ids.nbytes)
    return (ids.reshape(tokens, limit), scores.reshape(tokens, limit)), None
