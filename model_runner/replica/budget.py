"""What a replica may take of a device's memory, and what one of a memory takes: known before anything is loaded.

Needs no torch to be imported: commands parse their options with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from model_runner.errors import BadInput

if TYPE_CHECKING:
    import torch
    from knnmoe.v1.routing_pb2 import MemoryDescription

KeyDtype = Literal["f32", "f16", "bf16", "int8"]
KEY_BYTES: dict[str, int] = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}

_UNITS = {
    "": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "k", "M", "G", "T"))},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
}
# Of what is free: the rest is for the model's activations and its cache of keys and values.
SHARE_OF_FREE = 0.5
# In RAM beside the tensors: an id, a digest, and where the row is (a Python dict: 100 bytes an entry, measured).
HOST_ROW_BYTES = 120
# A first pass keeps its codes of 4 bits a number three times: as they are, and in two of FAISS's indexes (codes.py).
CODES, LONGEST_CODE = 3, 256
# Keys that are no longer than this are kept as bytes, too, with four numbers for each (bounded.py).
LONGEST_BYTES, BESIDE_BYTES = 256, 16
# Rows beyond those that are filled, so that what is learnt meanwhile finds room.
HEADROOM = 1 / 8
LEAST_HEADROOM = 256


def parse_bytes(text: str) -> int:
    """`2GiB`, `512 MiB`, `1.5GB` or plain bytes as a number of bytes. Raises BadInput."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise BadInput(
            f"a size: got {text!r}, expected a number and a unit, e.g. 2GiB, 512MiB, 1.5GB, or plain bytes"
        )
    size = float(found[1]) * units[found[2].lower()]
    if not 1 <= size < 2**63:
        raise BadInput(f"a size: got {text!r}, expected at least 1 byte and less than 8 EiB")
    return int(size)


def show_bytes(size: float) -> str:
    """`2.61 GiB`, in the largest unit that leaves a number above 1."""
    for unit, factor in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def capacity_for(entries: int) -> int:
    """Rows that a layer of so many entries is given."""
    return entries + max(LEAST_HEADROOM, int(entries * HEADROOM))


@dataclass(frozen=True, slots=True)
class ReplicaSize:
    """What a replica takes.

    Attributes:
        memory: its name.
        entries: by layer, of those that are copied.
        hidden_size: d.
        value_width: numbers per value, W.
        keys: their dtype.
        search_row_bytes: of a first pass, per row.
        in_ram: the device has no memory of its own, so that what is kept beside the tensors counts too.

    """

    memory: str
    entries: dict[int, int]
    hidden_size: int
    value_width: int
    keys: KeyDtype
    search_row_bytes: int = 0
    in_ram: bool = True

    @property
    def row_bytes(self) -> int:
        """Of one entry on the device: key, scale, norms, value, example, hits, and what its search needs."""
        scale = 4 if self.keys == "int8" else 0
        key = self.hidden_size * KEY_BYTES[self.keys] + scale
        beside = HOST_ROW_BYTES if self.in_ram else 0
        return key + 2 * 4 + 4 * self.value_width + 8 + 4 + self.search_row_bytes + beside

    @property
    def bytes(self) -> int:
        """Of all layers, with room to grow."""
        return self.row_bytes * sum(capacity_for(count) for count in self.entries.values())

    def last_layers(self, budget: int) -> list[int]:
        """The last layers that fit `budget`; none when the last one does not."""
        chosen: list[int] = []
        for layer in sorted(self.entries, reverse=True):
            fewer = replace(self, entries={n: self.entries[n] for n in (layer, *chosen)})
            if fewer.bytes > budget:
                break
            chosen.insert(0, layer)
        return chosen

    def entries_per_layer(self, budget: int) -> int:
        """Entries a layer that fit `budget`, when no layer has more; 0 when none do."""
        low, high = 0, max(self.entries.values(), default=0)
        while low < high:
            middle = (low + high + 1) // 2
            kept = {layer: min(count, middle) for layer, count in self.entries.items()}
            if replace(self, entries=kept).bytes <= budget:
                low = middle
            else:
                high = middle - 1
        return low


def replica_size(
    described: MemoryDescription, keys: KeyDtype, device: torch.device, first_pass: str = "exact"
) -> ReplicaSize:
    """What a replica of a memory takes on a device: of the layers that it speaks for.

    Raises KindMismatch for values of a kind that is not known.
    """
    from knnmoe.client import blends_logits  # and gRPC, which who parses options does not wait for

    spoken_for = set(described.settings.layers)
    entries = {
        layer.layer: layer.entries
        for layer in described.layers
        if not spoken_for or layer.layer in spoken_for
    }
    model = described.fingerprint
    logits = blends_logits(described.settings.kind)
    width = model.num_experts if logits else 2 * model.top_k
    in_ram = _memory_info(device) is None
    codes = in_ram and first_pass != "exact"  # other devices scan every row
    search = code_bytes(model.hidden_size) if codes else 0
    return ReplicaSize(described.name, entries, model.hidden_size, width, keys, search, in_ram)


