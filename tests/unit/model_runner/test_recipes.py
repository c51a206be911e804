"""From gradients to values: lengths and directions of steps, and assignments by the family's own code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from knnmoe.client import ExampleRef
from torch import Tensor, nn

from model_runner.architectures import Assignment
from model_runner.errors import BadInput
from model_runner.memory_builder.objective import LayerTrace, router_gradients
from model_runner.memory_builder.recipes import (
    CONTROLS,
    PAPER,
    PAPER_V2,
    RECOMMENDED,
    Direction,
    Kind,
    Norm,
    Recipe,
    Values,
    entry_values,
    step,
)
from model_runner.router_hooks import Logits, RouterCall, RouterHooks
from model_runner.texts import Window, make_batch, token_nll
from tests.families import prompt, shared_model

FAMILIES = pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "mixtral"])
GRADIENTS = st.tuples(st.integers(1, 5), st.integers(-9, 12), st.integers(0, 99)).map(
    lambda drawn: (
        torch.randn(drawn[0], 6, generator=torch.Generator().manual_seed(drawn[2]))
        * 10.0 ** drawn[1]
    )
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logit_deltas(norm: Norm, direction: Direction = Direction.DESCENT) -> Recipe:
    return Recipe(Kind.LOGIT_DELTA, norm, step_size=1.0, direction=direction)


def change(gradient: Tensor, recipe: Recipe, median_norm: float = 1.0) -> Tensor:
    return step(gradient, recipe, median_norm, seeded())


def traces_of(model: nn.Module) -> tuple[list[LayerTrace], Tensor]:
    """Traces of a 2 x 6 batch, one row of which is padded; and the row numbers with a loss."""
    ids = prompt()
    windows = [
        Window(
            ExampleRef("s", str(row)),
            tuple(ids[row, : 6 - 2 * row].tolist()),
            tuple(range(1, 6 - 2 * row)),
            0,
        )
        for row in (0, 1)
    ]
    batch = make_batch(windows, torch.device("cpu"))
    traces = router_gradients(
        model,
        batch.input_ids,
        lambda logits: token_nll(logits, batch).sum(),
        attention_mask=batch.attention_mask,
    )
    return traces, batch.predicts.flatten().nonzero().flatten()


@given(GRADIENTS)
def test_a_raw_step_is_the_gradient(gradient: Tensor) -> None:
    assert torch.equal(
        change(gradient, replace(logit_deltas(Norm.RAW), step_size=5.0)), -5.0 * gradient
    )


@given(GRADIENTS)
def test_a_unit_step_has_length_one(gradient: Tensor) -> None:
    lengths = change(gradient, logit_deltas(Norm.UNIT)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@given(GRADIENTS, st.floats(1e-6, 1e6))
def test_a_soft_step_is_bounded_and_grows_with_the_gradient(
    gradient: Tensor, median_norm: float
) -> None:
    norms = gradient.norm(dim=-1)
    lengths = change(gradient, logit_deltas(Norm.SOFT), median_norm).norm(dim=-1)
    torch.testing.assert_close(lengths, 1.5 * norms / (norms + 0.5 * median_norm))
    assert (lengths <= 1.5 * (1 + 1e-6)).all()


def test_a_soft_step_of_median_length_is_a_unit_step() -> None:
    gradient = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(
        change(gradient, logit_deltas(Norm.SOFT), median_norm=5.0),
        change(gradient, logit_deltas(Norm.UNIT)),
    )


@pytest.mark.parametrize("norm", Norm)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("median_norm", [0.0, 1.0])
def test_a_zero_gradient_makes_no_step(
    norm: Norm, direction: Direction, median_norm: float
) -> None:
    made = change(torch.zeros(3, 6), logit_deltas(norm, direction), median_norm)
    assert torch.equal(made.abs(), torch.zeros(3, 6))


@given(GRADIENTS, st.sampled_from(Norm))
def test_ascent_is_minus_descent(gradient: Tensor, norm: Norm) -> None:
    down, up = (
        change(gradient, logit_deltas(norm, direction))
        for direction in (Direction.DESCENT, Direction.ASCENT)
    )
    assert torch.equal(up, -down)


@given(GRADIENTS, st.sampled_from(Norm))
def test_a_random_step_is_as_long_as_the_gradients(gradient: Tensor, norm: Norm) -> None:
    recipe = logit_deltas(norm, Direction.RANDOM)
    drawn, own = change(gradient, recipe), change(gradient, logit_deltas(norm))
    torch.testing.assert_close(drawn.norm(dim=-1), own.norm(dim=-1), rtol=1e-4, atol=0)
    assert torch.equal(drawn, change(gradient, recipe))
    assert not torch.equal(drawn, step(gradient, recipe, 1.0, seeded(1)))


@given(GRADIENTS, st.sampled_from(Norm))
def test_no_direction_is_no_step(gradient: Tensor, norm: Norm) -> None:
    assert not change(gradient, logit_deltas(norm, Direction.NONE)).any()


def test_gradients_of_bf16_make_steps_in_f32() -> None:
    gradient = torch.randn(2, 6, generator=seeded()).bfloat16()
    made = change(gradient, logit_deltas(Norm.UNIT))
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("size", [-1.0, float("inf"), float("nan")])
def test_a_step_size_is_a_number_of_zero_or_more(size: float) -> None:
    with pytest.raises(BadInput, match="step size"):
        Recipe(Kind.ASSIGNMENT, Norm.RAW, step_size=size)


@FAMILIES
def test_an_assignment_without_a_step_is_the_models_own(family: str) -> None:
    model = shared_model(family)
    traces, kept = traces_of(model)
    own: dict[int, Assignment] = {}

    def see(call: RouterCall) -> None:
        own[call.site.layer] = Assignment(call.weights.float()[kept], call.experts[kept])

    ids, mask = prompt().clone(), torch.ones(2, 6, dtype=torch.int64)
    ids[1, 4:], mask[1, 4:] = 0, 0
    with torch.no_grad(), RouterHooks(model, see):
        model(input_ids=ids, attention_mask=mask)
    for trace in traces:
        value = entry_values(trace, replace(PAPER, step_size=0.0), 1.0, kept, seeded())
        assert isinstance(value, Assignment)
        assert torch.equal(value.experts, own[trace.site.layer].experts)
        assert torch.equal(value.weights, own[trace.site.layer].weights)


@FAMILIES
def test_assignments_go_through_the_familys_own_code(family: str) -> None:
    """A policy that moves the live logits as the recipe does gets the experts and weights that are stored."""
    model = shared_model(family)
    traces, kept = traces_of(model)
    for trace in traces:
        value = entry_values(trace, PAPER, 1.0, kept, seeded())
        assert isinstance(value, Assignment)
        change = -PAPER.step_size * trace.gradient.flatten(0, 1)
        moved = trace.router_logits.flatten(0, 1).float() + change
        output = trace.site.family.reassign(
            trace.site, moved, trace.router_args, trace.router_kwargs
        )
        _, weights, experts = trace.site.family.read(output)
        assert torch.equal(value.experts, experts[kept])
        assert torch.equal(value.weights, weights[kept].float())
        assert value.weights.shape == (len(kept), trace.site.top_k)
        assert (value.weights >= 0).all()


def test_logit_deltas_are_the_steps_of_the_kept_tokens() -> None:
    traces, kept = traces_of(shared_model("olmoe"))
    assert len(kept) == 5 + 3
    for trace in traces:
        value = entry_values(trace, RECOMMENDED, 0.3, kept, seeded())
        assert isinstance(value, Tensor)
        expected = step(trace.gradient.flatten(0, 1), RECOMMENDED, 0.3, seeded())
        assert torch.equal(value, expected[kept])
        assert value.isfinite().all()


def test_logits_are_the_stepped_ones_of_the_kept_tokens() -> None:
    traces, kept = traces_of(shared_model("olmoe"))
    for trace in traces:
        value = entry_values(trace, PAPER_V2, 0.3, kept, seeded())
        assert isinstance(value, Logits)
        logits, gradient = trace.router_logits.flatten(0, 1), trace.gradient.flatten(0, 1)
        assert torch.equal(value.router_logits, (logits - PAPER_V2.step_size * gradient)[kept])
        assert value.router_logits.dtype == torch.float32


@pytest.mark.parametrize("recipe", [RECOMMENDED, PAPER, PAPER_V2], ids=lambda recipe: recipe.kind)
def test_shuffled_values_are_the_same_values_at_other_keys(recipe: Recipe) -> None:
    traces, kept = traces_of(shared_model("olmoe"))
    straight = rows_of(entry_values(traces[0], recipe, 1.0, kept, seeded()))
    dealt = rows_of(entry_values(traces[0], replace(recipe, shuffled=True), 1.0, kept, seeded(5)))
    assert sorted(dealt) == sorted(straight)
    assert dealt != straight


def rows_of(values: Values) -> list[list[float]]:
    if isinstance(values, Assignment):
        return torch.cat([values.experts.float(), values.weights], dim=-1).tolist()
    return (values.router_logits if isinstance(values, Logits) else values).tolist()


def test_controls_differ_from_the_paper_in_one_field() -> None:
    fields = {
        name: [f for f in ("direction", "shuffled") if getattr(c, f) != getattr(PAPER, f)]
        for name, c in CONTROLS.items()
    }
    assert fields == {
        "control_eta0": ["direction"],
        "control_random": ["direction"],
        "control_negated": ["direction"],
        "control_shuffled": ["shuffled"],
    }
    assert all(
        replace(c, direction=Direction.DESCENT, shuffled=False) == PAPER for c in CONTROLS.values()
    )
