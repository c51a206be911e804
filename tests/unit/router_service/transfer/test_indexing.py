"""The target's search keys become those of the source, where they are not so already."""

from __future__ import annotations

import pytest

from router_service.backends.base import Compression, Quantization
from router_service.memories.memory import RoutingMemory
from router_service.transfer.migration import LayerIndex, copy_indexes
from router_service.transfer.store import StoreEntries
from tests.unit.router_service.transfer.layer_models import memory_of, no_progress

NONE, INT8 = Compression(), Compression(Quantization.INT8)


@pytest.fixture
def source() -> RoutingMemory:
    """Layer 0 has compressed search keys."""
    memory = memory_of({1: 0}, {1: 0})
    memory.layer(0).optimize(INT8)
    return memory


def indexed(
    source: RoutingMemory, target: RoutingMemory, *, optimize: bool = True
) -> list[LayerIndex]:
    return copy_indexes(
        StoreEntries(source), StoreEntries(target), 2, no_progress, optimize=optimize
    )


def test_compressions_move_once(source: RoutingMemory) -> None:
    target = memory_of({1: 0}, {1: 0})
    unchanged = LayerIndex(1, NONE, NONE, optimized=False)
    assert indexed(source, target) == [LayerIndex(0, INT8, INT8, optimized=True), unchanged]
    assert target.layer(0).info().compression == INT8
    assert indexed(source, target) == [LayerIndex(0, INT8, INT8, optimized=False), unchanged]
    assert indexed(target, source)[0].optimized is False


def test_none_is_a_compression_too(source: RoutingMemory) -> None:
    plain = memory_of({1: 0}, {1: 0})
    assert indexed(plain, source)[0] == LayerIndex(0, NONE, NONE, optimized=True)


def test_without_optimizing(source: RoutingMemory) -> None:
    target = memory_of({1: 0}, {1: 0})
    assert indexed(source, target, optimize=False)[0] == LayerIndex(0, INT8, NONE, optimized=False)
    assert target.layer(0).info().compression == NONE
