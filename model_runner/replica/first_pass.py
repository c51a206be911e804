"""Candidates for the K nearest rows of a layer, on the CPU: chosen by codes, their distances computed from the keys.

What is found is exact; what is missed is measured, on router inputs that were asked for, before lookups rely on it
(`Plan`). The codes are of the layer at one version. Rows that were shown since are candidates for every token, and
those that were hidden since for none, until a thread has taken them into new codes; no lookup waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_runner.errors import BadInput
from model_runner.replica import search
from model_runner.replica.bounded import BoundedScan
from model_runner.replica.codes import U8, WIDTHS, Codes, levels, reductions
from model_runner.replica.layer import I64, LayerReplica
from model_runner.replica.plans import (
    CANDIDATES,
    COSTS,
    AskedTokens,
    Plan,
    finds_less,
    measure,
)
from model_runner.replica.search import Found

log = logging.getLogger(__name__)

Bools = NDArray[np.bool_]

# `auto`: where it is faster and finds enough; `exact`: never; `pca`: wherever it finds enough.
CHOICES = ("auto", "exact", "pca")

_SAMPLE = 4096  # keys that reductions and levels are learnt from
_SLICE = 4096  # rows that are encoded at once
_FEWEST_ROWS = 1000
# New codes are made when lookups have read so many changed rows, and so many more for each of these.
_RENEWAL, _ENCODING = 2500, 12
_ONE_AT_A_TIME = threading.Lock()  # of the threads: they compute, and so does the model


@dataclass(frozen=True, slots=True)
class State:
    """What lookups go by; replaced as a whole.

    Attributes:
        plans: by K.
        trained_on: rows that the reduction was learnt for.
        renewed, unmeasured: rows that were taken in since it was learnt, and since plans were measured.
        measured: how often the kept tokens had been renewed when plans were measured.

    """

    codes: Codes
    plans: dict[int, Plan]
    trained_on: int
    renewed: int = 0
    unmeasured: int = 0
    measured: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened to a layer since its codes were made.

    Attributes:
        version: of the layer.
        rows: bool [capacity], those that were shown or hidden.
        shown: int64 [1, m], those of them that lookups find.

    """

    codes: Codes
    version: int
    rows: Bools
    shown: Tensor


class _Ending(Exception):
    """The program ends, and waits for its threads."""


def _require_program() -> None:
    """Between two steps of a thread: a program that has nothing else to do must not wait for codes. Raises _Ending."""
    if not threading.main_thread().is_alive():
        raise _Ending


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A layer at one version: rows that lookups found [n], all rows' versions [capacity]."""

    version: int
    rows: I64
    row_versions: I64


