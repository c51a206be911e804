"""A model generates token after token while its sidecar is killed, stopped, restarted, overloaded and cut off.

    python -m tests.faults.generation --seed 0 --out DIR

The shipped model writes texts with a memory that is read in the sidecar (over a Unix socket, and over TCP) and in
replicas: one that goes on with what it has, and one that gives no answers when it may be older than 2 s. Each is first
left alone, then something happens to the sidecar; afterwards all must be as before. Looked at are: that a token always
comes, what it waits, that one without the memory is the plain model's, that what was answered is what NumPy finds in
the memory, and that all counters add up. DIR gets generation.json and generation.md; status 1: something is not so.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_runner.models import LoadedModel, load_model
from model_runner.router_client import TIMEOUT_S_PER_MORE_TOKEN, CircuitBreaker
from model_runner.routing_policy import Lookups
from model_runner.small_moe import MODEL_DIR, data_file
from model_runner.texts import Window, read_windows
from tests.faults import generation_world as worlds
from tests.faults import results
from tests.faults.crowd import Crowd
from tests.faults.generation_world import MEMORY, STALE_S, Happen, Life, Made, Token, World, Writer
from tests.faults.replica_oracle import Expected
from tests.faults.replica_oracle import Violation as Wrong
from tests.faults.results import counted, publish, quantiles, say, spread

# Why a lookup in the sidecar may fall back while something happens to it.
REASONS = {
    "killed": {"unavailable", "deadline", "breaker_open"},
    "stopped": {"deadline", "breaker_open"},
    "restarted": {"unavailable", "shutting_down", "deadline", "breaker_open"},
    "overloaded": {"overloaded", "deadline", "breaker_open"},
    "cut_off": {"backend_unavailable", "deadline", "breaker_open"},
    "refused": {"backend_unavailable", "deadline", "breaker_open"},
}
EMBEDDED, ON_SERVER = ("stopped", "overloaded", "killed", "restarted"), ("cut_off", "refused")
REMOTE, REPLICA, FRESH = "remote", "replica", f"replica, at most {STALE_S:g} s old"
# What has ended, and the service still works at.
_SETTLED_S, _BACK_S = 10.0, 90.0
_ROWS = 500
_COLUMNS = (
    *("fault", "over", "retrieval", "tokens:", "without the memory:", "lookups:", "answered:"),
    *("fell back", "usual ms:", "added ms p50 / p99 / max:", "without the fault:"),
    *("longest wait ms:", "back after s:", "wrong"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Of a run.

    Attributes:
        tokens: in each phase, of each writer; more while a fault lasts longer.
        length: tokens of a text.
        fault_s: that a fault lasts at least.
        allowance_s: that a token may wait beyond the deadlines of its lookups on a busy machine; None: for as long as
            it likes.
        crowd_tokens: in each lookup of the other clients.
        permits: calls at work in the sidecar, --max-in-flight.
        pause_s: between two tokens, as if the model was larger.

    """

    seed: int = 0
    tokens: int = 150
    length: int = 60
    fault_s: float = 4.0
    deadline_s: float = 0.05
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    allowance_s: float | None = 0.1
    crowd_tokens: int = 1024
    permits: int = 8
    pause_s: float = 0.01


