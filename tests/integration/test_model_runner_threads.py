"""One hooked model, one policy, one retriever, called from 16 threads as web servers do: the answers of one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from knnmoe.client import AdminClient, ExampleRef
from torch import Tensor

from model_runner.architectures import Assignment
from model_runner.memory_builder.recipes import PRESETS
from model_runner.replica.retriever import ReplicaRetriever
from model_runner.router_hooks import Logits, RouterHooks
from model_runner.routing_policy import Lookups, RetrievalPolicy, Retrieved, Retriever
from router_service.memories.settings import Kind, MemorySettings
from tests.integration.runner_parts import (
    FILE_NAME,
    LAYERS,
    REPLY_NAMES,
    SENTENCES,
    build,
    client_of,
    loaded_model,
)
from tests.replicas import random_copy
from tests.sidecar import Sidecar

THREADS, TOKENS = 16, 3
FORWARDS = int(os.environ.get("THREAD_FORWARDS", "24"))  # of each thread
KIND = pytest.mark.parametrize("preset", REPLY_NAMES)


@dataclass(frozen=True)
class Case:
    """One call of the model: two sentences, padded, maybe without their own examples, maybe generating TOKENS."""

    rows: tuple[int, int]
    lengths: tuple[int, int]
    left: bool
    leave_out: bool
    generate: bool

    @property
    def passes(self) -> int:
        return TOKENS if self.generate else 1

    def batch(self) -> dict[str, Tensor]:
        width = max(self.lengths)
        ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width).long()
        for n, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True)):
            where = slice(width - length, None) if self.left else slice(length)
            tokens = loaded_model().tokenizer(SENTENCES[row])["input_ids"][:length]
            ids[n, where], mask[n, where] = torch.tensor(tokens), 1
        return {"input_ids": ids, "attention_mask": mask}

    @torch.no_grad()
    def run(self, policy: RetrievalPolicy) -> Tensor:
        """The logits: of every token, or of the generated ones."""
        refs = [ExampleRef(FILE_NAME, str(row + 1)) for row in self.rows]
        with policy.excluding(refs) if self.leave_out else nullcontext():
            if not self.generate:
                return loaded_model().model(**self.batch()).logits
            settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
            settings |= {"return_dict_in_generate": True, "output_logits": True}
            return torch.stack(loaded_model().model.generate(**self.batch(), **settings).logits)


CASES = [
    Case((n, (n + 3) % len(SENTENCES)), lengths, left, leave_out, generate)
    for n, lengths in enumerate([(5, 9), (9, 9), (12, 4)])
    for left in (True, False)
    for leave_out in (True, False)
    for generate in (False,) * 2 + (True,) * left  # generation needs left padding
]


def jobs_of(thread: int) -> list[int]:
    """Numbers of cases, FORWARDS passes in all, in another order in every thread."""
    numbers: list[int] = []
    left = FORWARDS
    while left:
        number = (thread + (2 * thread + 1) * len(numbers)) % len(CASES)
        if CASES[number].passes <= left:
            left -= CASES[number].passes
            numbers.append(number)
        else:
            numbers.append(plain := next(n for n, case in enumerate(CASES) if not case.generate))
            left -= CASES[plain].passes
    return numbers


def assert_as_one_thread(retriever: Retriever) -> None:
    """No bit of THREADS x FORWARDS passes differs from the same call alone, and no token is counted twice or not."""
    policy = RetrievalPolicy(retriever)
    with one_core_per_call(), RouterHooks(loaded_model().model, policy) as hooks:
        alone, tokens = [], []
        for case in CASES:
            alone.append(case.run(policy))
            tokens.append(policy.use.pop(0).tokens)
        policy.use.clear()
        hooks.hits[:] = [0] * LAYERS

        def work(thread: int) -> list[Case]:
            wrong = []
            for number in jobs_of(thread):
                if not torch.equal(CASES[number].run(policy), alone[number]):
                    wrong.append(CASES[number])
                hooks.assert_complete()
            return wrong

        with ThreadPoolExecutor(THREADS) as pool:
            assert list(pool.map(work, range(THREADS))) == [[]] * THREADS
    assert hooks.hits == [THREADS * FORWARDS] * LAYERS
    assert policy.lookups == Lookups(THREADS * FORWARDS * LAYERS, {})
    expected = sum(tokens[number] for thread in range(THREADS) for number in jobs_of(thread))
    assert [use.tokens for use in policy.use.values()] == [expected] * LAYERS


@contextmanager
def one_core_per_call() -> Iterator[None]:
    """As many calls as threads share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@KIND
def test_a_sidecar(ram_sidecar: Sidecar, name: str, preset: str) -> None:
    build(ram_sidecar.target, name, preset)
    with AdminClient(ram_sidecar.target) as admin:
        admin.calibrate(name, PRESETS[preset].lambda0)
    with client_of(ram_sidecar.target, name) as client:
        assert_as_one_thread(client)
        assert client.lookups.fell_back == {}


class InProcess:
    """Answers by a function of every token and of what is left out, in the thread that asks."""

    def __init__(self, blend: Callable[[Tensor, Tensor, Assignment], Assignment | Logits]) -> None:
        self._blend = blend

    def lookup(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        *,
        valid: Tensor | None = None,
        exclude: Sequence[ExampleRef] = (),
    ) -> Retrieved:
        tokens = len(router_input)
        shift = torch.zeros(tokens, 1)
        for sequence, ref in enumerate(exclude):
            shift.view(len(exclude), -1)[sequence] = float(ref.example) / 8
        blended = self._blend(router_logits + shift * router_input[:, :1], router_input, own)
        lambdas = torch.full((tokens,), 0.5)
        asked = float(tokens if valid is None else valid.sum())
        counts = torch.tensor([asked, 0, 0, asked / 2], dtype=torch.float64)
        return Retrieved(lambdas, lambdas < 0, blended, counts)


def shifted_logits(logits: Tensor, inputs: Tensor, own: Assignment) -> Logits:
    return Logits(logits + inputs[:, : logits.shape[1]])


def test_a_retriever_in_the_process() -> None:
    assert_as_one_thread(InProcess(shifted_logits))


def test_a_replica() -> None:
    """Whose layers count hits in place, from all threads."""
    model = loaded_model().fingerprint
    settings = MemorySettings(kind=Kind.ASSIGNMENT, neighbours=2, gamma=(0.01,))
    sizes = model.num_layers, model.hidden_size, model.num_experts, model.top_k
    copy = random_copy(settings, *sizes, entries=50)
    copy.examples = {ExampleRef(FILE_NAME, str(number)): number for number in range(5)}
    assert_as_one_thread(ReplicaRetriever(copy, model.num_experts))
    assert copy.layers[0].take_counts()[0] == THREADS * FORWARDS + sum(c.passes for c in CASES)
