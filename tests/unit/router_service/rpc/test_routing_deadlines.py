"""A lookup whose time is up is refused before the engine hears of it; others bring their deadline to the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.v1 import routing_pb2 as pb

from router_service.arrays import F32, ExampleRef, Neighbours
from router_service.backends.base import SearchOptions
from router_service.backends.exact import ExactBackend
from router_service.errors import DeadlineTooShort
from router_service.memories.store import MemoryStore
from router_service.rpc.routing import RoutingService
from tests.unit.router_service.numbered_memory import MODEL, SETTINGS, fill

MINUTE_US = 60_000_000


@dataclass
class Context:
    """A call with or without a deadline of its own."""

    left_s: float | None = None

    def is_active(self) -> bool:
        return True

    def time_remaining(self) -> float | None:
        return self.left_s


@dataclass
class Watched:
    """A collection that notes what it is asked."""

    inner: Any
    searches: list[SearchOptions] = field(default_factory=list)

    def search(
        self, queries: F32, k: int, options: SearchOptions, exclude: Sequence[ExampleRef] = ()
    ) -> Neighbours:
        self.searches.append(options)
        found: Neighbours = self.inner.search(queries, k, options, exclude)
        return found


@pytest.fixture
def watched() -> Iterator[tuple[RoutingService, Watched]]:
    store = MemoryStore(ExactBackend(), None)
    memory = store.create("bible", MODEL, SETTINGS)
    fill(memory, 0, 50)
    inner = memory.layers[0].collection
    collection = Watched(inner)
    memory.layers[0].collection = collection  # type: ignore[assignment]
    yield RoutingService(store), collection
    memory.layers[0].collection = inner
    store.close()


def request(timeout_us: int) -> pb.RouteRequest:
    made = pb.RouteRequest(memory="bible", model_digest=MODEL.digest(), timeout_us=timeout_us)
    made.router_inputs.CopyFrom(tensors.to_tensor(np.ones((3, MODEL.hidden_size), np.float32)))
    made.router_logits.CopyFrom(tensors.to_tensor(np.ones((3, MODEL.num_experts), np.float32)))
    return made


def answer(
    service: RoutingService, streamed: bool, asked: pb.RouteRequest, context: Any
) -> pb.RouteResponse:
    if streamed:
        return next(service.RouteStream(iter([asked]), context))
    return service.Route(asked, context)


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("by", ["message", "call"])
def test_an_expired_lookup_costs_the_engine_nothing(
    watched: tuple[RoutingService, Watched], streamed: bool, by: str
) -> None:
    service, collection = watched
    # A microsecond is over before the message is decoded.
    asked, context = request(timeout_us=1), Context()
    if by == "call":
        asked, context = request(timeout_us=0), Context(left_s=-0.5)
    with pytest.raises(DeadlineTooShort, match="before the lookup began"):
        answer(service, streamed, asked, context)
    assert collection.searches == []


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize(
    ("timeout_us", "call_s", "bound_s"),
    [(MINUTE_US, None, 60), (MINUTE_US, 10.0, 10), (MINUTE_US, 3600.0, 60), (0, 10.0, 10)],
)
def test_the_engine_is_told_the_nearer_deadline(
    watched: tuple[RoutingService, Watched],
    streamed: bool,
    timeout_us: int,
    call_s: float | None,
    bound_s: float,
) -> None:
    service, collection = watched
    before = time.monotonic()
    answer(service, streamed, request(timeout_us), Context(call_s))
    [options] = collection.searches
    assert options.deadline is not None
    assert before + bound_s <= options.deadline <= time.monotonic() + bound_s


def test_without_a_deadline_there_is_none(watched: tuple[RoutingService, Watched]) -> None:
    service, collection = watched
    answer(service, True, request(timeout_us=0), Context())
    assert [options.deadline for options in collection.searches] == [None]
