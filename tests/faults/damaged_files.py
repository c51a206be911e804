"""Files of a service that was killed, each of another kind, truncated, flipped or deleted: what is answered then.

Every memory is a copy of one and has a damaged file; two have none. A memory answers as before, or refuses by name; the
others do not notice.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from knnmoe import tensors
from knnmoe.client import service_error
from knnmoe.v1 import memory_admin_pb2 as admin_pb

from router_service.backends.disk import copy_tree
from router_service.memories.manifest import record_from_json, write_manifest
from tests.faults.rounds import Round
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    random_entries,
    random_keys,
    route_request,
)

MEMORIES, INDEXED, NEWER, NEW = 8, 300, 20, 5
WHOLE, COPY = "whole", "copy"
FLAGS = ("--optimize-above-mib", "0", "--flush-interval-s", "3600", "--min-free-mib", "64")
# What a damaged memory may say: that it is damaged, or set aside.
REFUSALS = (grpc.StatusCode.DATA_LOSS,)
Damage = Callable[[Path, np.random.Generator], None]


def flip(path: Path, rng: np.random.Generator) -> None:
    """One bit of a byte that is not 0, where there is one."""
    content = bytearray(path.read_bytes())
    filled = np.flatnonzero(np.frombuffer(content, np.uint8))
    if content:
        content[int(rng.choice(filled)) if len(filled) else 0] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def truncate(path: Path, rng: np.random.Generator) -> None:
    """To any length that is less."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(int(rng.integers(size)) if size else 0)


def delete(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


def damaged(damage: Damage) -> Callable[[Round], None]:
    """A fault: two starts on as many damaged memories."""

    def fault(round_: Round) -> None:
        base = round_.directory / "base"
        state = _fill(round_, base)
        kinds = _kinds_of(base / "memories" / WHOLE)
        for number in range(2):
            # Rounds whose seeds follow each other take every kind in turn.
            first = (2 * round_.seed + number) * MEMORIES
            chosen = [kinds[(first + n) % len(kinds)] for n in range(MEMORIES)]
            files = {f"m{n}": str(round_.rng.choice(kind)) for n, kind in enumerate(chosen)}
            data = round_.directory / f"data-{number}"
            _copy(base, data, [*files, COPY])
            for name, file in files.items():
                damage(data / "memories" / name / file, round_.rng)
                round_.injects()
            with Sidecar(data, flags=FLAGS) as sidecar:
                for name, file in files.items():
                    _check(round_, sidecar, name, f"{damage.__name__} {file}", state)
                for name in (WHOLE, COPY):
                    _check(round_, sidecar, name, "nothing", state, refusals=())
            shutil.rmtree(data)

    return fault


def _fill(round_: Round, data: Path) -> Any:
    """What the memory answers: indexed entries, and newer ones; then the service is killed."""
    with Sidecar(data, flags=FLAGS) as sidecar:
        sidecar.create(WHOLE, kind=LOGIT_DELTA, gamma=[0.05], model={"num_layers": 1})
        sidecar.upsert(WHOLE, 0, random_entries(LOGIT_DELTA, INDEXED, 1))
        request = admin_pb.OptimizeRequest(memory=WHOLE, quantization="int8")
        list(sidecar.admin.Optimize(request, timeout=CALL_TIMEOUT_S))
        sidecar.upsert(WHOLE, 0, random_entries(LOGIT_DELTA, NEWER, 2, first_id=1000))
        round_.found.writes += 2
        state = _state(sidecar, WHOLE)
        sidecar.kill()
    return state


def _copy(base: Path, data: Path, names: Iterable[str]) -> None:
    """With the memory under further names."""
    copy_tree(base, data)
    for name in names:
        home = data / "memories" / name
        copy_tree(data / "memories" / WHOLE, home)
        record = record_from_json((home / "memory.json").read_text(), WHOLE, "the base")
        write_manifest(home, replace(record, name=name))


def _kinds_of(memory: Path) -> list[list[str]]:
    """Files by what they are: numbers in their names, of which the engine has one for each field, say, are left out."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(memory.rglob("*")):
        if path.is_file():
            name = path.relative_to(memory).as_posix()
            kinds.setdefault(re.sub(r"[0-9a-f]{8}-[0-9a-f-]+|\d+", "#", name), []).append(name)
    return [kinds[kind] for kind in sorted(kinds)]


def _state(sidecar: Sidecar, name: str) -> Any:
    """All entries, and the answer to a lookup."""
    pages = [page.SerializeToString() for page in exported(sidecar, name, 0)]
    rng = np.random.default_rng(3)
    inputs, logits = random_keys(rng, 8), random_keys(rng, 8, EXPERTS)
    request = route_request(name, sidecar.describe(name).model_digest, inputs, logits)
    return pages, tensors.to_array(sidecar.route(request).router_logits)


def _check(
    round_: Round,
    sidecar: Sidecar,
    name: str,
    what: str,
    state: Any,
    refusals: tuple[grpc.StatusCode, ...] = REFUSALS,
) -> None:
    for asked in (_compare, _compare_writes):
        try:
            asked(round_, sidecar, name, what, state)
        except grpc.RpcError as refused:
            error = service_error(refused)
            said = error.code in refusals and name in error.message
            round_.require(said, f"{what}: {error.code.name}: {error.message[:300]}")
            return


def _compare(round_: Round, sidecar: Sidecar, name: str, what: str, state: Any) -> None:
    pages, logits = _state(sidecar, name)
    round_.found.lookups += 8
    if pages != state[0]:
        held = [int(n) for page in exported(sidecar, name, 0) for n in tensors.to_array(page.ids)]
        missing = INDEXED + NEWER - len(held)
        (round_.found.lost if missing else round_.found.wrong).append(
            f"{what}: {name} exports other entries, {missing} less"
        )
    if not np.allclose(logits, state[1], rtol=1e-5, atol=1e-5):
        round_.found.wrong.append(f"{what}: {name} answers otherwise")


def _compare_writes(round_: Round, sidecar: Sidecar, name: str, what: str, _: Any) -> None:
    """What is acknowledged now is there."""
    sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, NEW, 4, first_id=2000))
    held = sum(len(tensors.to_array(page.ids)) for page in exported(sidecar, name, 0))
    round_.found.writes += 1
    if held != INDEXED + NEWER + NEW:
        round_.found.lost.append(f"{what}: {held} entries after {NEW} new ones were acknowledged")
