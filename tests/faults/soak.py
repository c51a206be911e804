"""Full load for half an hour, and nothing that grows: memory, descriptors, threads, logs and data of a sidecar.

    python -m tests.faults.soak --minutes 30 --seed 0 --out DIR

Lookups go on without pause over gRPC and over the direct socket. Entries of ever new examples come and the oldest go,
so that their number stays what it is. A replica in a process of its own follows and looks up, others come and go.
Statistics, metrics and health are asked for; layers are indexed again and compressed, snapshots are made, verified,
restored and deleted, memories made and deleted. Every call must succeed. A curve is flat when its slope after the
warm-up, over the whole run, stays below a bound. Writes soak.png, soak.json and soak.md; status 1 when a curve grows, a
call failed, the service logged a defect, or the replica has not what the service has.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from knnmoe.client import AdminClient, ReplicationClient

from tests.faults.curves import Bound, Verdict, draw, judge, table
from tests.faults.results import counted, publish, say
from tests.faults.soak_load import (
    EXPERTS,
    FULL,
    HIDDEN,
    LARGE,
    LAYERS,
    MODEL,
    SMALL,
    Beside,
    Load,
    Size,
)
from tests.sidecar import Sidecar, make_fingerprint

SAMPLE_EVERY_S, JOB_EVERY_S, REPLICA_LOOKUP_EVERY_S, PATIENCE_S = 5.0, 10.0, 0.02, 60.0
# At least, however short the run.
SAMPLES = 8
MIB = 1 << 20
# The engine keeps two segments of its log for each layer, and fills them slowly; while a layer is indexed again, its
# files are there twice. The service maps those of the small memory and of one that comes and goes, and libraries.
_LOG_MIB, _LAYERS = 64, 2 * LAYERS
_LIBRARIES_MIB = 64
# Of memory: pages of the process's own; those of files that are mapped go when the system wants them.
BOUNDS = {
    "service memory, MiB": Bound(16, 0.05),
    "service mapped files, MiB": Bound(cap=_LAYERS * _LOG_MIB + _LIBRARIES_MIB),
    "engines memory, MiB": Bound(16, 0.05),
    "replica memory, MiB": Bound(16, 0.05),
    "processes": Bound(1),
    "descriptors": Bound(8),
    "threads": Bound(8),
    "WAL, MiB": Bound(cap=2 * _LAYERS * _LOG_MIB),
    "data, MiB": Bound(32, 0.1),
    "snapshots, MiB": Bound(1),
}
# Of the service's log: a defect that no client saw.
DEFECTS = ("Traceback", "panicked", " failed")


# What is measured.


def sample(service: int, replica: int, data: Path) -> dict[str, float]:
    """Every curve at this moment."""
    children = descendants(service)
    own = [service, *children]
    disk = disk_bytes(data)
    return {
        "service memory, MiB": own_bytes(service) / MIB,
        "service mapped files, MiB": mapped_bytes(service) / MIB,
        "engines memory, MiB": sum(map(own_bytes, children)) / MIB,
        "replica memory, MiB": own_bytes(replica) / MIB,
        "processes": len(own),
        "descriptors": sum(entries_in(Path(f"/proc/{pid}/fd")) for pid in own),
        "threads": sum(entries_in(Path(f"/proc/{pid}/task")) for pid in own),
        **{f"{name}, MiB": size / MIB for name, size in disk.items()},
    }


def descendants(pid: int) -> list[int]:
    """The processes that it started, and theirs, but for those that have just ended."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except FileNotFoundError:  # the process or the thread is gone
        return found
    return [each for child in found for each in (child, *descendants(child))]


def own_bytes(pid: int) -> int:
    """Resident pages that are no file's; 0 of a process that has ended."""
    return _resident(pid, "RssAnon", "RssShmem")


def mapped_bytes(pid: int) -> int:
    """Resident pages of files; 0 of a process that has ended."""
    return _resident(pid, "RssFile")


def resident_bytes(pid: int) -> int:
    """All resident pages; 0 of a process that has ended."""
    return own_bytes(pid) + mapped_bytes(pid)


def _resident(pid: int, *kinds: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.split(":")[0] in kinds)


