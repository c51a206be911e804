"""The policy that asks a routing memory: what the router hooks call at every MoE layer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import torch
from knnmoe.client import ExampleRef
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.router_hooks import Logits, RouterCall


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What a memory says about T tokens of one layer. Padding is not looked up, and keeps its own routing.

    Attributes:
        lambdas: f32 [T], the weight of the memory; 0 for a token that abstained or was not looked up.
        abstained: bool [T]; False for a token that was not looked up.
        blended: [T, ...] of the memory's kind; None when the own routing of all tokens stands.
        counts: f64 [4], on the device of the answer: tokens looked up, those of them that abstained, tokens left out
            since their router input or logits are not finite, and the sum of lambda. None: all T were looked up.

    """

    lambdas: Tensor
    abstained: Tensor
    blended: Assignment | Logits | None
    counts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class FellBack:
    """A lookup that gave nothing: the model's own router stands.

    Attributes:
        reason: a word to count by, e.g. `deadline`, `unavailable`, `breaker_open`, `memory_not_found`, `not_finite`.

    """

    reason: str


@dataclass(frozen=True, slots=True)
class Lookups:
    """How often a memory was asked, and how often the model's own router stood because it gave no answer.

    Attributes:
        total: all lookups; a forward pass makes one at each layer.
        fell_back: of these, by reason.

    """

    total: int
    fell_back: Mapping[str, int]

    def __str__(self) -> str:
        if not self.fell_back:
            return f"none of {self.total}"
        reasons = ", ".join(
            f"{number} {reason}" for reason, number in sorted(self.fell_back.items())
        )
        return f"{sum(self.fell_back.values())} of {self.total} ({reasons})"


class Retriever(Protocol):
    """Where a memory's answers come from: a sidecar (RouterClient), a replica beside the model (ReplicaRetriever).

    A policy that several threads use asks from all of them. One beside the model has `width`, as router_hooks.Policy.
    """

    def lookup(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        *,
        valid: Tensor | None = None,
        exclude: Sequence[ExampleRef] = (),
    ) -> Retrieved | FellBack | None:
        """T tokens: router_input [T, d], logits [T, N], own assignment [T, k]; None: it fell back, without a reason.

        valid: bool [T], False on padding, which may hold anything; None: all valid. exclude: none, or one example per
        sequence, in the order of the tokens, whose entries are not read (T is a multiple of their number).
        """
        ...


@dataclass(slots=True)
class LayerUse:
    """What a memory did at one layer. Numbers of tokens lie where the lookups were made until they are read.

    Attributes:
        lookups: all, with those that fell back.
        fell_back: lookups, by reason; `not_finite`: not asked, since a router input or logit was not finite.
        counts: as in Retrieved, of all lookups that gave an answer; None before the first.

    """

    lookups: int = 0
    fell_back: Counter[str] = field(default_factory=Counter)
    counts: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the memory answered for."""
        return int(self._read()[0])

    @property
    def abstained(self) -> int:
        """Of these, the ones that kept their own routing."""
        return int(self._read()[1])

    @property
    def lambda_sum(self) -> float:
        """Lambda summed over the tokens."""
        return self._read()[3]

    @property
    def not_finite(self) -> int:
        """What was left out since a router input or logit was not finite: lookups in a sidecar, tokens in a replica."""
        return self.fell_back["not_finite"] + int(self._read()[2])

    @property
    def lambda_mean(self) -> float:
        """Mean lambda; 0 before the first token."""
        tokens, _, _, lambda_sum = self._read()
        return lambda_sum / max(1.0, tokens)

    def copy(self) -> LayerUse:
        """What was counted so far; numbers of tokens stay where they are."""
        counts = None if self.counts is None else self.counts.clone()
        return LayerUse(self.lookups, self.fell_back.copy(), counts)

    def count(self, found: Retrieved | FellBack) -> None:
        """Counts one lookup."""
        self.lookups += 1
        if isinstance(found, FellBack):
            self.fell_back[found.reason] += 1
            return
        counts = _counts(found) if found.counts is None else found.counts
        if self.counts is None:
            self.counts = counts.clone()
        else:
            self.counts += counts

    def _read(self) -> list[float]:
        return [0.0] * 4 if self.counts is None else self.counts.tolist()


def _counts(found: Retrieved) -> Tensor:
    """Retrieved.counts of an answer for which every token was looked up."""
    numbers = [len(found.lambdas), int(found.abstained.sum()), 0, float(found.lambdas.sum())]
    return torch.tensor(numbers, dtype=torch.float64)


Refs = tuple[ExampleRef, ...]


def _no_refs() -> ContextVar[Refs]:
    return ContextVar("excluded", default=())


@dataclass(slots=True)
class RetrievalPolicy:
    """Blends each layer's routing with the memory behind a retriever. Threads may share it.

    Attributes:
        client: the retriever; says what happens when it fails.
        use: by layer, over all threads.
        routed: see router_hooks.Policy.

    """

    client: Retriever
    use: dict[int, LayerUse] = field(default_factory=dict)
    routed: Callable[[RouterCall, Assignment], None] | None = None
    _exclude: ContextVar[Refs] = field(
        default_factory=_no_refs, init=False, repr=False, compare=False
    )
    _lock: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    @contextmanager
    def excluding(self, examples: Sequence[ExampleRef]) -> Iterator[None]:
        """Within it, this thread's (or asyncio task's) forward passes read no entry of `examples`.

        One per sequence of the batch, in its order: leave-one-example-out. Other threads are not affected, nor are
        those of a pool that the block hands work to, unless the context goes along, as with asyncio.to_thread.
        """
        token = self._exclude.set(tuple(examples))
        try:
            yield
        finally:
            self._exclude.reset(token)

    @property
    def lookups(self) -> Lookups:
        """Lookups since the policy was made, over all layers and threads, and those that fell back by reason."""
        fell_back = Counter[str]()
        with self._lock:
            for use in self.use.values():
                fell_back += use.fell_back
            return Lookups(sum(use.lookups for use in self.use.values()), fell_back)

    def use_now(self) -> dict[int, LayerUse]:
        """A copy of `use` at one moment, whatever other threads look up meanwhile."""
        with self._lock:
            return {layer: use.copy() for layer, use in self.use.items()}

    def width(self, top_k: int) -> int | None:
        """Experts per token of every assignment; None when the retriever does not know: see router_hooks.Policy."""
        of_retriever = getattr(self.client, "width", None)
        return None if of_retriever is None else of_retriever(top_k)

    def __call__(self, call: RouterCall) -> Assignment | Logits | None:
        """The blended routing, or None when the model's own stands."""
        found = self.client.lookup(
            call.site.layer,
            call.router_input,
            call.router_logits,
            Assignment(call.weights, call.experts),
            valid=call.valid,
            exclude=self._excluded(call),
        )
        if found is None:
            found = FellBack("no_answer")
        with self._lock:
            use = self.use.get(call.site.layer)
            if use is None:
                use = self.use[call.site.layer] = LayerUse()
            use.count(found)
        return None if isinstance(found, FellBack) else found.blended

    def _excluded(self, call: RouterCall) -> Refs:
        exclude = self._exclude.get()
        if exclude and len(call.router_input) % len(exclude):
            raise BadInput(
                f"excluding: got {len(exclude)} examples for {len(call.router_input)} tokens, "
                "expected one per sequence of the batch"
            )
        return exclude
