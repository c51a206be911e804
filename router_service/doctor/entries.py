"""What only a running service knows: memories that it set aside, empty layers, entries without an index."""

from __future__ import annotations

from shlex import quote

from router_service.doctor.findings import Finding, Findings, error, fine, warning
from router_service.memory_store import MemoryStore
from router_service.routing_memory import RoutingMemory

# Below this many entries of a layer, comparing with every key is fast enough.
SMALL_LAYER = 5_000
# Share of a large layer's entries without an index from which on searches are slow.
UNINDEXED_SHARE = 0.25


def check_entries(store: MemoryStore) -> Findings:
    """Every memory that serves, and the reasons of those that do not."""
    for name, reason in sorted(store.broken.items()):
        yield error(
            name,
            f"set aside when the service started: {reason}",
            f"router-admin snapshot restore {quote(name)} SNAPSHOT --replace",
        )
    with store.exclusive():  # a memory that is being deleted has no counts
        for memory in store.latest():
            yield from _check_memory(memory, indexed=store.directory is not None)


def _check_memory(memory: RoutingMemory, *, indexed: bool) -> Findings:
    """`indexed`: whether the backend builds indexes at all."""
    record = memory.record
    read = [layer for layer in memory.layers if record.settings.speaks_for(layer.layer)]
    infos = {layer.layer: layer.info() for layer in read}
    empty = [number for number, info in infos.items() if not info.entries]
    slow = [
        number
        for number, info in infos.items()
        if indexed
        and info.entries >= SMALL_LAYER
        and info.entries - info.indexed_entries > UNINDEXED_SHARE * info.entries
    ]
    if empty:
        yield _empty(memory, empty, sorted(infos.keys() - set(empty)))
    if slow:
        yield _unindexed(memory, slow)
    if not empty and not slow:
        entries = sum(info.entries for info in infos.values())
        yield fine(record.name, f"{entries} entries in {len(infos)} layers")


def _empty(memory: RoutingMemory, empty: list[int], filled: list[int]) -> Finding:
    name = quote(memory.record.name)
    if not filled:
        return warning(
            name, "holds no entries: it answers nothing", f"router-admin import FILE --into {name}"
        )
    layers = ",".join(map(str, filled))
    return warning(
        name,
        f"layers {_listed(empty)} hold no entries: the model's own router stands there",
        f"router-admin memory set {name} --layers {layers}",
    )


def _unindexed(memory: RoutingMemory, slow: list[int]) -> Finding:
    return warning(
        memory.record.name,
        f"layers {_listed(slow)} have {SMALL_LAYER} entries or more, and over {UNINDEXED_SHARE:.0%} without an index",
        f"router-admin optimize {quote(memory.record.name)}",
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
