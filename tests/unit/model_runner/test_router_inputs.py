"""Router inputs of texts under the plain model."""

from __future__ import annotations

import pytest
import torch
from knnmoe.client import ExampleRef

from model_runner.memory_builder.builder import collect_router_inputs
from model_runner.router_hooks import RouterCall, RouterHooks
from model_runner.texts import Window
from tests.families import LONGEST_SUM, prompt, shared_model
from tests.rounding import assert_same_sums


def windows(first_target: int = 1) -> list[Window]:
    ids = prompt(batch=3, length=7)
    return [
        Window(
            ExampleRef("s", str(row)),
            tuple(ids[row, : 7 - row].tolist()),
            tuple(range(first_target, 7 - row)),
            0,
        )
        for row in range(3)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_inputs_of_every_token_with_a_loss(batch_size: int) -> None:
    model = shared_model("olmoe")
    found = collect_router_inputs(model, windows(first_target=3), batch_size=batch_size)
    expected: dict[int, list[torch.Tensor]] = {}

    def see(call: RouterCall) -> None:
        expected.setdefault(call.site.layer, []).append(call.router_input[2:-1])

    for window in windows():
        with torch.no_grad(), RouterHooks(model, see):
            model(input_ids=torch.tensor([window.token_ids]))
    assert sorted(found) == [0, 1, 2, 3]
    for layer, rows in found.items():
        one_by_one = torch.cat(expected[layer])
        assert_same_sums(rows, one_by_one, length=LONGEST_SUM, layers=layer + 1)


def test_no_more_inputs_than_asked_for_spread_over_the_text() -> None:
    every = collect_router_inputs(shared_model("olmoe"), windows())
    some = collect_router_inputs(shared_model("olmoe"), windows(), most=6)
    for layer, rows in some.items():
        assert 3 < len(rows) <= 6
        assert torch.equal(rows, every[layer][:: -(-len(every[layer]) // 6)])
