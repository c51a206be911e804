"""What a replica takes is known before it is loaded, and what would fit is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from knnmoe.client import KindMismatch
from knnmoe.v1.routing_pb2 import LayerDescription, MemoryDescription
from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_ASSIGNMENT,
    MEMORY_KIND_LOGIT_DELTA,
    MEMORY_KIND_LOGITS,
    MemorySettings,
    ModelFingerprint,
)

from model_runner.errors import BadInput
from model_runner.replica import budget
from model_runner.replica.budget import (
    Budget,
    ReplicaTooLarge,
    budget_for,
    free_ram_bytes,
    parse_bytes,
    replica_size,
    show_bytes,
)
from model_runner.replica.layer import LayerReplica

MIB, GIB = 1024**2, 1024**3
CPU = torch.device("cpu")


def described(
    entries: int = 20_000,
    layers: int = 16,
    kind: int = MEMORY_KIND_LOGIT_DELTA,
    spoken: tuple = (),
    hidden_size: int = 2048,
) -> MemoryDescription:
    """A memory of OLMoE's shape, or of shorter keys."""
    return MemoryDescription(
        name="law",
        fingerprint=ModelFingerprint(
            num_layers=layers,
            hidden_size=hidden_size,
            num_experts=64,
            top_k=8,
            architecture="olmoe",
        ),
        settings=MemorySettings(kind=kind, layers=spoken),
        layers=[LayerDescription(layer=number, entries=entries) for number in range(layers)],
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * GIB),
        ("512 MiB", 512 * MIB),
        ("1.5gb", 1_500_000_000),
        ("64KiB", 65536),
        ("1000", 1000),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "2 GiBs", "-1GiB", "0", "1e9", "9999999TiB", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadInput, match=f"got '{text}', expected"):
        parse_bytes(text)


def test_sizes_as_they_are_shown() -> None:
    assert [show_bytes(n) for n in (12, 2048, 3 * MIB // 2, 2.61 * GIB)] == [
        "12 bytes",
        "2 KiB",
        "1.5 MiB",
        "2.61 GiB",
    ]


def test_what_a_replica_takes() -> None:
    size = replica_size(described(), "f32", CPU)
    rows = 16 * 22_500  # an eighth more than there are entries
    beside = LayerReplica.row_bytes(0, 64, torch.float32) + 120
    assert size.bytes == rows * (4 * 2048 + beside)
    assert replica_size(described(), "bf16", CPU).bytes == rows * (2 * 2048 + beside)
    assert replica_size(described(), "int8", CPU).bytes == rows * (2048 + 4 + beside)
    codes = 3 * 128 + 8
    assert replica_size(described(), "f32", CPU, "auto").bytes == rows * (4 * 2048 + beside + codes)
    short = replica_size(described(hidden_size=128), "f32", CPU, "auto")
    assert short.bytes == rows * (4 * 128 + beside + 3 * 64 + 8 + 128 + 16)


def test_only_layers_that_the_memory_speaks_for_count() -> None:
    every = replica_size(described(), "f32", CPU).bytes
    assert replica_size(described(spoken=(12, 15)), "f32", CPU).bytes == every // 8


def test_assignments_are_experts_and_weights() -> None:
    logits = replica_size(described(kind=MEMORY_KIND_LOGITS), "f32", CPU)
    assert logits == replica_size(described(), "f32", CPU)  # of deltas
    assignments = replica_size(described(kind=MEMORY_KIND_ASSIGNMENT), "f32", CPU)
    assert logits.row_bytes - assignments.row_bytes == 4 * (64 - 16)


def test_values_of_a_later_version_are_refused() -> None:
    with pytest.raises(KindMismatch, match="of kind 9, which this version of knn-moe does not"):
        replica_size(described(kind=9), "f32", CPU)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    size = replica_size(described(), "f32", CPU)
    with pytest.raises(ReplicaTooLarge) as refused:
        Budget(GIB).require(size)
    message = str(refused.value)
    assert "a replica of memory 'law' takes 2.88 GiB (320000 entries in 16 layers" in message
    assert "may take 1 GiB (given)" in message
    assert "--replica-keys int8" in message
    assert "--replica-keys bf16" not in message  # it does not fit either
    assert "the last 5 of 16 layers (router-admin memory set law --layers 11-15)" in message
    assert "router-admin prune law --max-entries 6" in message
    assert "--retrieval remote" in message


def test_every_remedy_fits() -> None:
    size, most = replica_size(described(), "f32", CPU), Budget(GIB)
    layers = tuple(size.last_layers(most.bytes))
    most.require(replica_size(described(spoken=layers), "f32", CPU))
    entries = size.entries_per_layer(most.bytes)
    most.require(replica_size(described(entries=entries), "f32", CPU))
    with pytest.raises(ReplicaTooLarge):
        most.require(replica_size(described(entries=entries + 1), "f32", CPU))
    with pytest.raises(ReplicaTooLarge) as refused:
        most.require(size)
    asked = str(refused.value).split("--replica-memory ")[1].split(";")[0]
    Budget(parse_bytes(asked)).require(size)


def test_nothing_fits_into_nothing() -> None:
    with pytest.raises(ReplicaTooLarge) as refused:
        Budget(1000).require(replica_size(described(), "int8", CPU))
    assert "layers (router-admin" not in str(refused.value)
    assert "what fits: --replica-memory " in str(refused.value)


def test_an_empty_memory_fits() -> None:
    Budget(64 * MIB).require(replica_size(described(entries=0), "f32", CPU))


def test_half_of_what_is_free_when_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_ram_bytes", lambda: 3 * GIB)
    found = budget_for(CPU, None)
    assert found.bytes == 3 * GIB // 2
    assert "half of the 3 GiB that are free on cpu" in found.reason
    assert budget_for(CPU, 5).bytes == 5


def machine(root: Path, cgroups: str, files: dict[str, str]) -> Path:
    """/proc and /sys of a machine with 8 GiB available."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        "MemTotal: 9000000 kB\nMemAvailable:    8388608 kB\nCached: 1 kB\n"
    )
    (root / "proc/self/cgroup").write_text(cgroups)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


def test_ram_without_a_limit(tmp_path: Path) -> None:
    files = {"a/memory.max": "max\n", "a/memory.current": "5\n", "a/memory.stat": ""}
    assert free_ram_bytes(machine(tmp_path, "0::/a\n", files)) == 8 * GIB


def test_ram_within_a_limit_of_a_parent(tmp_path: Path) -> None:
    files = {
        "pod/c/memory.max": "max\n",
        "pod/memory.max": f"{4 * GIB}\n",
        "pod/memory.current": f"{3 * GIB}\n",
        "pod/memory.stat": f"anon 1\ninactive_file {GIB}\n",
    }
    assert free_ram_bytes(machine(tmp_path, "0::/pod/c\n", files)) == 2 * GIB


def test_ram_within_a_limit_of_the_first_kind(tmp_path: Path) -> None:
    """As a container sees it: its own files are at the mount, its path is the host's."""
    files = {
        "memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/memory.usage_in_bytes": f"{GIB}\n",
        "memory/memory.stat": "cache 0\ntotal_inactive_file 7\n",
    }
    cgroups = "4:memory:/docker/1\n3:cpuset:/\n0::/docker/1\n"
    assert free_ram_bytes(machine(tmp_path, cgroups, files)) == GIB


def test_this_machine() -> None:
    assert 0 < free_ram_bytes() < 2**63
