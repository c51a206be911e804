"""A collection that was killed amid its writes, one bit of one of its files flipped, and what it answers afterwards.

Run as `python -m tests.faults.bit_flips DIRECTORY COMPRESSION answers|writes FLIPS`: prints a JSON list of
[file, byte, bit, outcome] with an outcome of "right", "error: ...", or what was wrong. Each flip is tried in a process
of its own, forked before the engine is used: some damage ends the process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from router_service.arrays import F32, U64, Entries, ExampleRef, Neighbours, Provenance
from router_service.backends.base import CollectionSpec, Compression, Metric, SearchOptions
from router_service.backends.disk import copy_tree
from router_service.backends.edge.backend import EdgeBackend, EdgeCollection
from router_service.errors import RoutingServiceError

NAME = "bible/layer-000"
DIMENSION, WIDTH, INDEXED, K = 16, 4, 600, 5
SPEC = CollectionSpec(DIMENSION, Metric.EUCLID, WIDTH)
# All that the graph can find, and most of what search keys leave.
OPTIONS = SearchOptions(hnsw_ef=600, oversampling=20.0)
MOST_S = 120
# What search keys of half the dimension leave out.
_SPREAD = np.geomspace(1.0, 0.01, DIMENSION)


def entries_of(ids: list[int], seed: int) -> Entries:
    """Of 40 examples of 7 sources, a fifth of them of none."""
    rng, count = np.random.default_rng(seed), len(ids)
    keys = (rng.standard_normal((count, DIMENSION)) * _SPREAD).astype(np.float32)
    values = rng.standard_normal((count, WIDTH)).astype(np.float32)
    origins = [
        Provenance(f"s{n % 7}", str(n % 40), n, 3, 0.5 * n) if n % 5 else Provenance() for n in ids
    ]
    return Entries(np.array(ids, np.uint64), keys, values, origins)


def write_and_be_killed(data: Path, compression: Compression) -> None:
    """An index, entries that came after it, replaced and deleted ones, flushed and not."""
    collection = EdgeBackend(data, min_free_bytes=0).create(NAME, SPEC)
    for step in _steps(compression):
        match step:
            case Entries():
                collection.upsert(step)
            case Compression():
                collection.optimize(step)
            case None:
                collection.flush()
            case deleted:
                collection.delete(deleted)
    os.kill(os.getpid(), signal.SIGKILL)


def _steps(compression: Compression) -> Iterator[Entries | Compression | U64 | None]:
    yield entries_of(list(range(INDEXED)), 1)
    yield compression
    yield entries_of(list(range(INDEXED, INDEXED + 60)), 2)
    yield np.array([5, 6, 7, INDEXED + 2], np.uint64)
    yield None
    yield entries_of([10, 11, 12, 900, 901, 902], 3)
    yield np.array([20, 21, INDEXED + 5], np.uint64)
    yield entries_of([30, 903], 4)


@dataclass(frozen=True)
class Oracle:
    """What the entries are, and the answers of a full scan."""

    entries: Entries
    queries: F32
    excluded: list[ExampleRef]
    plain: Neighbours
    without: Neighbours

    @staticmethod
    def of(compression: Compression) -> Oracle:
        """After all steps."""
        now: dict[int, Entries] = {}
        for step in _steps(compression):
            if isinstance(step, Entries):
                now |= {int(step.ids[n]): step.slice(n, n + 1) for n in range(len(step))}
            elif isinstance(step, np.ndarray):
                for number in step.tolist():
                    del now[number]
        entries = Entries.concat([now[number] for number in sorted(now)])
        picked = np.r_[0 : len(entries) : 3, len(entries) - 60 : len(entries)]
        noise = np.random.default_rng(5).standard_normal((len(picked), DIMENSION)) * 0.01 * _SPREAD
        queries = (entries.keys[picked] + noise).astype(np.float32)
        origins = [ExampleRef(p.source, p.example) for p in entries.provenance]
        excluded = [origins[n] for n in picked]
        allowed = np.array([[one != other for one in origins] for other in excluded])
        everything = np.ones_like(allowed)
        return Oracle(
            entries,
            queries,
            excluded,
            _nearest(entries, queries, everything),
            _nearest(entries, queries, allowed),
        )

    def problems(self, collection: EdgeCollection) -> Iterator[str]:
        """What is wrong with everything that the collection answers."""
        found = collection.scroll(None, 10_000)
        for column in ("ids", "keys", "values"):
            if not np.array_equal(getattr(found, column), getattr(self.entries, column)):
                yield column
        if found.provenance != self.entries.provenance:
            yield "provenance"
        for exact in (False, True):
            options = replace(OPTIONS, exact=exact)
            for expected, excluded in ((self.plain, []), (self.without, self.excluded)):
                answer = collection.search(self.queries, K, options, excluded)
                right = np.array_equal(answer.ids, expected.ids)
                near = np.allclose(answer.distances, expected.distances, rtol=1e-4, atol=1e-4)
                if not (right and near and np.array_equal(answer.values, expected.values)):
                    yield f"search, exact: {exact}, exclusions: {bool(excluded)}"

    def lost(self, collection: EdgeCollection) -> Iterator[str]:
        """What of new writes is not there."""
        again = entries_of(self.entries.ids.tolist(), 9)
        collection.upsert(again)
        found = collection.scroll(None, 10_000)
        if not np.array_equal(found.ids, again.ids) or not np.array_equal(found.keys, again.keys):
            yield "writes"
        collection.delete(again.ids)
        if len(collection.scroll(None, 10_000)):
            yield "deletions"


def _nearest(entries: Entries, queries: F32, allowed: np.ndarray) -> Neighbours:
    wide = queries[:, None].astype(np.float64) - entries.keys[None]
    squared = np.where(allowed, (wide**2).sum(axis=2), np.inf)
    order = np.argsort(squared, axis=1)[:, :K]
    nearest = np.take_along_axis(squared, order, 1).astype(np.float32)
    return Neighbours(entries.ids[order], nearest, entries.values[order])


def outcome(data: Path, oracle: Oracle, what: str) -> str:
    """Opened and asked, or written to, in a process of its own."""
    reader, writer = os.pipe()
    if not os.fork():
        os.close(reader)
        signal.alarm(MOST_S)  # a process that hangs is a wrong answer, however slow the machine
        try:
            os.write(writer, _outcome(data, oracle, what).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        text = answers.read()
    _, status = os.wait()
    return text or f"the process ended with status {status}"


def _outcome(data: Path, oracle: Oracle, what: str) -> str:
    try:
        collection = EdgeBackend(data, min_free_bytes=0).open(NAME, SPEC)
        wrong = oracle.problems(collection) if what == "answers" else oracle.lost(collection)
        return "; ".join(wrong) or "right"
    except RoutingServiceError as error:
        return f"error: {str(error)[:300]}"
    except BaseException as error:  # noqa: BLE001  # what gets out of the backend is what is looked for
        return f"raised {type(error).__name__}: {error}"


def flips_of(path: Path, wanted: int, rng: random.Random) -> list[int]:
    """Bytes of a file: its first and last that are not 0, some of these, and some between."""
    content = np.fromfile(path, np.uint8)
    if not len(content):
        return []
    filled = np.flatnonzero(content).tolist() or [0]
    picked = {filled[0], filled[-1]}
    picked |= {rng.choice(filled) for _ in range(wanted - 2)}
    return sorted(picked | {rng.randrange(filled[-1] + 1)})


def cases_of(
    files: list[Path], wanted: int, rng: random.Random
) -> Iterator[tuple[Path | None, int]]:
    """Files and bytes; of files that there are many of (one per field, say) one byte of each after the first."""
    seen: Counter[str] = Counter()
    for path in files:
        flips = flips_of(path, wanted, rng)
        seen[path.name] += bool(flips)
        if seen[path.name] > 1:
            flips = rng.sample(flips, min(1, len(flips)))
        yield from ((path, byte) for byte in flips)


def main(directory: str, label: str, what: str, wanted: str) -> None:
    """Every file, one flip at a time; and first none at all."""
    root, compression = Path(directory), Compression.parse(label)
    base, copy = root / "base", root / "copy"
    if not os.fork():
        write_and_be_killed(base, compression)
    os.wait()
    oracle, rng, found = Oracle.of(compression), random.Random(1), []
    files = sorted(path for path in base.rglob("*") if path.is_file() and path.name != "LOCK")
    cases = list(cases_of(files, int(wanted), rng))
    for path, byte in [(None, 0), *cases]:
        copy_tree(base, copy)
        bit, name = rng.randrange(8), ""
        if path is not None:
            name = path.relative_to(base).as_posix()
            with (copy / name).open("r+b") as file:
                file.seek(byte)
                old = file.read(1)[0]
                file.seek(byte)
                file.write(bytes([old ^ (1 << bit)]))
        found.append([name, byte, bit, outcome(copy, oracle, what)])
        shutil.rmtree(copy)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
