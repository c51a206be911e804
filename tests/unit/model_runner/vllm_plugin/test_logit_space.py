"""Assignments said in logits, and the tokens of a batch by memory."""

from __future__ import annotations

import torch

from model_runner.architectures.families import Assignment
from model_runner.vllm.batch import RequestUse, grouped
from model_runner.vllm.logit_space import as_logits, own_assignment


def test_logits_of_an_assignment_give_it_back() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(50, 16, generator=generator) * 5
    wanted = own_assignment(torch.randn(50, 16, generator=generator) * 5, 4)
    answered = torch.arange(50) % 3 > 0
    logits = as_logits(wanted, own, answered)
    got = own_assignment(logits, 4)
    assert torch.equal(logits[~answered], own[~answered])
    assert torch.equal(got.experts[answered], wanted.experts[answered])
    torch.testing.assert_close(
        got.weights[answered], wanted.weights[answered], rtol=1e-5, atol=1e-7
    )


def test_an_expert_of_weight_0_gets_none() -> None:
    wanted = Assignment(torch.tensor([[0.75, 0.25, 0.0]]), torch.tensor([[5, 1, 3]]))
    logits = as_logits(wanted, torch.ones(1, 8), torch.tensor([True]))
    dense = logits.softmax(-1)
    torch.testing.assert_close(dense[0, [5, 1]], torch.tensor([0.75, 0.25]))
    assert dense[0, [0, 2, 3, 4, 6, 7]].eq(0).all()


def test_tokens_by_memory() -> None:
    law, more_law, code = (RequestUse(name, name) for name in ("law", "law", "code"))
    cpu = torch.device("cpu")
    groups = grouped([law, code, None, more_law], [0, 2, 5, 6, 9], cpu)
    rows = {group.memory: torch.arange(9)[group.rows].tolist() for group in groups}
    assert rows == {"law": [0, 1, 6, 7, 8], "code": [2, 3, 4]}
    assert [group.uses for group in groups] == [(law, more_law), (code,)]
    assert grouped([None, None], [0, 1, 2], cpu) == []