class CodedFirstPass:
    """A first pass for one layer. Lookups come from any thread; a thread of its own trains it and follows the layer.

    It answers where FAISS is installed, a plan finds enough and (`auto`) a scan would cost more.
    """

    def __init__(self, layer: LayerReplica, choice: str = "auto", seed: int = 0) -> None:
        """Raises BadInput for another choice."""
        self.choice, self._layer = require_choice(choice), layer
        self._generator = torch.Generator().manual_seed(seed)
        self.bounded = BoundedScan(layer)
        self._state: State | None = None
        self._changes: Changes | None = None
        self._asked = AskedTokens(layer.dimension)
        self._wanted: set[int] = set()
        self._read = 0  # changed rows, by lookups, since the codes were made
        self._worked = threading.Condition()
        self._working = self._failed = False

    @property
    def plans(self) -> dict[int, Plan]:
        """By K; none before the first pass is trained."""
        return {} if self._state is None else self._state.plans

    @property
    def width(self) -> int:
        """Numbers per reduced key; 0 before the first pass is trained."""
        return 0 if self._state is None else self._state.codes.reduction.width

    @property
    def nbytes(self) -> int:
        """Bytes of RAM beside the layer's."""
        codes = 0 if self._state is None else self._state.codes.nbytes
        return self.bounded.nbytes + codes

    def nearest(self, queries: Tensor, k: int) -> Found | None:
        """As search.nearest; None: all rows are to be scanned. Within the layer's lock."""
        enough_rows = len(self._layer) >= _FEWEST_ROWS
        if self.choice == "auto" and enough_rows and self.bounded.serves(len(queries), k):
            return self.bounded.nearest(queries, k)
        if self._failed or not self._serves(len(queries)):
            return None
        self._asked.notice(queries)
        state = self._state
        plan = None if state is None else state.plans.get(k)
        if state is None or plan is None:
            if self._asked.enough:
                self._want(k)
            return None
        changes = self._changed(state)
        if self._is_due(state, changes, len(queries)):
            self._want(k)
        if not self._pays(state, plan, changes, len(queries)):
            return None
        return self._search(state, plan, changes, queries, k)

    def train(self, k: int, tokens: Tensor) -> None:
        """Learns codes and measures plans for K on tokens [n, d], now; not while lookups train it."""
        self._asked.notice(tokens)
        self._wanted.add(k)
        with _ONE_AT_A_TIME, torch.no_grad():
            self._bring_up_to_date()

    def wait(self) -> None:
        """Returns when the thread has nothing left to do."""
        with self._worked:
            self._worked.wait_for(lambda: not self._working)

    def _search(
        self, state: State, plan: Plan, changes: Changes | None, queries: Tensor, k: int
    ) -> Found:
        codes = state.codes
        rows = codes.candidates(codes.reduction(queries, plan.agreement), plan.candidates)
        if changes is None:
            return search.closest(self._layer, queries, torch.from_numpy(rows), k)
        rows[changes.rows[rows]] = -1
        shown = changes.shown.expand(len(rows), -1)
        every = torch.cat((torch.from_numpy(rows), shown), 1)
        found = search.closest(self._layer, queries, every, k)
        # where most of what was near is hidden, what is left need not be the nearest
        short = np.flatnonzero((rows >= 0).sum(1) < rows.shape[1] * 3 // 4)
        if len(short):
            self._read += len(short) * len(codes)
            tokens = torch.from_numpy(short)
            anew = search.exact(self._layer, queries[tokens], k)
            found[0][tokens], found[1][tokens] = anew
        return found

    def _serves(self, tokens: int) -> bool:
        layer = self._layer
        return (
            tokens > 0
            and self.choice != "exact"
            and layer.dimension > WIDTHS[0]
            and len(layer) >= _FEWEST_ROWS
            and (self.choice == "pca" or self._gains(tokens, WIDTHS[0], CANDIDATES[0]))
            and _has_faiss()
        )

    def _pays(self, state: State, plan: Plan, changes: Changes | None, tokens: int) -> bool:
        changed = 0 if changes is None else changes.shown.numel()
        if not plan.candidates or changed > len(state.codes) // 16:
            return False
        candidates = plan.candidates + changed
        return self.choice == "pca" or self._gains(tokens, state.codes.reduction.width, candidates)

    def _gains(self, tokens: int, width: int, candidates: int) -> bool:
        shape = len(self._layer), self._layer.dimension, tokens
        return COSTS.of_first_pass(*shape, width, candidates) < COSTS.of_scan(*shape)

    def _changed(self, state: State) -> Changes | None:
        """None: nothing is."""
        layer, codes = self._layer, state.codes
        if layer.version == codes.version:
            return None
        changes = self._changes
        if changes is None or changes.version != layer.version or changes.codes is not codes:
            rows = layer.row_versions > codes.version
            shown = np.flatnonzero(rows & np.isfinite(layer.squared_norms.numpy()))
            tensor = torch.from_numpy(shown).unsqueeze(0)
            self._changes = changes = Changes(codes, layer.version, rows, tensor)
        return changes

    def _is_due(self, state: State, changes: Changes | None, tokens: int) -> bool:
        """Whether the thread has something to do: what changed has cost lookups what new codes cost, or measuring."""
        if changes is not None:
            changed = changes.shown.numel()
            self._read += tokens * (1 + changed)
            if self._read > _RENEWAL + _ENCODING * changed:
                return True
        return self._asked.to_check or self._asked.times_filled > state.measured

    def _want(self, k: int) -> None:
        if self._working and k in self._wanted:
            return
        with self._worked:
            self._wanted.add(k)
            if not self._working:
                self._working = True
                threading.Thread(target=self._run, name="first pass").start()

    def _run(self) -> None:
        try:
            with _ONE_AT_A_TIME, torch.no_grad():
                self._bring_up_to_date()
        except _Ending:
            log.debug("the program ends before a layer of the replica has a first pass")
        except Exception:
            self._failed = True
            log.exception("a layer of the replica has no first pass any more, every row is scanned")
        finally:
            with self._worked:
                self._working = False
                self._worked.notify_all()

    def _bring_up_to_date(self) -> None:
        _require_program()
        state = self._state
        if state is not None:
            state = self._renewed(state)
            if self._is_of_another_text(state):
                self._asked.forget()
                self._publish(replace(state, plans={}, measured=0))
                return
            if state.renewed <= state.trained_on // 4:
                measured = self._measured(state)
                if measured is state or all(plan.candidates for plan in measured.plans.values()):
                    self._publish(measured)
                    return
        self._learn()

    def _publish(self, state: State) -> None:
        self._read = 0
        self._state = state

    def _renewed(self, state: State) -> State:
        """With codes of the layer as it is now, of the same reduction."""
        now, codes = self._snapshot(), state.codes
        if now.version == codes.version:
            return state
        changed = now.row_versions > codes.version
        kept = ~changed[codes.rows]
        added = now.rows[changed[now.rows]]
        numbers = np.concatenate([codes.codes[kept], *self._encoded(codes, added)])
        rows = np.concatenate([codes.rows[kept], added])
        renewed = Codes(codes.reduction, codes.values, rows, numbers, now.version)
        return replace(
            state,
            codes=renewed,
            renewed=state.renewed + len(added),
            unmeasured=state.unmeasured + len(added),
        )

    def _is_of_another_text(self, state: State) -> bool:
        """Whether a plan finds too few of the latest tokens' nearest; then every row is looked at until others came."""
        if not self._asked.to_check or any(k not in state.plans for k in self._wanted):
            return False
        latest = self._asked.latest()
        for k, plan in state.plans.items():
            if plan.candidates and finds_less(self._layer, state.codes, plan, latest):
                log.info("K = %d: tokens of another text, whose first pass is measured anew", k)
                return True
        return False

    def _encoded(self, codes: Codes, rows: I64) -> list[U8]:
        encoded = []
        for start in range(0, len(rows), _SLICE):
            _require_program()
            part = torch.from_numpy(rows[start : start + _SLICE])
            encoded.append(codes.encode(self._layer.stored_keys(part)))
        return encoded

    def _measured(self, state: State) -> State:
        """With plans for every K that is wanted, if some are missing or out of date."""
        renewed = self._asked.times_filled
        out_of_date = state.unmeasured > len(state.codes) // 16 or renewed > state.measured
        if not out_of_date and all(k in state.plans for k in self._wanted):
            return state
        plans = self._plans([state.codes])[0]
        return replace(state, plans=plans, unmeasured=0, measured=renewed)

    def _learn(self) -> None:
        """Tries reductions of every width, and keeps what searches fastest for all K that are wanted."""
        now, renewed = self._snapshot(), self._asked.times_filled
        order = torch.randperm(len(now.rows), generator=self._generator)[:_SAMPLE]
        sample = self._layer.stored_keys(torch.from_numpy(now.rows)[order])
        tried = []
        for reduction in reductions(sample, self._generator):
            values = levels(reduction(sample))
            empty = Codes(reduction, values, now.rows[:0], None, now.version)
            numbers = np.concatenate(self._encoded(empty, now.rows))
            tried.append(Codes(reduction, values, now.rows, numbers, now.version))
        states = [
            State(codes, plans, len(now.rows), measured=renewed)
            for codes, plans in zip(tried, self._plans(tried), strict=True)
        ]
        best = min(states, key=self._cost)
        self._publish(best)
        self._say(best)

    def _cost(self, state: State) -> tuple[int, float]:
        """Of one token for each K; first of all how many K have no plan."""
        shape = len(state.codes), self._layer.dimension, 1, state.codes.reduction.width
        plans = state.plans.values()
        return (
            sum(not plan.candidates for plan in plans),
            sum(COSTS.of_first_pass(*shape, plan.candidates) for plan in plans),
        )

    def _say(self, state: State) -> None:
        for k, plan in state.plans.items():
            log.info(
                "K = %d among %d keys: %s; of %d tokens' nearest keys %.3f were found, of all K %.3f",
                *(k, len(state.codes)),
                f"{state.codes.reduction.width} numbers a key, {plan.candidates} candidates"
                if plan.candidates
                else "no first pass finds enough, every key is looked at",
                *(plan.tokens, plan.recall_at_1, plan.recall_at_k),
            )

    def _snapshot(self) -> _Snapshot:
        layer = self._layer
        with layer.lock:
            found = np.flatnonzero(np.isfinite(layer.squared_norms.numpy()))
            return _Snapshot(layer.version, found, layer.row_versions.copy())

    def _plans(self, tried: Sequence[Codes]) -> list[dict[int, Plan]]:
        _require_program()
        return measure(self._layer, tried, sorted(self._wanted), self._asked.tokens())


def attach(layer: LayerReplica, choice: str = "auto") -> None:
    """Gives a layer on the CPU a first pass (one of CHOICES); elsewhere every row is scanned, which is fast there."""
    if layer.device.type == "cpu" and require_choice(choice) != "exact":
        layer.first_pass = CodedFirstPass(layer, choice)


def require_choice(choice: str) -> str:
    """One of CHOICES. Raises BadInput for another."""
    if choice not in CHOICES:
        raise BadInput(f"first pass: got {choice!r}, expected one of {', '.join(CHOICES)}")
    return choice


@cache
def _has_faiss() -> bool:
    if search.faiss() is None:
        log.warning(
            "FAISS is not installed: lookups in the replica look at every key, which takes longer the more there are "
            "(pip install faiss-cpu)"
        )
    return search.faiss() is not None
