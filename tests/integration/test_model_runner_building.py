"""What a build writes, again, after a break, and what reading it back does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from knnmoe.client import AdminClient, KindMismatch
from knnmoe.v1.types_pb2 import MemorySettings
from torch import Tensor

from model_runner.errors import BadInput
from model_runner.evaluation.nll import oracle_scores
from model_runner.memory_builder.builder import (
    GradientSettings,
    MemoryBuilder,
    Target,
    collect_router_inputs,
)
from model_runner.memory_builder.entries import entry_ids
from model_runner.memory_builder.recipes import PAPER, PRESETS, RECOMMENDED, Direction, Kind, Recipe
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import score
from model_runner.texts import batched
from tests.families import LONGEST_SUM
from tests.integration.runner_parts import (
    BATCH_SIZE,
    LAYERS,
    PRESET_NAMES,
    QUIET,
    SENTENCES,
    build,
    client_of,
    everything,
    loaded_model,
    scored,
    stored,
    windows_of,
)
from tests.rounding import rounding
from tests.sidecar import Sidecar

PRESET = pytest.mark.parametrize("preset", PRESET_NAMES)
ENTRIES = sum(window.targets for window in windows_of())
# Of a loss: routing that is the same but for its last bits, through every layer.
ROUNDING = rounding(LONGEST_SUM, layers=LAYERS)


@pytest.fixture(scope="module", params=PRESET_NAMES)
def built(request: pytest.FixtureRequest, edge_sidecar: Sidecar) -> str:
    """A filled memory of each kind."""
    name = f"filled-{request.param}"
    build(edge_sidecar.target, name, request.param)
    return name


def create(sidecar: Sidecar, name: str, preset: str) -> None:
    with AdminClient(sidecar.target) as client:
        client.find_or_create(
            name, loaded_model().fingerprint.message(), PRESETS[preset].settings(LAYERS)
        )


@PRESET
def test_an_entry_per_token_with_a_loss_and_layer(
    edge_sidecar: Sidecar, name: str, preset: str
) -> None:
    report = build(edge_sidecar.target, name, preset)
    assert (report.windows, report.windows_skipped) == (len(windows_of()), 0)
    assert report.entries_per_layer == ENTRIES
    with AdminClient(edge_sidecar.target) as client:
        assert [client.count(name, layer) for layer in range(LAYERS)] == [ENTRIES] * LAYERS


def test_entries_know_where_they_come_from(edge_sidecar: Sidecar, built: str) -> None:
    tokenizer = loaded_model().tokenizer
    for layer in range(LAYERS):
        origins = [origin for _, _, origin in stored(edge_sidecar, built, layer).values()]
        assert {origin.source for origin in origins} == {"reference.jsonl"}
        for origin in origins:
            sentence = SENTENCES[int(origin.example) - 1]
            assert tokenizer.decode([origin.token]) == sentence[origin.position]
        assert len({(o.example, o.position) for o in origins}) == len(origins)


@PRESET
def test_building_twice_writes_the_same_entries(
    edge_sidecar: Sidecar, name: str, preset: str
) -> None:
    build(edge_sidecar.target, name, preset)
    before = everything(edge_sidecar, name)
    again = build(edge_sidecar.target, name, preset)
    assert (again.windows_skipped, again.entries_per_layer) == (len(windows_of()), 0)
    assert everything(edge_sidecar, name) == before
    build(edge_sidecar.target, f"{name}-fresh", preset)
    assert everything(edge_sidecar, f"{name}-fresh") == before


def test_entries_that_change_nothing(edge_sidecar: Sidecar, name: str) -> None:
    """They stand where the memory changes the routing of other text most, and there it changes less then."""
    build(edge_sidecar.target, name, "recommended")
    loaded, count = loaded_model(), 40
    general = windows_of([sentence[::-1] for sentence in SENTENCES])
    with AdminClient(edge_sidecar.target) as admin:
        builder = MemoryBuilder(loaded.model, loaded.fingerprint, admin, batch_size=BATCH_SIZE)

        def moved() -> list[Tensor]:
            with client_of(edge_sidecar.target, name) as client:
                return builder.changes(general, RetrievalPolicy(client), QUIET)

        before = moved()
        assert builder.add_null_entries(name, general, before, count, QUIET) == count
        after = moved()
    ids = np.concatenate([entry_ids(group) for group in batched(general, BATCH_SIZE)])
    for layer, entries in enumerate(everything(edge_sidecar, name)):
        largest = before[layer].argsort(descending=True, stable=True)[:count]
        there = {entry for entry, (_, value) in entries.items() if not np.any(value)}
        assert there == set(ids[largest.numpy()].tolist())
        assert after[layer].sum() < before[layer].sum()


@pytest.mark.parametrize("recipe", [{}, {"direction": Direction.RANDOM}, {"shuffled": True}])
def test_a_build_that_was_cut_off_goes_on(
    edge_sidecar: Sidecar, name: str, recipe: dict[str, object]
) -> None:
    """As if it had not been: also what is drawn at random."""

    class CutOff(type(QUIET)):
        def track(self, items, what, unit="item"):
            if what != "building":
                yield from super().track(items, what, unit)
                return
            yield from items[:3]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(edge_sidecar.target, name, progress=CutOff(quiet=True), **recipe)
    resumed = build(edge_sidecar.target, name, **recipe)
    assert 0 < resumed.windows_skipped <= 3 * BATCH_SIZE
    build(edge_sidecar.target, f"{name}-whole", **recipe)
    assert everything(edge_sidecar, name) == everything(edge_sidecar, f"{name}-whole")


def test_keys_are_the_plain_models_router_inputs(edge_sidecar: Sidecar, built: str) -> None:
    inputs = collect_router_inputs(loaded_model().model, windows_of(), batch_size=BATCH_SIZE)
    for layer, rows in inputs.items():
        keys = [key for key, _, _ in stored(edge_sidecar, built, layer).values()]
        assert sorted(keys) == sorted(rows.tolist())


def test_reading_the_reference_itself_replays_it(edge_sidecar: Sidecar, name: str) -> None:
    """K = 1 and lambda near 1: each token is routed by its own entry, as the oracle is."""
    model, windows = loaded_model().model, [w for w in windows_of() if w.offset == 0]
    build(edge_sidecar.target, name, windows=windows, settings=MemorySettings(gamma=[1e-7]))
    with client_of(edge_sidecar.target, name) as client:
        policy = RetrievalPolicy(client)
        routed = score(model, windows, policy, QUIET, what="").nll_sums
    assert all(use.lambda_mean > 0.999 for use in policy.use.values())
    oracle = oracle_scores(model, windows, PAPER, QUIET)
    np.testing.assert_allclose(routed, oracle.nll_sums, rtol=ROUNDING)
    plain = score(model, windows, None, QUIET, what="").nll_sums
    assert (np.abs(routed - plain) > 0.01).all()
    gain = sum(origin.gain for _, _, origin in stored(edge_sidecar, name, 0).values())
    assert plain.sum() - routed.sum() == pytest.approx(gain, rel=1e-3)


def test_an_assignment_memory_without_a_step_is_the_plain_model(
    edge_sidecar: Sidecar, name: str
) -> None:
    build(
        edge_sidecar.target,
        name,
        settings=MemorySettings(gamma=[1e-7]),
        direction=Direction.NONE,
    )
    with client_of(edge_sidecar.target, name) as client:
        routed = scored(RetrievalPolicy(client))
    np.testing.assert_allclose(routed, scored(None), rtol=ROUNDING)


def test_a_memory_of_another_kind_is_not_built_into(edge_sidecar: Sidecar, built: str) -> None:
    for other in {*PRESET_NAMES} - {built.removeprefix("filled-")}:
        with pytest.raises(KindMismatch, match="holds another kind of values"):
            build(edge_sidecar.target, built, other)


def test_more_gradient_steps(edge_sidecar: Sidecar, name: str) -> None:
    """Three steps of a third end near one whole step; logit deltas are made in one."""
    third = replace(PAPER, step_size=PAPER.step_size / 3)
    values = {}
    for steps, recipe in ((1, PAPER), (3, third), (1, replace(PAPER, direction=Direction.NONE))):
        build_in_steps(
            edge_sidecar, f"{name}-{recipe.step_size:.0f}-{recipe.direction}", steps, recipe
        )
        values[recipe] = dense_values(
            edge_sidecar, f"{name}-{recipe.step_size:.0f}-{recipe.direction}"
        )
    one, three, none = values.values()
    assert not np.array_equal(one, three)
    assert np.abs(one - three).mean() < 0.5 * np.abs(one - none).mean()
    with pytest.raises(BadInput, match="not logit deltas"):
        build_in_steps(edge_sidecar, f"{name}-deltas", 2, RECOMMENDED)


def build_in_steps(sidecar: Sidecar, memory: str, steps: int, recipe: Recipe) -> None:
    create(sidecar, memory, "paper" if recipe.kind is Kind.ASSIGNMENT else "recommended")
    loaded = loaded_model()
    with AdminClient(sidecar.target) as client:
        builder = MemoryBuilder(
            loaded.model, loaded.fingerprint, client, GradientSettings(steps=steps)
        )
        builder.build(windows_of(), [Target(memory, recipe, measure_gain=False)], QUIET)


def dense_values(sidecar: Sidecar, memory: str) -> np.ndarray:
    """Stored assignments of the last layer [n, N], in the order of their ids."""
    model = loaded_model().fingerprint
    rows = [value for _, (_, value, _) in sorted(stored(sidecar, memory, LAYERS - 1).items())]
    values = np.zeros((len(rows), model.num_experts))
    for row, value in enumerate(rows):
        for expert, weight in zip(value[: model.top_k], value[model.top_k :], strict=True):
            values[row, int(expert)] += weight
    return values
