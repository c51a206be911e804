"""Every fault and every kind of bad input, round after round, against real services and what they acknowledged.

    python -m tests.faults.suite --minutes 15 --seed 0 --out fault-results
    python -m tests.faults.suite --only 'disk full' --seed 7 --rounds 1      # one round again

Each round of a fault has a seed, from which all follows that is random in it, except for moments. A round starts
services of its own, has writers and readers beside the fault, and compares what was acknowledged when it is over.
Writes faults.json and faults.md; status 1 when an acknowledged entry was lost, an answer was wrong, or a call ended in
INTERNAL or UNKNOWN or hung.
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.congruence.fast_dir import ram_dir
from tests.faults import (
    backend_faults,
    bad_inputs,
    damaged_files,
    model_faults,
    results,
    service_faults,
)
from tests.faults.results import say
from tests.faults.rounds import CannotRun, Found, Round

Fault = Callable[[Round], None]
_KILL = service_faults.sigkill
FAULTS: dict[str, Fault] = {
    "SIGKILL while idle": _KILL("none", 0.3),
    "SIGKILL mid-upsert": _KILL("none", 0.5, writes=True),
    "SIGKILL mid-flush": _KILL("flush", 1.0, writes=True),
    "SIGKILL mid-optimize": _KILL("optimize", 0.6, writes=True),
    "SIGKILL mid-swap": _KILL("optimize", 0.0, writes=True, swap=True),
    "SIGKILL mid-snapshot": _KILL("snapshot", 0.2, writes=True),
    "SIGTERM under load": service_faults.sigterm,
    "SIGSTOP for 5 s": service_faults.sigstop,
    "disk full": service_faults.disk_full,
    "read-only file system": service_faults.read_only,
    "a file flipped": damaged_files.damaged(damaged_files.flip),
    "a file truncated": damaged_files.damaged(damaged_files.truncate),
    "a file deleted": damaged_files.damaged(damaged_files.delete),
    "a second opener": service_faults.second_opener,
    "backend slow": backend_faults.slow,
    "backend black-holed": backend_faults.black_hole,
    "backend connections reset": backend_faults.reset,
    "backend flapping": backend_faults.flapping,
    "backend killed": backend_faults.killed,
    "backend of a wrong version": backend_faults.wrong_version,
    "deadline storm": service_faults.deadline_storm,
    "ten times too many callers": service_faults.overload,
    "oversized messages": service_faults.oversized,
    "half-sent messages, gRPC": service_faults.half_sent,
    "half-sent messages, PATH.route": service_faults.half_sent_directly,
    "client cancels": service_faults.client_cancels,
    "no file descriptors": service_faults.descriptors,
    "restart while a model generates": model_faults.generation,
    "restart under replicas": model_faults.replicas,
    "bad lookups": bad_inputs.lookups,
    "bad upserts": bad_inputs.upserts,
    "bad settings, models, calibrations": bad_inputs.settings,
    "bad names": bad_inputs.bad_names,
    "bad messages": bad_inputs.messages,
    "bad tokens": bad_inputs.tokens,
    "bad snapshot archives": bad_inputs.archives,
}
_BEGIN, _END = "<!-- python -m tests.faults.suite: faults -->", "<!-- end -->"
_COLUMNS = (
    "fault",
    "injected:",
    "writes acknowledged:",
    "lookups compared:",
    "entries lost:",
    "wrong answers:",
    "defects:",
    "recovers in, median:",
    "longest:",
)
_MOST_LINES = 5


class Suite:
    """Faults by turns, until the time is used; each at least once."""

    def __init__(self, faults: Mapping[str, Fault], seed: int, say: Callable[[str], None]) -> None:
        self._faults, self._seed, self._say = faults, seed, say
        self.found = {name: Found() for name in faults}
        self.rounds = dict.fromkeys(faults, 0)
        self.left_out: dict[str, str] = {}  # and why

    @property
    def is_broken(self) -> bool:
        """Whether something was found that must not be."""
        return any(found.violations for found in self.found.values())

    def run(self, seconds: float, rounds: int | None = None, scale: float = 1.0) -> None:
        """Or so many `rounds`."""
        end_s, number = time.monotonic() + seconds, 0
        while number < rounds if rounds is not None else number == 0 or time.monotonic() < end_s:
            for name, fault in self._faults.items():
                if number and rounds is None and time.monotonic() > end_s:
                    return
                if name not in self.left_out:
                    self._round(name, fault, number, scale)
            number += 1

    def _round(self, name: str, fault: Fault, number: int, scale: float) -> None:
        seed, began_s = self._seed + number, time.monotonic()
        with tempfile.TemporaryDirectory() as otherwise, ram_dir(Path(otherwise)) as directory:
            try:
                with Round(directory, seed, scale) as round_:
                    found = round_.found
                    fault(round_)
            except CannotRun as reason:
                self.left_out[name] = str(reason)
                self._say(f"{name}: left out, {reason}")
                return
            except Exception as error:  # noqa: BLE001  # whatever ends a round is what is looked for
                found.blame(error)
        self.found[name].add(found)
        self.rounds[name] += 1
        took_s, violations = time.monotonic() - began_s, found.violations
        what = f"{len(violations)} violations" if violations else "nothing lost, nothing wrong"
        self._say(f"{name}, seed {seed}: {found.injected} injected, {what}; {took_s:.0f} s")
        for violation in violations[:_MOST_LINES]:
            self._say(f"  {violation[:600]}")
        if violations:
            self._say(
                f"  again: python -m tests.faults.suite --only '{name}' --seed {seed} --rounds 1"
            )


def table(found: Mapping[str, Found], left_out: Mapping[str, str]) -> str:
    """In Markdown, a row for each fault."""
    rows = [
        [name, f"not run: {left_out[name]}", *[""] * (len(_COLUMNS) - 2)]
        if name in left_out
        else _row(name, each)
        for name, each in found.items()
    ]
    return results.table(_COLUMNS, rows)


def _row(name: str, each: Found) -> list[str]:
    times = sorted(each.recoveries_s)
    return [
        name,
        *(f"{number:,}" for number in (each.injected, each.writes, each.lookups)),
        *(str(len(those)) for those in (each.lost, each.wrong, each.defects)),
        _seconds(statistics.median(times)) if times else "",
        _seconds(times[-1]) if times else "",
    ]


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def report(suite: Suite, command: str, seconds: float) -> str:
    """The table, and where it is from."""
    rounds, day = sum(suite.rounds.values()), datetime.now(UTC).date()
    head = f"`{command}`, {day}, {seconds / 60:.0f} minutes, {rounds} rounds of {len(suite.found)} kinds:"
    return f"{head}\n\n{table(suite.found, suite.left_out)}\n"


def put_into(page: Path, text: str) -> None:
    """Between the marks of a page."""
    old = page.read_text()
    new = re.sub(
        f"{re.escape(_BEGIN)}.*?{re.escape(_END)}",
        lambda _: f"{_BEGIN}\n{text}{_END}",
        old,
        flags=re.DOTALL,
    )
    page.write_text(new)


def as_json(suite: Suite, command: str, seconds: float) -> dict[str, Any]:
    """All that was found, by fault."""
    return {
        "command": command,
        "seconds": round(seconds),
        "faults": {
            name: asdict(found) | {"rounds": suite.rounds[name]}
            for name, found in suite.found.items()
        },
        "left_out": suite.left_out,
    }


def chosen(only: Sequence[str] | None) -> dict[str, Fault]:
    """The faults of these names, or of a part of them. Raises SystemExit where there are none."""
    if not only:
        return FAULTS
    found = {name: each for name, each in FAULTS.items() if any(part in name for part in only)}
    if not found:
        raise SystemExit(
            f"--only {' '.join(only)}: no fault of this name; there are {', '.join(FAULTS)}"
        )
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--hours", type=float, help="in place of minutes")
    parser.add_argument("--rounds", type=int, help="of each fault, in place of a time")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first round; the next has one more"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="or a part of it; repeatable"
    )
    parser.add_argument("--out", type=Path, default=Path("fault-results"))
    parser.add_argument("--page", type=Path, help="that gets the table, e.g. docs/reliability.md")
    given = parser.parse_args(words)
    command = " ".join(
        ["python -m tests.faults.suite", *(sys.argv[1:] if words is None else words)]
    )
    began_s = time.monotonic()
    suite = Suite(
        chosen(given.only),
        given.seed,
        lambda line: say(f"[{time.monotonic() - began_s:4.0f} s] {line}"),
    )
    suite.run(3600 * given.hours if given.hours else 60 * given.minutes, given.rounds)
    seconds = time.monotonic() - began_s
    text = report(suite, command, seconds)
    results.publish(given.out, "faults", as_json(suite, command, seconds), text)
    if given.page is not None:
        put_into(given.page, text)
    sys.stdout.write(text)
    return int(suite.is_broken)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # services end too
    sys.exit(main())
