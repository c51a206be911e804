"""The policy that asks a routing memory: what the router hooks call at every MoE layer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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

# The one place where the runner cuts a lookup: tokens beyond this many bytes of router inputs and logits go in another
# request. A quarter of channels.MAX_MESSAGE_BYTES: the rest is for examples to exclude, the own assignment and a reply
# as large as the request, and for a service whose limit is set lower.
MAX_REQUEST_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What a memory says about T tokens of one layer.

    Attributes:
        lambdas: f32 [T], the weight of the memory; 0 for a token that abstained.
        abstained: bool [T].
        blended: [T, ...] of the memory's kind; None when every token abstained.

    """

    lambdas: Tensor
    abstained: Tensor
    blended: Assignment | Logits | None


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
        total: all lookups; a forward pass makes one at each layer, more where its tokens do not go in one message.
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
    """Where a memory's answers come from: a sidecar (RouterClient), or anything that answers as one.

    A policy that several threads use asks from all of them.
    """

    def lookup(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        *,
        exclude: Sequence[ExampleRef] = (),
    ) -> Retrieved | FellBack | None:
        """T tokens: router_input [T, d], logits [T, N], own assignment [T, k]; None: it fell back, without a reason.

        `exclude`: none, or one example per token whose entries are not read.
        """
        ...


@dataclass(slots=True)
class LayerUse:
    """What a memory did at one layer: tokens that it answered for, those that abstained, lambda summed over the tokens.

    Attributes:
        lookups: all, with those that fell back.
        fell_back: by reason; `not_finite`: not asked, since a router input or logit was not finite.

    """

    tokens: int = 0
    abstained: int = 0
    lambda_sum: float = 0.0
    lookups: int = 0
    fell_back: Counter[str] = field(default_factory=Counter)

    @property
    def not_finite(self) -> int:
        """Calls that were not asked about: a router input or logit was not finite."""
        return self.fell_back["not_finite"]

    @property
    def lambda_mean(self) -> float:
        """Mean lambda; 0 before the first token."""
        return self.lambda_sum / max(1, self.tokens)

    def count(self, found: Retrieved) -> None:
        """Counts the tokens of an answer that is used."""
        self.tokens += len(found.lambdas)
        self.abstained += int(found.abstained.count_nonzero())
        self.lambda_sum += float(found.lambdas.sum())

    def add(self, other: LayerUse) -> None:
        """Counts what `other` counted."""
        self.tokens += other.tokens
        self.abstained += other.abstained
        self.lambda_sum += other.lambda_sum
        self.lookups += other.lookups
        self.fell_back += other.fell_back


Refs = tuple[ExampleRef, ...]


def _no_refs() -> ContextVar[Refs]:
    return ContextVar("excluded", default=())


@dataclass(slots=True)
class RetrievalPolicy:
    """Blends each layer's routing with the memory behind a retriever. Threads may share it.

    Attributes:
        client: the retriever; says what happens when it fails.
        use: by layer, over all threads.

    """

    client: Retriever
    use: dict[int, LayerUse] = field(default_factory=dict)
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

    def __call__(self, call: RouterCall) -> Assignment | Logits | None:
        """The blended routing, or None when the model's own stands."""
        answers: list[Answer] = []
        counted = LayerUse()
        try:
            for rows in _rows_to_ask(call):  # padding is left out, and may hold anything
                counted.lookups += 1
                found = self._ask(call, rows)
                if isinstance(found, FellBack):
                    counted.fell_back[found.reason] += 1
                    return None
                answers.append((rows, found))
            for _, found in answers:
                counted.count(found)
        finally:
            with self._lock:
                self.use.setdefault(call.site.layer, LayerUse()).add(counted)
        return _reply(answers, call)

    def _ask(self, call: RouterCall, rows: Tensor | None) -> Retrieved | FellBack:
        inputs, logits, own = _select(call, rows)
        if not (torch.isfinite(inputs).all() and torch.isfinite(logits).all()):
            return FellBack("not_finite")
        exclude = self._excluded(call, rows)
        found = self.client.lookup(call.site.layer, inputs, logits, own, exclude=exclude)
        return FellBack("no_answer") if found is None else found

    def _excluded(self, call: RouterCall, rows: Tensor | None) -> list[ExampleRef]:
        exclude = self._exclude.get()
        if not exclude:
            return []
        tokens_each, left_over = divmod(len(call.router_input), len(exclude))
        if left_over:
            raise BadInput(
                f"excluding: got {len(exclude)} examples for {len(call.router_input)} tokens, "
                "expected one per sequence of the batch"
            )
        every = [ref for ref in exclude for _ in range(tokens_each)]
        return every if rows is None else [every[row] for row in rows.tolist()]


# Rows [n] of a call (None = all of them), and what the memory said about them.
Answer = tuple[Tensor | None, Retrieved]


def _rows_to_ask(call: RouterCall) -> Sequence[Tensor | None]:
    """Row numbers [n] int64 that are not padding, a tensor per request; None = all rows, which needs no copy."""
    most = tokens_per_request(call.router_input, call.router_logits)
    if call.valid is not None and not bool(call.valid.all()):
        valid = call.valid.nonzero().flatten()
        return torch.split(valid, most) if len(valid) else ()
    tokens = len(call.router_input)
    if tokens <= most:
        return [None]
    return torch.split(torch.arange(tokens, device=call.router_input.device), most)


def tokens_per_request(router_input: Tensor, router_logits: Tensor) -> int:
    """Tokens [T, d] and logits [T, N] that go in one request: as many as MAX_REQUEST_BYTES hold, one at least."""
    token_bytes = sum(t.shape[1] * t.element_size() for t in (router_input, router_logits))
    return max(1, MAX_REQUEST_BYTES // token_bytes)


def _select(call: RouterCall, rows: Tensor | None) -> tuple[Tensor, Tensor, Assignment]:
    own = Assignment(call.weights, call.experts)
    if rows is None:
        return call.router_input, call.router_logits, own
    return (
        call.router_input[rows],
        call.router_logits[rows],
        Assignment(own.weights[rows], own.experts[rows]),
    )


def _reply(answers: Sequence[Answer], call: RouterCall) -> Assignment | Logits | None:
    """The own routing with the answered rows in it; None when every token abstained."""
    reply: Assignment | Logits | None = None
    for rows, found in answers:
        if isinstance(found.blended, Logits):
            own = reply.router_logits if isinstance(reply, Logits) else call.router_logits
            reply = Logits(_merged(own, found.blended.router_logits, rows))
        elif found.blended is not None:
            before = reply if isinstance(reply, Assignment) else None
            reply = _with_rows(before, call, found.blended, rows)
    return reply


def _with_rows(
    before: Assignment | None, call: RouterCall, blended: Assignment, rows: Tensor | None
) -> Assignment:
    own = before or Assignment(call.weights, call.experts)
    width = blended.experts.shape[1]
    return Assignment(
        _merged(_widened(own.weights, width), blended.weights, rows),
        _merged(_widened(own.experts, width), blended.experts, rows),
    )


def _widened(own: Tensor, width: int) -> Tensor:
    """Own columns [T, k] padded to `width` with zeros: expert 0 at weight 0."""
    return torch.nn.functional.pad(own, (0, max(0, width - own.shape[1])))


def _merged(own: Tensor, blended: Tensor, rows: Tensor | None) -> Tensor:
    """`own` with `rows` replaced; on the device of `own`."""
    if rows is None:
        return blended.to(own.device)
    merged = own.clone()
    merged[rows] = blended.to(own)
    return merged