@dataclass
class Outcome:
    """One writer through one fault."""

    fault: str
    over: str
    retrieval: str
    without: list[Token]
    during: list[Token]
    recovered_s: float
    lookups: Lookups
    wrong: list[str] = field(default_factory=list)
    crowd: dict[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """Lookups."""
        return self.lookups.total - sum(self.lookups.fell_back.values())

    def row(self) -> dict[str, Any]:
        """What is shown of it. Added: to the median token of the same texts without the fault."""
        usual = float(np.median([token.took_s for token in self.without]))
        waits = [sum(m.ended_s - m.began_s for m in token.lookups) for token in self.during]
        return {
            "fault": self.fault,
            "over": self.over,
            "retrieval": self.retrieval,
            "tokens": len(self.during),
            "plain_tokens": sum(token.plain is not None for token in self.during),
            "lookups": self.lookups.total,
            "answered": self.answered,
            "fell_back": dict(sorted(self.lookups.fell_back.items())),
            "usual_ms": _ms(usual),
            "added_without_ms": _added(self.without, usual),
            "added_ms": _added(self.during, usual),
            "longest_wait_ms": _ms(max(waits)),
            "recovered_s": round(self.recovered_s, 3),
            "wrong": self.wrong,
            **({"crowd": self.crowd} if self.crowd else {}),
        }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def _added(tokens: Sequence[Token], usual_s: float) -> dict[str, float]:
    return quantiles([1000 * (token.took_s - usual_s) for token in tokens], 2)


class Run:
    """Faults in one world, one after the other."""

    def __init__(self, world: World, plan: Plan, prompts: Sequence[Tensor]) -> None:
        self.world, self.plan, self._prompts = world, plan, prompts
        self.outcomes: list[Outcome] = []
        self.wrong: list[str] = []  # of the service's counters
        self.writers: list[Writer] = []
        self.checked = 0  # lookups against NumPy

    def all(
        self, faults: Sequence[str], retrievals: Sequence[str], say: Callable[[str], None]
    ) -> None:
        """Each fault once; then the counters of the service."""
        with self._writers(retrievals), self._crowd(needed="overloaded" in faults):
            for fault in faults:
                self._through(fault, getattr(worlds, fault))
                say(
                    f"{fault}, over {self.world.over}: {_summary(self.outcomes[-len(retrievals) :])}"
                )
        self._count_service()

    @contextmanager
    def _writers(self, retrievals: Sequence[str]) -> Iterator[None]:
        plan, world = self.plan, self.world
        with ExitStack() as stack:
            for name in retrievals:
                if name == REMOTE:
                    breaker = CircuitBreaker(
                        first_pause_s=plan.first_pause_s, longest_pause_s=plan.longest_pause_s
                    )
                    retriever: Any = world.remote(plan.deadline_s, breaker)
                else:
                    retriever = world.replica(stack, STALE_S if name == FRESH else None)
                writer = Writer(
                    *(name, world.loaded, self._prompts, retriever, world.between, plan.length)
                )
                self.writers.append(stack.enter_context(_hooked(writer)))
            yield
            world.replicas.clear()

    @contextmanager
    def _crowd(self, *, needed: bool) -> Iterator[None]:
        if not needed:
            yield
            return
        plan = self.plan
        shape = {"tokens": plan.crowd_tokens, "callers": plan.permits, "times": 10}
        with Crowd(self.world.target, MEMORY, **shape) as self.world.crowd:
            measured = self.world.crowd.order("measure")
            self._capacity = measured.pop("could_serve_per_s")
            self.world.lives[-1].others.update(measured)
            yield

    def _through(self, name: str, happen: Happen) -> None:
        """Texts without the fault, the same texts with it, until all is as before; and what came of it."""
        for writer in self.writers:
            writer.rewind()
            for _ in range(self.plan.tokens):
                self._step(writer, f"without {name}")
            writer.rewind()
        before = [writer.policy.lookups for writer in self.writers]
        first = [len(writer.tokens) for writer in self.writers]
        lives = len(self.world.lives)
        over_s = self._while(name, happen)
        back = self._until_back(over_s)
        crowd, self.world.crowded = self.world.crowded, {}
        if crowd:
            self.world.lives[-1].others.update(_became(crowd))
            crowd["could_serve_per_s"] = self._capacity
        for writer, was, start, recovered_s in zip(self.writers, before, first, back, strict=True):
            during = writer.tokens[start:]
            without = [token for token in writer.tokens[:start] if token.phase == f"without {name}"]
            fell_back = Counter(writer.policy.lookups.fell_back)
            fell_back.subtract(was.fell_back)
            made = Lookups(writer.policy.lookups.total - was.total, +fell_back)
            outcome = Outcome(
                *(name, self.world.over, writer.name, without, during, recovered_s, made)
            )
            if writer.name == REMOTE:
                outcome.crowd = crowd
            self._check(outcome, writer)
            self.outcomes.append(outcome)
        self._settle(lives)

    def _step(self, writer: Writer, phase: str) -> None:
        time.sleep(self.plan.pause_s)
        writer.step(phase)

    def _while(self, name: str, happen: Happen) -> float:
        """Generates while it happens; when it was over."""
        made, failed, over_s = threading.Event(), list[Exception](), [0.0]

        def work() -> None:
            try:
                happen(self.world, lambda: _require(made.wait(_BACK_S), "tokens do not come"))
                over_s[0] = time.monotonic()
            except Exception as error:  # noqa: BLE001  # raised again by the thread that generates
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        began, tokens = time.monotonic(), 0
        thread.start()
        while thread.is_alive():
            for writer in self.writers:
                self._step(writer, name)
            tokens += 1
            if tokens >= self.plan.tokens and time.monotonic() - began >= self.plan.fault_s:
                made.set()
        thread.join()
        if failed:
            raise failed[0]
        return over_s[0]

    def _until_back(self, over_s: float) -> list[float]:
        """Generates on until each writer's lookups are answered again; seconds after the fault, inf: they are not."""
        back = dict.fromkeys(range(len(self.writers)), float("inf"))
        give_up_s = time.monotonic() + _BACK_S
        while any(map(np.isinf, back.values())) and time.monotonic() < give_up_s:
            for number, writer in enumerate(self.writers):
                self._step(writer, "after")
                if np.isinf(back[number]) and writer.is_back(over_s):
                    back[number] = max(0.0, time.monotonic() - over_s)
        return list(back.values())

    def _check(self, outcome: Outcome, writer: Writer) -> None:
        """Notes in the outcome what is not as it must be."""
        tokens, wrong = outcome.during, outcome.wrong
        made = [each for token in tokens for each in token.lookups]
        layers = self.world.loaded.fingerprint.num_layers
        seen = Counter(each.reason for each in made if each.reason is not None)
        _note(wrong, outcome.lookups.total == len(made) == layers * len(tokens), "lookups lost")
        _note(
            wrong,
            dict(outcome.lookups.fell_back) == dict(seen),
            f"counted {outcome.lookups.fell_back}, seen {dict(seen)}",
        )
        if outcome.retrieval == REMOTE:
            theirs = writer.retriever.lookups
            _note(wrong, theirs == writer.policy.lookups, f"the client counted {theirs}")
            allowed = REASONS[outcome.fault]
            _note(wrong, seen.total() > 0, "the fault did not show")
            wrong += self._asked_too_often(tokens)
        else:
            allowed = {"replica_stale"} if outcome.retrieval == FRESH else set[str]()
        _note(wrong, set(seen) <= allowed, f"fell back by {dict(seen)}, expected {allowed}")
        _note(wrong, outcome.recovered_s < float("inf"), f"no answers {_BACK_S:g} s later")
        changed = [token.number for token in tokens if token.plain is False]
        _note(wrong, not changed, f"tokens {changed} are not the plain model's")
        wrong += self._waited_too_long(tokens)
        wrong += self._answered_wrongly([*made, *(m for t in outcome.without for m in t.lookups)])

    def _asked_too_often(self, tokens: Sequence[Token]) -> list[str]:
        """Failures in a row that a sidecar was asked for: five, and then trials, each a pause after the one before."""
        runs: list[list[Made]] = [[]]
        for each in (each for token in tokens for each in token.lookups):
            if each.reason is None:
                runs.append([])
            elif each.waited:
                runs[-1].append(each)
        breaker = CircuitBreaker()
        wrong = []
        for run in runs:
            trials, pause_s = run[breaker.failures_to_open - 1 :], self.plan.first_pause_s
            for one, other in itertools.pairwise(trials):
                apart_s = other.ended_s - one.began_s
                _note(wrong, apart_s >= 0.75 * pause_s, f"asked again after {apart_s:.3f} s")
                pause_s = min(self.plan.longest_pause_s, 2 * pause_s)
        return wrong

    def _waited_too_long(self, tokens: Sequence[Token]) -> list[str]:
        if self.plan.allowance_s is None:
            return []
        wrong = []
        for token in tokens:
            most = self.plan.allowance_s
            most += sum(
                self.plan.deadline_s + TIMEOUT_S_PER_MORE_TOKEN * (len(each.inputs) - 1)
                for each in token.lookups
                if each.waited
            )
            waited = sum(each.ended_s - each.began_s for each in token.lookups)
            if waited > most:
                wrong.append(f"token {token.number} waited {waited:.3f} s, expected {most:.3f}")
        return wrong

    def _answered_wrongly(self, made: Sequence[Made]) -> list[str]:
        wrong = []
        for layer, truth in enumerate(self.world.truths):
            answered = [each for each in made if each.layer == layer and each.reason is None]
            for start in range(0, len(answered), _ROWS):
                part = answered[start : start + _ROWS]
                inputs, logits = (
                    np.concatenate([getattr(each, name) for each in part])
                    for name in ("inputs", "logits")
                )
                found = [worlds.values_of(each) for each in part]
                lambdas, blended = (np.concatenate(each) for each in zip(*found, strict=True))
                try:
                    Expected.of(truth, 0, inputs, logits, []).compare(
                        lambdas, blended, f"layer {layer}"
                    )
                except Wrong as violation:
                    wrong.append(str(violation))
                self.checked += len(part)
        return wrong

    def _settle(self, lives: int) -> None:
        """Compares what the service says with what the model saw, once it has ended what it was at."""
        for life in self.world.lives[lives - 1 : -1]:
            self.wrong += self._differ(life)
        give_up_s = time.monotonic() + _SETTLED_S
        while differ := self._differ(self.world.scrape()):
            if time.monotonic() > give_up_s:
                self.wrong += differ
                return
            time.sleep(0.02)

    def _differ(self, life: Life) -> list[str]:
        """Lookups in the service, against those that were made while it lived and before it was asked."""
        made = [
            each
            for writer in self.writers
            if writer.name == REMOTE
            for token in writer.tokens
            for each in token.lookups
            if life.began_s <= each.began_s and each.ended_s <= life.scraped_s
        ]
        seen = Counter(each.reason or "answered" for each in made)
        others, wrong = life.others, list[str]()
        served, refused = life.lookups("service") - others["answered"], life.refused("RouteStream")
        # What nobody waited for any more was answered, refused or never begun.
        of_others = others.total() - others["answered"] - others["resource_exhausted"]
        late = seen["deadline"] + of_others
        holds = seen["answered"] <= served <= seen["answered"] + late
        _note(wrong, holds, f"the service counted {served} lookups, the model {dict(seen)}")
        for reason in ("overloaded", "backend_unavailable"):
            counted = life.refused("RouteStream", reason=reason)
            holds = counted >= seen[reason]
            _note(wrong, holds, f"the service refused {counted} as {reason}, {seen[reason]} heard")
        counted, heard = life.refused("Route", reason="overloaded"), others["resource_exhausted"]
        holds = heard <= counted <= heard + of_others
        _note(wrong, holds, f"the service refused {counted} of others: {dict(others)}")
        # A socket's lookups all reach the service, and these are tried once.
        asked = seen["answered"] + seen["deadline"] + seen["overloaded"]
        if life.first and self.world.over == "unix" and not self.world.server:
            holds = asked <= served + refused <= asked + of_others
            _note(wrong, holds, f"{served} served and {refused} refused of {asked} lookups")
        return wrong

    def _count_service(self) -> None:
        """What replicas reported, the last of it when they were closed, over all lives."""
        self.world.scrape()
        reported = sum(life.lookups("replica") for life in self.world.lives)
        answered = sum(
            each.reason is None
            for writer in self.writers
            if writer.name != REMOTE
            for token in writer.tokens
            for each in token.lookups
        )
        _note(
            self.wrong,
            reported == answered,
            f"replicas answered {answered}, and reported {reported}",
        )


@contextmanager
def _hooked(writer: Writer) -> Iterator[Writer]:
    with writer.hooks:
        yield writer


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise AssertionError(problem)


def _note(wrong: list[str], holds: bool, problem: str) -> None:
    if not holds:
        wrong.append(problem)


def _summary(outcomes: Sequence[Outcome]) -> str:
    return "; ".join(
        f"{each.retrieval}: {each.lookups}, back after {each.recovered_s:.2f} s"
        + (f", WRONG: {each.wrong}" if each.wrong else "")
        for each in outcomes
    )


def shipped(seed: int, windows: int, texts: int) -> tuple[LoadedModel, list[Window], list[Tensor]]:
    """The shipped model, what its memory is made of, and what texts begin with."""
    loaded = load_model(str(MODEL_DIR), device="cpu")
    rng = np.random.default_rng(seed)

    def draw(split: Any, count: int) -> list[Window]:
        found = read_windows(data_file("shifted", split), loaded.tokenizer, 128)
        full = [window for window in found if len(window.token_ids) == 128]
        return [full[n] for n in rng.choice(len(full), count, replace=False)]

    prompts = [torch.tensor([window.token_ids[:16]]) for window in draw("test", texts)]
    return loaded, draw("reference", windows), prompts


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    cells = [
        (
            *(row["fault"], row["over"], row["retrieval"], row["tokens"], row["plain_tokens"]),
            *(row["lookups"], row["answered"], counted(row["fell_back"])),
            *(f"{row['usual_ms']:.1f}", spread(row["added_ms"], 1)),
            *(spread(row["added_without_ms"], 1), f"{row['longest_wait_ms']:.1f}"),
            *(f"{row['recovered_s']:.2f}", "; ".join(row["wrong"]) or "nothing"),
        )
        for row in rows
    ]
    crowds = [_sentence(row["over"], row["crowd"]) for row in rows if "crowd" in row]
    return "\n".join([results.table(_COLUMNS, cells), "", *crowds]).rstrip() + "\n"


def _sentence(over: str, crowd: dict[str, Any]) -> str:
    became = counted(dict(sorted(_became(crowd).items())))
    return (
        f"Overloaded, over {over}: the others sent {crowd['sent_per_s']:.0f} lookups a second, where "
        f"{crowd['could_serve_per_s']:.0f} could be served; of {crowd['sent']}: {became}.  "
    )


def _became(crowd: dict[str, Any]) -> dict[str, int]:
    """By what they ended with."""
    measures = ("sent", "sent_per_s", "not_sent", "could_serve_per_s")
    return {kind: number for kind, number in crowd.items() if kind not in measures}


def main() -> int:
    """Status 1: something was not as it must be."""
    usual = Plan()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    parser.add_argument("--out", type=Path, required=True, help="directory of what was found")
    parser.add_argument("--tokens", type=int, default=usual.tokens, help="in each phase")
    parser.add_argument("--windows", type=int, default=40, help="of 128 tokens, in the memory")
    parser.add_argument("--fault-s", type=float, default=usual.fault_s, help="a fault's least time")
    parser.add_argument(
        "--allowance-ms", type=float, default=100.0, help="a token's beyond its deadlines"
    )
    parser.add_argument("--only", action="append", choices=REASONS, help="a fault; may come again")
    parser.add_argument("--over", choices=("unix", "tcp"), help="only lookups over this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(
        seed=options.seed,
        tokens=options.tokens,
        fault_s=options.fault_s,
        allowance_s=options.allowance_ms / 1000,
    )
    loaded, windows, prompts = shipped(options.seed, options.windows, 40)
    found: dict[str, Any] = {"rows": [], "wrong": [], "lookups_compared": 0}
    for over, faults in (("unix", EMBEDDED), ("tcp", EMBEDDED), ("unix", ON_SERVER)):
        chosen = [fault for fault in faults if not options.only or fault in options.only]
        if not chosen or options.over not in (None, over):
            continue
        with tempfile.TemporaryDirectory() as home:
            flags = ["--max-in-flight", str(plan.permits)]
            where = (Path(home), loaded, windows, over, faults is ON_SERVER, flags)
            with World(*where) as world:
                run = Run(world, plan, prompts)
                run.all(chosen, (REMOTE, REPLICA, FRESH), say)
        found["rows"] += [outcome.row() for outcome in run.outcomes]
        found["wrong"] += run.wrong
        found["lookups_compared"] += run.checked
    shown = table(found["rows"])
    publish(options.out, "generation", found, shown)
    sys.stdout.write(shown)
    wrong = found["wrong"] + [problem for row in found["rows"] for problem in row["wrong"]]
    for problem in wrong:
        say(f"broken: {problem} (seed {options.seed})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
