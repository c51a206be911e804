"""What a router client asks, and what it makes of the answers, which are written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from knnmoe.client import ExampleRef
from knnmoe.fingerprint import ModelFingerprint
from torch import Tensor

from model_runner import router_client
from model_runner.architectures import Assignment
from model_runner.cli import options
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import Logits
from model_runner.routing_policy import FellBack, Lookups, Retrieved

FINGERPRINT = ModelFingerprint("tiny", 1, 2, 3, 1, "5eed" * 16)


@pytest.mark.parametrize("on_error", OnError)
def test_names_of_what_a_failure_does(on_error: OnError) -> None:
    with RouterClient("127.0.0.1:1", "law", FINGERPRINT, on_error=str(on_error)) as client:
        assert client.on_error is on_error


def test_the_option_has_the_same_names() -> None:
    assert get_args(options.OnError) == tuple(OnError)


@pytest.mark.parametrize("on_error", ["RAISE", "ignore", "", None, 1])
def test_other_names(on_error: object) -> None:
    expected = f"on_error: got {on_error!r}, expected 'fall_back' or 'raise'"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        RouterClient("127.0.0.1:1", "law", FINGERPRINT, on_error=on_error)


TOKENS, HIDDEN, EXPERTS, TOP_K = 6, 32, 8, 2
VALID = [False, True, True, False, False, True]
A, B = ExampleRef("s", "a"), ExampleRef("s", "b")


@dataclass(frozen=True)
class Message:
    inputs: Tensor
    logits: Tensor
    own: Assignment
    exclude: Sequence[ExampleRef]


Answer = Callable[[Message], Retrieved | FellBack]


class CannedClient(RouterClient):
    """Sends nothing: every message is answered by a function."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("127.0.0.1:1", "law", FINGERPRINT)
        self.answer, self.sent = answer, list[Message]()

    def _ask(
        self, layer: int, asked: object, exclude: Sequence[ExampleRef], note: object
    ) -> Retrieved | FellBack:
        self.sent.append(Message(asked.inputs, asked.logits, asked.own, exclude))
        return self.answer(self.sent[-1])


@dataclass(frozen=True)
class Tokens:
    router_input: Tensor
    router_logits: Tensor
    own: Assignment

    def looked_up(
        self, client: RouterClient, valid: Tensor | None = None, exclude: Sequence[ExampleRef] = ()
    ) -> Retrieved | FellBack:
        question = (0, self.router_input, self.router_logits, self.own)
        return client.lookup(*question, valid=valid, exclude=exclude)


def tokens_of(tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, EXPERTS, generator=generator).to(dtype)
    weights, experts = logits.float().softmax(-1).topk(TOP_K)
    inputs = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    return Tokens(inputs, logits, Assignment(weights.to(dtype), experts))


def halved_logits(asked: Message) -> Retrieved:
    return replace(abstains(asked, 0.5, False), blended=Logits(asked.logits / 2))


def abstains(asked: Message, lambdas: float = 0.0, abstained: bool = True) -> Retrieved:
    tokens = len(asked.inputs)
    return Retrieved(torch.full((tokens,), lambdas), torch.full((tokens,), abstained), None)


def beside_expert_7(asked: Message) -> Retrieved:
    """The own assignment at half weight, and expert 7 with the rest: width k + 1."""
    own = asked.own
    blended = Assignment(
        torch.cat([own.weights / 2, own.weights.sum(-1, keepdim=True) / 2], -1),
        torch.cat([own.experts, torch.full((len(own.experts), 1), 7)], -1),
    )
    return replace(abstains(asked, 0.5, False), blended=blended)


def dense(assignment: Assignment) -> Tensor:
    empty = torch.zeros(len(assignment.experts), EXPERTS)
    return empty.scatter_add(1, assignment.experts, assignment.weights.float())


@pytest.fixture
def ask() -> Iterator[Callable[[Answer], CannedClient]]:
    clients: list[CannedClient] = []

    def made(answer: Answer) -> CannedClient:
        clients.append(CannedClient(answer))
        return clients[-1]

    yield made
    for client in clients:
        client.close()