def code_bytes(hidden_size: int) -> int:
    """Of an entry's codes for a first pass on a CPU."""
    codes = CODES * min(LONGEST_CODE, hidden_size) // 2 + 8
    return codes + (hidden_size + BESIDE_BYTES if hidden_size <= LONGEST_BYTES else 0)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a replica may take, and why so many (`given`: of --replica-memory)."""

    bytes: int
    reason: str = "given"

    def require(self, size: ReplicaSize) -> None:
        """Raises ReplicaTooLarge, which says what would fit."""
        if size.bytes > self.bytes:
            raise ReplicaTooLarge(size, self)


class ReplicaTooLarge(BadInput):
    """A replica of the memory does not fit; the message has the numbers, and what would fit."""

    def __init__(self, size: ReplicaSize, budget: Budget) -> None:
        entries = sum(size.entries.values())
        super().__init__(
            f"a replica of memory {size.memory!r} takes {show_bytes(size.bytes)} ({entries} entries in "
            f"{len(size.entries)} layers, d = {size.hidden_size}, {size.keys} keys, with room to grow), and may take "
            f"{show_bytes(budget.bytes)} ({budget.reason}); what fits: {'; '.join(_what_fits(size, budget.bytes))}"
        )


class ReplicaFull(BadInput):
    """A memory has grown beyond what its replica may take."""

    def __init__(self, size: ReplicaSize, budget: Budget, layer: int, rows: int) -> None:
        super().__init__(
            f"the replica of memory {size.memory!r} is full: layer {layer} needs {rows} rows of "
            f"{show_bytes(size.row_bytes)}, and all layers together may take {show_bytes(budget.bytes)} "
            f"({budget.reason}); prune the memory, or start again with a larger --replica-memory or --replica-keys "
            "int8"
        )


def _what_fits(size: ReplicaSize, budget: int) -> list[str]:
    """Remedies, each with its numbers."""
    smaller = [
        (keys, replace(size, keys=keys).bytes)
        for keys in ("bf16", "int8")
        if KEY_BYTES[keys] < KEY_BYTES[size.keys]
    ]
    found = [f"--replica-keys {keys} ({show_bytes(n)})" for keys, n in smaller if n <= budget]
    layers = size.last_layers(budget)
    if layers:
        found.append(
            f"the last {len(layers)} of {len(size.entries)} layers (router-admin memory set {size.memory} "
            f"--layers {layers[0]}-{layers[-1]})"
        )
    most = size.entries_per_layer(budget)
    if most:
        found.append(
            f"{most} entries a layer (router-admin prune {size.memory} --max-entries {most} --by strength --dry-run)"
        )
    needed = show_bytes(size.bytes * 1.005)  # three digits may have rounded it down
    return [*found, f"--replica-memory {needed.replace(' ', '')}", "--retrieval remote"]


def budget_for(device: torch.device, given: int | None) -> Budget:
    """What is given, or half of what is free on the device now, with the model loaded."""
    if given is not None:
        return Budget(given)
    free = free_bytes(device)
    reason = f"half of the {show_bytes(free)} that are free on {device}; --replica-memory sets it"
    return Budget(int(free * SHARE_OF_FREE), reason)


def free_bytes(device: torch.device) -> int:
    """Of the device's own memory; of RAM, within this process's cgroup, where it has none."""
    own = _memory_info(device)
    return free_ram_bytes() if own is None else own(device)[0]


def _memory_info(device: torch.device) -> Callable[[torch.device], tuple[int, int]] | None:
    """What says how much of the device's own memory is free, and how much there is; None where it works in RAM."""
    import torch

    if device.type == "cpu":
        return None
    return getattr(getattr(torch, device.type, None), "mem_get_info", None)


def free_ram_bytes(root: Path = Path("/")) -> int:
    """RAM that is available, or what the cgroups of this process leave of it. `root`: where proc and sys are."""
    meminfo = (root / "proc/meminfo").read_text()
    available = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, flags=re.MULTILINE)
    free = int(available[1]) * 1024 if available is not None else 0
    return max(0, min([free, *_left_in_cgroups(root)]))


def _left_in_cgroups(root: Path) -> Sequence[int]:
    """Bytes that each limit above this process leaves; files that are only cached can be dropped, and count as free."""
    found = []
    cgroups = root / "proc/self/cgroup"
    for line in cgroups.read_text().splitlines() if cgroups.exists() else ():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            mounted, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mounted, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used = "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be that of the host, while the files of the own cgroup are at the mount.
        here = mounted / own.lstrip("/")
        for directory in (here, *here.parents):
            if not directory.is_relative_to(mounted):
                break
            found += _left(directory, limit, used)
    return found


def _left(directory: Path, limit: str, used: str) -> list[int]:
    try:
        most = (directory / limit).read_text().strip()
        if most == "max":
            return []
        taken = int((directory / used).read_text())
        cached = re.search(
            r"^inactive_file (\d+)$", (directory / "memory.stat").read_text(), flags=re.MULTILINE
        )
    except FileNotFoundError:  # the root cgroup has no limit; another one may not be mounted here
        return []
    return [int(most) - taken + (int(cached[1]) if cached is not None else 0)]
