"""A copy that nobody follows: what it holds, and read with other settings."""

from __future__ import annotations

import torch
from knnmoe.client import ExampleRef
from knnmoe.v1.types_pb2 import MEMORY_KIND_LOGIT_DELTA, MemorySettings

from model_runner.architectures.families import Assignment
from model_runner.replica.held import HeldMemory, policy_of
from model_runner.router_hooks import Logits

SETTINGS = MemorySettings(
    kind=MEMORY_KIND_LOGIT_DELTA, neighbours=1, gamma=[1.0], step_size=[1.0, 2.0], null_weight=0.0
)
KEYS, DELTAS = torch.eye(3), torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
REFS = [ExampleRef("text", name) for name in "abb"]


def blended(memory: HeldMemory, layer: int, *exclude: ExampleRef) -> torch.Tensor:
    policy = policy_of(memory, num_experts=2)
    own = Assignment(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long))
    found = policy.client.lookup(layer, KEYS[:1], torch.zeros(1, 2), own, exclude=exclude)
    assert isinstance(found.blended, Logits)
    return found.blended.router_logits[0]


def test_it_answers_and_leaves_examples_out() -> None:
    memory = HeldMemory.of([KEYS, KEYS], [DELTAS, DELTAS], [REFS, REFS], SETTINGS)
    torch.testing.assert_close(blended(memory, 0), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(blended(memory, 1), torch.tensor([2.0, 0.0]))
    others = blended(memory, 0, REFS[0])
    assert others.tolist() in ([0.0, 1.0], [5.0, 5.0])


def test_read_with_other_settings_the_first_stay() -> None:
    memory = HeldMemory.of([KEYS, KEYS], [DELTAS, DELTAS], [REFS, REFS], SETTINGS)
    other = memory.read_with(MemorySettings(null_weight=1.0, step_size=[4.0]))
    torch.testing.assert_close(blended(other, 1), torch.tensor([2.0, 0.0]))
    assert list(other.settings.gamma) == [1.0]
    assert list(memory.settings.step_size) == [1.0, 2.0]
