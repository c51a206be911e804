"""One bit of one file is wrong after an unclean stop: what is answered then is right, or an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.congruence.fast_dir import fast_dir

__all__ = ["fast_dir"]

# Files of every kind that the engine and the service keep for a collection with an index and newer entries.
KINDS = (
    "CURRENT", "base.npz", "writes.log", "sums.json", "wal/open-1", "edge_config.json", "version.info", "segment.json",
    "vector_storage/matrix.dat", "vector_storage/deleted.dat", "vectors/chunk_0.mmap", "vectors/status.dat",
    "deleted/flags_a.dat", "id_tracker.deleted", "id_tracker.mappings", "id_tracker.versions",
    "mutable_id_tracker.mappings", "mutable_id_tracker.versions", "vector_index/graph.bin",
    "vector_index/links_compressed.bin", "payload_storage/page_0.dat", "payload_storage/tracker.dat",
    "values_to_points.bin", "point_to_values.bin", "has_values/flags_a.dat", "payload_index/config.json",
)  # fmt: skip


@pytest.mark.parametrize(
    ("compression", "what"),
    [("pca8+int8", "answers"), ("none", "writes")],
)
def test_one_bit_of_each_file(fast_dir: Path, compression: str, what: str) -> None:
    """All of what the collection holds is asked for, or written anew and read again."""
    command = [sys.executable, "-m", "tests.faults.bit_flips", fast_dir, compression, what, "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    untouched, *flipped = json.loads(done.stdout)
    assert untouched[-1] == "right"
    wrong = [case for case in flipped if case[-1] != "right" and not case[-1].startswith("error: ")]
    assert wrong == []
    names = {name for name, *_ in flipped}
    assert [kind for kind in KINDS if not any(name.endswith(kind) for name in names)] == []
    refused = {name for name, *_, found in flipped if found != "right"}
    for kind in ("matrix.dat", "links_compressed.bin", "values_to_points.bin"):
        assert any(name.endswith(kind) for name in refused), kind