Ask = Callable[[Answer], CannedClient]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_not_sent_and_keeps_its_logits(ask: Ask, dtype: torch.dtype) -> None:
    client, tokens, valid = ask(halved_logits), tokens_of(dtype=dtype), torch.tensor(VALID)
    found = tokens.looked_up(client, valid)
    assert torch.equal(client.sent[0].inputs, tokens.router_input[valid])
    logits = tokens.router_logits
    assert torch.equal(found.blended.router_logits[valid], logits[valid] / 2)
    assert torch.equal(found.blended.router_logits[~valid], logits[~valid])
    assert torch.equal(found.lambdas, valid / 2)
    assert found.counts.tolist() == [3, 0, 0, 1.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_keeps_its_assignment_at_any_width(ask: Ask, dtype: torch.dtype) -> None:
    tokens, valid = tokens_of(dtype=dtype), torch.tensor(VALID)
    blended = tokens.looked_up(ask(beside_expert_7), valid).blended
    assert blended.experts.shape == blended.weights.shape == (TOKENS, TOP_K + 1)
    assert 0 <= int(blended.experts.min()) <= int(blended.experts.max()) < EXPERTS
    assert torch.equal(dense(blended)[~valid], dense(tokens.own)[~valid])
    assert not torch.equal(dense(blended)[valid], dense(tokens.own)[valid])


def test_all_padding_sends_nothing(ask: Ask) -> None:
    client = ask(halved_logits)
    found = tokens_of().looked_up(client, torch.tensor([False] * TOKENS))
    assert found.blended is None
    assert found.counts.tolist() == [0, 0, 0, 0]
    assert client.sent == []


@pytest.mark.parametrize("where", ["router_input", "router_logits"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_sent(ask: Ask, where: str, value: float) -> None:
    client, tokens = ask(halved_logits), tokens_of()
    getattr(tokens, where)[3, 1] = value
    assert tokens.looked_up(client) == FellBack("not_finite")
    assert client.sent == []
    assert client.lookups == Lookups(1, {"not_finite": 1})


def test_padding_may_hold_anything(ask: Ask) -> None:
    tokens, valid = tokens_of(), torch.tensor(VALID)
    tokens.router_input[~valid] = torch.nan
    assert isinstance(tokens.looked_up(ask(halved_logits), valid).blended, Logits)


def test_examples_left_out_are_named_token_by_token(ask: Ask) -> None:
    client, tokens = ask(abstains), tokens_of()
    tokens.looked_up(client, exclude=[A, B])
    tokens.looked_up(client, torch.tensor(VALID), [A, B])
    tokens.looked_up(client)
    named = [list(message.exclude) for message in client.sent]
    assert named == [[A, A, A, B, B, B], [A, A, B], []]


@pytest.mark.parametrize("valid", [None, VALID * 2])
@pytest.mark.parametrize("answer", [halved_logits, beside_expert_7])
def test_many_tokens_go_in_parts(
    monkeypatch: pytest.MonkeyPatch, ask: Ask, answer: Answer, valid: list[bool] | None
) -> None:
    tokens, mask = tokens_of(12), None if valid is None else torch.tensor(valid)
    uncut = ask(answer)
    at_once = tokens.looked_up(uncut, mask, [A, B])
    monkeypatch.setattr(router_client, "MAX_REQUEST_BYTES", 4 * (HIDDEN + EXPERTS) * 5)
    client = ask(answer)
    in_parts = tokens.looked_up(client, mask, [A, B])
    expected = [5, 5, 2] if valid is None else [5, 1]
    assert [len(message.inputs) for message in client.sent] == expected
    named = [ref for message in client.sent for ref in message.exclude]
    assert named == list(uncut.sent[0].exclude)
    assert in_parts.counts.tolist() == [sum(expected), 0, 0, sum(expected) / 2]
    assert client.lookups.total == 1
    if isinstance(at_once.blended, Logits):
        assert torch.equal(in_parts.blended.router_logits, at_once.blended.router_logits)
    else:
        assert torch.equal(dense(in_parts.blended), dense(at_once.blended))


def test_a_part_without_an_answer_leaves_the_whole_lookup_without_one(
    monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    monkeypatch.setattr(router_client, "MAX_REQUEST_BYTES", 4 * (HIDDEN + EXPERTS) * 4)
    replies = iter([halved_logits, lambda asked: FellBack("deadline")])
    client = ask(lambda asked: next(replies)(asked))
    assert tokens_of().looked_up(client) == FellBack("deadline")


def test_a_part_that_abstains_keeps_its_own_routing(
    monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    monkeypatch.setattr(router_client, "MAX_REQUEST_BYTES", 4 * (HIDDEN + EXPERTS) * 4)
    tokens, replies = tokens_of(), iter([abstains, beside_expert_7])
    found = tokens.looked_up(ask(lambda asked: next(replies)(asked)))
    assert torch.equal(dense(found.blended)[:4], dense(tokens.own)[:4])
    assert not torch.equal(dense(found.blended)[4:], dense(tokens.own)[4:])
    assert found.abstained.tolist() == [True] * 4 + [False] * 2
