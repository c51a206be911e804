"""What the policy asks of a client and makes of its replies; the client's replies are written by hand."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
from knnmoe.client import ExampleRef
from torch import Tensor

from model_runner.architectures import Assignment, RouterSite, find_router_sites
from model_runner.errors import BadInput
from model_runner.router_hooks import Logits, RouterCall
from model_runner.routing_policy import FellBack, Lookups, RetrievalPolicy, Retrieved
from tests.families import shared_model

TOKENS, HIDDEN, EXPERTS, TOP_K = 6, 32, 8, 2
VALID = [False, True, True, False, False, True]


@dataclass(frozen=True)
class Asked:
    """One lookup."""

    layer: int
    router_input: Tensor
    router_logits: Tensor
    own: Assignment
    valid: Tensor | None
    exclude: Sequence[ExampleRef]


@dataclass
class CannedClient:
    """Answers by a function of the question; None or FellBack as a client whose sidecar is gone."""

    answer: Callable[[Asked], Retrieved | FellBack | None]
    asked: list[Asked] = field(default_factory=list)

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
        self.asked.append(Asked(layer, router_input, router_logits, own, valid, exclude))
        return self.answer(self.asked[-1])


def site(layer: int = 0) -> RouterSite:
    return find_router_sites(shared_model("olmoe"))[layer]


def call_of(
    valid: list[bool] | None = None, tokens: int = TOKENS, dtype: torch.dtype = torch.float32
) -> RouterCall:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, EXPERTS, generator=generator).to(dtype)
    weights, experts = logits.float().softmax(-1).topk(TOP_K)
    return RouterCall(
        site=site(),
        router_input=torch.randn(tokens, HIDDEN, generator=generator).to(dtype),
        router_logits=logits,
        weights=weights.to(dtype),
        experts=experts,
        batch_shape=(2, tokens // 2),
        valid=None if valid is None else torch.tensor(valid),
    )


def response(tokens: int, lambdas: float = 0.5, abstained: bool = False) -> Retrieved:
    return Retrieved(torch.full((tokens,), lambdas), torch.full((tokens,), abstained), None)


def abstains(asked: Asked) -> Retrieved:
    return response(len(asked.router_input), 0.0, abstained=True)


def halved_logits(asked: Asked) -> Retrieved:
    return replace(response(len(asked.router_input)), blended=Logits(asked.router_logits / 2))


def beside_expert_7(asked: Asked) -> Retrieved:
    """The own assignment at half weight, and expert 7 with the rest: width k + 1."""
    own = asked.own
    blended = Assignment(
        torch.cat([own.weights / 2, own.weights.sum(-1, keepdim=True) / 2], -1),
        torch.cat([own.experts, torch.full((len(own.experts), 1), 7)], -1),
    )
    return replace(response(len(own.experts)), blended=blended)


def test_asks_what_the_router_saw() -> None:
    client, call = CannedClient(abstains), call_of(VALID)
    RetrievalPolicy(client)(replace(call, site=site(2)))
    (asked,) = client.asked
    assert asked.layer == 2
    assert torch.equal(asked.router_input, call.router_input)
    assert torch.equal(asked.router_logits, call.router_logits)
    assert torch.equal(asked.own.weights, call.weights)
    assert torch.equal(asked.own.experts, call.experts)
    assert asked.valid is call.valid
    assert list(asked.exclude) == []


def test_replies_are_handed_on() -> None:
    call = call_of()
    logits = RetrievalPolicy(CannedClient(halved_logits))(call)
    assert isinstance(logits, Logits)
    assert torch.equal(logits.router_logits, call.router_logits / 2)
    blended = RetrievalPolicy(CannedClient(beside_expert_7))(call)
    assert isinstance(blended, Assignment)
    assert blended.experts.shape == blended.weights.shape == (TOKENS, TOP_K + 1)
    torch.testing.assert_close(blended.weights.sum(-1), call.weights.sum(-1))


@pytest.mark.parametrize(
    "answer",
    [abstains, lambda asked: FellBack("deadline"), lambda asked: None],
    ids=["abstains", "late", "gone"],
)
def test_without_a_reply_the_own_router_stands(
    answer: Callable[[Asked], Retrieved | None],
) -> None:
    assert RetrievalPolicy(CannedClient(answer))(call_of()) is None


def test_counts_by_layer() -> None:
    def half_abstain(asked: Asked) -> Retrieved:
        lambdas = torch.linspace(0, 1, len(asked.router_input))
        return replace(halved_logits(asked), lambdas=lambdas, abstained=lambdas < 0.5)

    policy = RetrievalPolicy(CannedClient(half_abstain))
    for layer, calls in ((0, 2), (3, 1)):
        for _ in range(calls):
            policy(replace(call_of(), site=site(layer)))
    assert {layer: (use.tokens, use.abstained) for layer, use in policy.use.items()} == {
        0: (12, 6),
        3: (6, 3),
    }
    assert policy.use[0].lambda_mean == pytest.approx(0.5)


def test_nothing_is_counted_when_the_sidecar_is_gone() -> None:
    policy = RetrievalPolicy(CannedClient(lambda asked: None))
    policy(call_of())
    assert (policy.use[0].tokens, policy.use[0].lambda_mean) == (0, 0.0)


A, B = ExampleRef("s", "a"), ExampleRef("s", "b")


def test_excluded_examples_are_named_sequence_by_sequence() -> None:
    client = CannedClient(abstains)
    policy = RetrievalPolicy(client)
    with policy.excluding([A, B]):
        policy(call_of())
        policy(call_of(VALID))
        with policy.excluding([B, A]):
            policy(call_of())
        policy(call_of())
    policy(call_of())
    named = [list(asked.exclude) for asked in client.asked]
    assert named == [[A, B], [A, B], [B, A], [A, B], []]


def test_excluded_examples_must_be_one_per_sequence() -> None:
    policy = RetrievalPolicy(CannedClient(abstains))
    with (
        policy.excluding([A, B, A, B]),
        pytest.raises(BadInput, match="4 examples for 6 tokens"),
    ):
        policy(call_of())


def test_another_threads_exclusions_are_not_applied() -> None:
    client = CannedClient(abstains)
    policy, other = RetrievalPolicy(client), RetrievalPolicy(client)
    with policy.excluding([A]):
        other(call_of())
        with ThreadPoolExecutor(1) as pool:
            pool.submit(policy, call_of()).result()

            def with_b() -> None:
                with policy.excluding([B]):
                    policy(call_of())

            pool.submit(with_b).result()
        policy(call_of())
    named = [list(asked.exclude) for asked in client.asked]
    assert named == [[], [], [B], [A]]


def test_exclusions_go_along_with_an_asyncio_task() -> None:
    """And with asyncio.to_thread, as web servers call a model; other tasks of the same thread have their own."""
    client = CannedClient(abstains)
    policy = RetrievalPolicy(client)

    async def request(ref: ExampleRef, together: asyncio.Barrier) -> None:
        with policy.excluding([ref]):
            await together.wait()
            await asyncio.to_thread(policy, call_of())

    async def serve() -> None:
        together = asyncio.Barrier(2)
        await asyncio.gather(request(A, together), request(B, together))

    asyncio.run(serve())
    named = [set(asked.exclude) for asked in client.asked]
    assert sorted(named, key=repr) == [{A}, {B}]


def test_counts_of_many_threads_are_those_of_one() -> None:
    """With a switch of threads wherever one is possible."""

    def every_other(asked: Asked) -> Retrieved | FellBack:
        return FellBack("late") if asked.layer else response(len(asked.router_input))

    policy, calls, threads = RetrievalPolicy(CannedClient(every_other)), 200, 8
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for layer in (0, 1):
                call = replace(call_of(), site=site(layer))
                list(pool.map(policy, [call] * calls))
    finally:
        sys.setswitchinterval(before_s)
    use = policy.use[0]
    assert (use.tokens, use.lookups, use.lambda_mean) == (calls * TOKENS, calls, 0.5)
    assert policy.use[1].fell_back == {"late": calls}
    assert policy.lookups == Lookups(2 * calls, {"late": calls})


def test_lookups_in_words() -> None:
    assert str(Lookups(592, {})) == "none of 592"
    assert str(Lookups(592, {"deadline": 20, "breaker_open": 11})) == (
        "31 of 592 (11 breaker_open, 20 deadline)"
    )


def test_lookups_are_counted_by_reason() -> None:
    replies = iter([halved_logits, lambda _: FellBack("deadline"), lambda _: None])
    policy = RetrievalPolicy(CannedClient(lambda asked: next(replies)(asked)))
    for _ in range(3):
        policy(call_of())
    assert policy.lookups == Lookups(3, {"deadline": 1, "no_answer": 1})


def test_tokens_that_were_not_looked_up_do_not_count() -> None:
    counts = torch.tensor([3.0, 1.0, 2.0, 0.75], dtype=torch.float64)
    policy = RetrievalPolicy(
        CannedClient(lambda asked: replace(halved_logits(asked), counts=counts))
    )
    for _ in range(2):
        policy(call_of())
    use = policy.use[0]
    assert (use.tokens, use.abstained, use.lambda_sum, use.not_finite) == (6, 2, 1.5, 4)
    assert (use.lambda_mean, use.lookups) == (0.25, 2)
    assert counts.tolist() == [3.0, 1.0, 2.0, 0.75]