def entries_in(directory: Path) -> int:
    """0 where it is gone."""
    try:
        return sum(1 for _ in directory.iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return 0


def disk_bytes(data: Path) -> dict[str, int]:
    """What files take on disk: write-ahead logs, the rest of the memories, snapshots."""
    sizes = {"WAL": 0, "data": 0, "snapshots": 0}
    for directory, _, names in os.walk(data):
        place = Path(directory)
        for name in names:
            try:
                taken = (place / name).stat().st_blocks * 512
            except FileNotFoundError:  # deleted meanwhile
                continue
            if data / "snapshots" in (place, *place.parents):
                sizes["snapshots"] += taken
            else:
                sizes["WAL" if place.name == "wal" or name == "writes.log" else "data"] += taken
    return sizes


# The replica.


def follow(target: str, out: Connection) -> None:
    """In a process of its own: follows the large memory and looks up in it; says how it went when it is asked to."""
    import torch

    from model_runner.architectures import Assignment
    from model_runner.progress import Progress
    from model_runner.replica.budget import Budget
    from model_runner.replica.copy import ReplicaCopy
    from model_runner.replica.follower import Follower
    from model_runner.replica.retriever import ReplicaRetriever
    from model_runner.router_client import OnError

    torch.set_num_threads(1)
    copy = ReplicaCopy(torch.device("cpu"), "f32", Budget(1 << 30))
    follower = Follower(ReplicationClient(target, LARGE, make_fingerprint(**MODEL)), copy)
    retriever = ReplicaRetriever(copy, EXPERTS, obstacle=follower.obstacle, on_error=OnError.RAISE)
    follower.start()
    follower.wait_until_complete(PATIENCE_S, Progress(quiet=True))
    out.send("complete")
    lookups, generator = 0, torch.Generator().manual_seed(0)
    own = Assignment(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    while not out.poll(REPLICA_LOOKUP_EVERY_S):
        inputs = torch.randn(1, HIDDEN, generator=generator)
        retriever.lookup(lookups % LAYERS, inputs, torch.zeros(1, EXPERTS), own)
        lookups += 1
    with AdminClient(target) as admin:
        follower.catch_up(lambda: admin.describe(LARGE), PATIENCE_S)
    follower.close()
    out.send({"lookups": lookups, "entries": [len(copy.layers[n]) for n in range(LAYERS)]})


# The run.


def run(
    minutes: float,
    seed: int,
    out: Path,
    say: Callable[[str], None],
    *,
    size: Size = FULL,
    sample_every_s: float = SAMPLE_EVERY_S,
    job_every_s: float = JOB_EVERY_S,
) -> dict[str, Any]:
    """The load for so long; what is in soak.json."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        flags = ["--metrics", "127.0.0.1:0", "--min-free-mib", "64"]
        with Sidecar(directory / "data", listen=f"unix:{directory}/s", flags=flags) as sidecar:
            load = Load(sidecar, _metrics_of(sidecar), size, seed, job_every_s)
            load.fill()
            replica = Beside(follow, sidecar.target)
            try:
                replica.heard()
                load.start()
                curves = watch(sidecar, replica, minutes, sample_every_s, say)
                load.stop()
                copied = replica.end()
            finally:
                load.kill()
                replica.kill()
            problems = [f"{count} calls failed: {what}" for what, count in load.work.failed.items()]
            problems += _differences(sidecar, load, copied)
            sidecar.stop_cleanly()
            problems += [line for line in sidecar.stderr.splitlines() if _is_defect(line)]
    times = curves.pop("minutes")
    verdicts = judge(times, curves, BOUNDS)
    result = {
        "minutes": minutes,
        "seed": seed,
        "entries": {SMALL: size.small * LAYERS, LARGE: size.large * LAYERS},
        "done": {
            **dict(sorted(load.work.done.items())),
            "lookups in the replica": copied["lookups"],
        },
        "load_average": os.getloadavg(),
        "problems": problems,
        "verdicts": [{**asdict(each), "flat": each.flat} for each in verdicts],
        "at_minute": times,
        "curves": curves,
    }
    _write(result, verdicts, out)
    return result


def watch(
    sidecar: Sidecar,
    replica: Beside,
    minutes: float,
    every_s: float,
    say: Callable[[str], None],
) -> dict[str, list[float]]:
    """Samples by curve, and at which minute."""
    began = time.monotonic()
    curves: dict[str, list[float]] = {"minutes": [], **{name: [] for name in BOUNDS}}
    while (now := time.monotonic() - began) <= 60 * minutes or len(curves["minutes"]) < SAMPLES:
        assert sidecar.process.poll() is None, sidecar.stderr
        assert replica.process.is_alive(), "the replica has died"
        found = sample(sidecar.process.pid, replica.process.pid, sidecar.data)
        for name, value in (("minutes", now / 60), *found.items()):
            curves[name].append(round(value, 3))
        if len(curves["minutes"]) % 12 == 1:
            say(f"{now / 60:.1f} min: " + "; ".join(f"{n} {v:.0f}" for n, v in found.items()))
        time.sleep(every_s)
    return curves


def _metrics_of(sidecar: Sidecar) -> str:
    assert sidecar.process.stdout is not None
    line = sidecar.process.stdout.readline().decode()
    assert line.startswith("metrics on "), (line, sidecar.stderr)
    return line.removeprefix("metrics on ").strip()


def _differences(sidecar: Sidecar, load: Load, copied: dict[str, Any]) -> list[str]:
    """Between what was acknowledged, what the service counts, and what the replica holds."""
    problems = []
    for name in (LARGE, SMALL):
        expected = [rows.end - rows.first for rows in load.rows if rows.memory == name]
        counted = [layer.entries for layer in sidecar.describe(name).layers]
        if counted != expected:
            problems.append(f"memory {name} has {counted} entries, expected {expected}")
        if name == LARGE and copied["entries"] != expected:
            problems.append(f"the replica has {copied['entries']} entries, expected {expected}")
    return problems


def _is_defect(line: str) -> bool:
    return any(word in line for word in DEFECTS)


def report(result: dict[str, Any], verdicts: list[Verdict]) -> str:
    """In Markdown."""
    grows = [each.curve for each in verdicts if not each.flat]
    lines = [
        f"{result['minutes']:g} minutes, seed {result['seed']}. Done: {counted(result['done'])}.",
        "",
        table(verdicts),
        f"Growing: {', '.join(grows) or 'none'}. Problems: {len(result['problems'])}.",
        *(f"- {problem}" for problem in result["problems"][:20]),
    ]
    return "\n".join(lines) + "\n"


def _write(result: dict[str, Any], verdicts: list[Verdict], out: Path) -> None:
    publish(out, "soak", result, report(result, verdicts), indent=None)
    draw(result["at_minute"], result["curves"], verdicts, out / "soak.png")


def main() -> int:
    """Prints the verdict as Markdown; status 1 unless all is flat and well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak-results"))
    arguments = parser.parse_args()
    result = run(arguments.minutes, arguments.seed, arguments.out, say)
    sys.stdout.write((arguments.out / "soak.md").read_text())
    return int(bool(result["problems"]) or not all(each["flat"] for each in result["verdicts"]))


if __name__ == "__main__":
    sys.exit(main())
