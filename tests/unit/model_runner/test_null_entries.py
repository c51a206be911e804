"""Where a memory speaks in text that it is not for."""

from __future__ import annotations

import pytest
import torch

from model_runner.architectures import Assignment
from model_runner.errors import BadInput
from model_runner.memory_builder.null_entries import (
    LOOKED_AT,
    changes,
    largest,
    windows_to_look_at,
)
from model_runner.progress import Progress
from model_runner.router_hooks import Logits, RouterCall
from tests.families import shared_model
from tests.unit.model_runner.random_windows import windows_of

QUIET = Progress(quiet=True)


def by_length(call: RouterCall) -> Logits:
    """Moves logits by twice the layer's number, and by the router input's length."""
    logits = call.router_logits.clone()
    logits[:, 0] += 2 * call.site.layer + call.router_input.norm(dim=1)
    return Logits(logits)


def test_changes_are_those_of_windows_one_by_one() -> None:
    model, windows = shared_model("olmoe"), windows_of(3, 9, 5, 2)
    together = changes(model, windows, by_length, QUIET, batch_size=3)
    longest_first = sorted(windows, key=lambda window: -len(window.token_ids))
    alone = [changes(model, [window], by_length, QUIET) for window in longest_first]
    for layer, found in enumerate(together):
        assert len(found) == sum(window.targets for window in windows)  # no padding
        torch.testing.assert_close(found, torch.cat([each[layer] for each in alone]))
        assert (found > 2 * layer).all()


def test_the_model_routes_as_it_does() -> None:
    """Inputs of later layers are those of the plain model, whatever the memory says of the first."""
    model, windows = shared_model("olmoe"), windows_of(6)

    def violent(call: RouterCall) -> Logits:
        moved = by_length(call)
        return Logits(moved.router_logits + 100 * (call.site.layer == 0) * torch.randn(8))

    quiet, loud = (changes(model, windows, each, QUIET) for each in (by_length, violent))
    assert torch.equal(quiet[1], loud[1])
    assert not torch.equal(quiet[0], loud[0])


def test_a_memory_that_says_nothing_changes_nothing() -> None:
    found = changes(shared_model("olmoe"), windows_of(6, 4), lambda call: None, QUIET)
    assert all(not each.any() and len(each) == 8 for each in found)


def test_routings_are_no_changes_of_logits() -> None:
    def replies(call: RouterCall) -> Assignment:
        return Assignment(call.weights, call.experts)

    with pytest.raises(BadInput, match="holds routings, expected logit deltas"):
        changes(shared_model("olmoe"), windows_of(6), replies, QUIET)


@pytest.mark.parametrize(
    ("count", "chosen"),
    [
        (0, []),
        (1, [1]),
        (2, [1, 2]),  # of equal ones the first
        (3, [1, 2, 4]),
        (9, [0, 1, 2, 3, 4]),
    ],
)
def test_the_largest(count: int, chosen: list[int]) -> None:
    moved = torch.tensor([0.0, 3.0, 2.0, 1.0, 2.0])
    assert largest(moved, count).nonzero().flatten().tolist() == chosen


def test_several_tokens_are_looked_at_for_each_entry() -> None:
    windows = windows_of(*[11] * 20)  # of ten tokens with a loss
    assert windows_to_look_at(10, windows) == LOOKED_AT
    assert windows_to_look_at(11, windows) == LOOKED_AT + 1
    assert windows_to_look_at(1, windows) == 1
    assert windows_to_look_at(1000, windows) == 20
