"""Kill -9 while snapshots are made and restored: the memory is whole, old or new, and so is every listed snapshot."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from router_service.snapshots import local
from tests.congruence.fast_dir import fast_dir
from tests.unit.router_service.numbered_memory import (
    MODEL,
    SETTINGS,
    answers,
    counts,
    fill,
    open_store,
)

__all__ = ["fast_dir"]

KILLS = 5  # of each of two services
# What the two snapshots hold: entries per layer, and the setting `neighbours`.
STATES = {"monday": (60, 5), "tuesday": (90, 3)}


def make_two_snapshots(directory: Path) -> None:
    with open_store(directory / "data") as store:
        memory = store.create("bible", MODEL, SETTINGS)
        start = 0
        for weekday, (entries, neighbours) in STATES.items():
            fill(memory, start, entries)
            store.change_settings("bible", {"neighbours": neighbours})
            local.create(store, "bible", directory / "snapshots", weekday, min_free_bytes=0)
            start = entries


def run_and_kill(directory: Path, lines: int, delay_s: float) -> list[str]:
    """What the service said before SIGKILL reached it, `delay_s` after so many lines."""
    service = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.snapshot_service", str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert service.stdout is not None
    with service.stdout as said:
        heard = [said.readline() for _ in range(lines)]
        time.sleep(delay_s)
        service.kill()
        heard += said.readlines()
    assert service.wait() == -signal.SIGKILL
    return [line.strip() for line in heard]


def check(directory: Path, said: list[str], before: str) -> str:
    """Returns which snapshot the memory now is, the last one that was acknowledged or the one in flight."""
    possible = {before}
    for line in said:
        word, _, what = line.partition(" ")
        if word == "restoring":
            possible.add(what)
        elif word == "restored":
            possible = {what}
    with open_store(directory / "data") as store:
        assert (store.names(), store.broken) == (["bible"], {})
        memory = store.get("bible")
        answers(memory, 3)
        state = counts(memory)[0], memory.record.settings.neighbours
        assert counts(memory) == [state[0]] * MODEL.num_layers
        (weekday,) = [name for name, known in STATES.items() if known == state]
        assert weekday in possible
    assert sorted(p.name for p in (directory / "data").iterdir()) == ["LOCK", "bible"]
    homes = [p for p in (directory / "data" / "bible").iterdir() if p.is_dir()]
    assert sum(len(list(home.glob("layer-*"))) for home in homes) <= MODEL.num_layers
    check_list(directory / "snapshots", said)
    return weekday


def check_list(snapshot_store: Path, said: list[str]) -> None:
    listed = local.list_snapshots(snapshot_store, "bible")
    for info in listed:
        assert local.verify(info.path) == info
    names = {info.name for info in listed}
    acknowledged = {line.split()[1] for line in said if line.startswith("snapshot ")}
    assert acknowledged | set(STATES) <= names
    on_disk = {p.name for p in (snapshot_store / "bible").iterdir()}
    assert on_disk == names | {"LOCK"}


def kill_often(directory: Path, seed: int) -> int:
    """Returns how many restores and snapshots were acknowledged in all."""
    directory.mkdir()
    make_two_snapshots(directory)
    moments, weekday, acknowledged = random.Random(seed), "tuesday", 0
    for _ in range(KILLS):
        said = run_and_kill(directory, moments.choice([1, 1, 2]), moments.uniform(0, 0.4))
        weekday = check(directory, said, weekday)
        acknowledged += sum(not line.startswith("restoring") for line in said)
    return acknowledged


def test_a_kill_leaves_the_memory_and_the_snapshots_whole(fast_dir: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(kill_often, fast_dir / str(seed), seed) for seed in (1, 2)]
        assert sum(job.result(200) for job in jobs) > 0  # some work was done between the kills
