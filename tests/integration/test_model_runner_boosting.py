"""Boosting of a memory in a sidecar: what it comes to, cut off and gone on with, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from knnmoe.client import AdminClient
from knnmoe.v1.types_pb2 import MemorySettings

from model_runner.errors import BadInput
from model_runner.memory_builder.boosted_memories import MemoryChanged
from model_runner.memory_builder.boosting import Boosted, Booster, Deltas, Outcome, verdict
from model_runner.memory_builder.builder import MemoryBuilder
from model_runner.memory_builder.recipes import RECOMMENDED, step
from model_runner.memory_builder.traces import GradientSettings, traced_windows
from model_runner.routing_policy import RetrievalPolicy
from model_runner.texts import batched, make_batch
from tests.integration.runner_parts import (
    BATCH_SIZE,
    LAYERS,
    QUIET,
    SENTENCES,
    build,
    client_of,
    everything,
    loaded_model,
    scored,
    windows_of,
)
from tests.sidecar import Sidecar

# A few neighbours are near, the others count for something.
READ = MemorySettings(gamma=[0.05], null_weight=0.5)


def boost(sidecar: Sidecar, name: str, rounds: int, progress=QUIET, **more: object) -> Outcome:
    with AdminClient(sidecar.target) as client:
        builder = MemoryBuilder(
            *(loaded_model().model, loaded_model().fingerprint, client), batch_size=BATCH_SIZE
        )
        return builder.boost(name, windows_of(), rounds, progress, **more)


def built(sidecar: Sidecar, name: str) -> None:
    build(sidecar.target, name, "recommended", settings=READ)


def described(sidecar: Sidecar, name: str):
    with AdminClient(sidecar.target) as client:
        return client.describe(name)


def in_ram(sidecar: Sidecar, name: str, rounds: int) -> list[Deltas]:
    """The same rounds over entries that never were in the sidecar, which only says how they are read."""
    loaded, groups = loaded_model(), list(batched(windows_of(), BATCH_SIZE))
    traced = [
        traced_windows(loaded.model, make_batch(group, loaded.device), GradientSettings())
        for group in groups
    ]
    origins = [w.ref for each in traced for w in each.batch.windows for _ in w.target_at]
    with AdminClient(sidecar.target) as client:
        norms = MemoryBuilder(
            loaded.model, loaded.fingerprint, client, batch_size=BATCH_SIZE
        ).median_norms(windows_of())
    state = []
    for layer in range(LAYERS):
        traces = [(each.traces[layer], each.kept) for each in traced]
        keys = torch.cat([t.router_input.flatten(0, 1)[kept] for t, kept in traces])
        gradients = torch.cat([t.gradient.flatten(0, 1)[kept] for t, kept in traces])
        deltas = step(gradients, RECOMMENDED, norms[layer], torch.Generator())
        state.append(Deltas(keys, deltas, origins))
    booster = Booster(
        *(loaded.model, windows_of(), norms, described(sidecar, name).settings),
        batch_size=BATCH_SIZE,
    )
    for _ in range(rounds):
        _, state = booster.round(state, QUIET, "")
    return state


def test_rounds_end_in_the_memory_that_they_made(ram_sidecar: Sidecar, name: str) -> None:
    built(ram_sidecar, name)
    finished = list[str]()
    outcome = boost(ram_sidecar, name, 2, finish=finished.append)
    assert outcome.rounds == 2, outcome
    assert finished == [f"{name}.round-2"]
    now = described(ram_sidecar, name)
    assert (now.settings.rounds, list(now.settings.round_nll)) == (2, list(outcome.nll))
    assert list(now.settings.gamma) == [0.05]
    for of_sidecar, expected in zip(
        everything(ram_sidecar, name), in_ram(ram_sidecar, name, 2), strict=True
    ):
        rows = sorted(zip(expected.keys.tolist(), expected.deltas.tolist(), strict=True))
        np.testing.assert_allclose(
            np.array([row[0] for row in sorted(of_sidecar.values())]),
            np.array([row[0] for row in rows]),
            atol=1e-5,
        )
        np.testing.assert_allclose(
            np.array([row[1] for row in sorted(of_sidecar.values())]),
            np.array([row[1] for row in rows]),
            atol=1e-4,
        )
    with AdminClient(ram_sidecar.target) as client:
        assert all(client.find(f"{name}.round-{number}") is None for number in range(4))


def test_the_nll_that_is_said_is_the_leave_one_out_nll(ram_sidecar: Sidecar, name: str) -> None:
    built(ram_sidecar, name)
    targets = sum(window.targets for window in windows_of())
    with client_of(ram_sidecar.target, name) as client:
        before = scored(RetrievalPolicy(client), leave_one_out=True).sum() / targets
    outcome = boost(ram_sidecar, name, 1)
    with client_of(ram_sidecar.target, name) as client:
        after = scored(RetrievalPolicy(client), leave_one_out=True).sum() / targets
    assert outcome.nll == pytest.approx([scored(None).sum() / targets, before, after], abs=1e-4)


@pytest.mark.parametrize(
    "at", ["boosting, after 1 rounds", "writing {name}.round-2", "NLL, after 2 rounds"]
)
def test_a_run_that_was_cut_off_goes_on(ram_sidecar: Sidecar, name: str, at: str) -> None:
    """In the middle of a round's pass, of its writing, or after the last one: it ends as if it had not been."""

    class CutOff(type(QUIET)):
        def track(self, items, what, unit="item"):
            if what != at.format(name=name):
                yield from super().track(items, what, unit)
                return
            yield from items[:1]
            raise KeyboardInterrupt

    built(ram_sidecar, name)
    with pytest.raises(KeyboardInterrupt):
        boost(ram_sidecar, name, 2, CutOff(quiet=True))
    assert described(ram_sidecar, name).settings.rounds == 0
    said = Heard()
    outcome = boost(ram_sidecar, name, 2, said)
    assert "boosting, after 0 rounds" not in said.tracked
    built(ram_sidecar, f"{name}-whole")
    assert boost(ram_sidecar, f"{name}-whole", 2) == outcome
    assert everything(ram_sidecar, name) == everything(ram_sidecar, f"{name}-whole")


class Heard(type(QUIET)):
    """Keeps what was tracked."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.tracked = list[str]()

    def track(self, items, what, unit="item"):
        self.tracked.append(what)
        return super().track(items, what, unit)


def test_it_stops_by_itself_and_stays_stopped(
    ram_sidecar: Sidecar, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("boosting", "boosted_memories"):
        monkeypatch.setattr(f"model_runner.memory_builder.{module}.LEAST_FALL", math.inf)
    built(ram_sidecar, name)
    outcome = boost(ram_sidecar, name, 5)
    assert (outcome.rounds, len(outcome.nll)) == (1, 3)
    assert "lowered it by less than inf" in str(outcome)
    said = Heard()
    again = boost(ram_sidecar, name, 5, said)
    assert (again.rounds, again.nll, said.tracked) == (1, outcome.nll, [])


def test_more_rounds_go_on_from_those_that_were(ram_sidecar: Sidecar, name: str) -> None:
    built(ram_sidecar, name)
    boost(ram_sidecar, name, 1)
    outcome = boost(ram_sidecar, name, 2)
    built(ram_sidecar, f"{name}-whole")
    assert boost(ram_sidecar, f"{name}-whole", 2) == outcome
    assert everything(ram_sidecar, name) == everything(ram_sidecar, f"{name}-whole")


def test_entries_of_other_text_take_part_and_stay(ram_sidecar: Sidecar, name: str) -> None:
    built(ram_sidecar, name)
    before = everything(ram_sidecar, name)
    few = [window for window in windows_of() if window.ref.example in "123"]
    with AdminClient(ram_sidecar.target) as client:
        loaded = loaded_model()
        builder = MemoryBuilder(loaded.model, loaded.fingerprint, client, batch_size=BATCH_SIZE)
        assert builder.boost(name, few, 1, QUIET).rounds == 1
    after = everything(ram_sidecar, name)
    changed = [sum(one[e] != two[e] for e in one) for one, two in zip(before, after, strict=True)]
    assert changed == [sum(window.targets for window in few)] * LAYERS


def test_what_is_written_meanwhile_is_not_lost(ram_sidecar: Sidecar, name: str) -> None:
    few = [window for window in windows_of() if window.ref.example != "1"]
    build(ram_sidecar.target, name, "recommended", settings=READ, windows=few)
    with pytest.raises(MemoryChanged, match="run this again"):
        boost(ram_sidecar, name, 1, finish=lambda _: built(ram_sidecar, name))
    assert boost(ram_sidecar, name, 1).rounds == 1
    assert sum(len(layer) for layer in everything(ram_sidecar, name)) == LAYERS * sum(
        window.targets for window in windows_of()
    )


def test_new_text_begins_anew(ram_sidecar: Sidecar, name: str) -> None:
    few = [window for window in windows_of() if window.ref.example != "1"]
    build(ram_sidecar.target, name, "recommended", settings=READ, windows=few)
    with AdminClient(ram_sidecar.target) as client:
        loaded = loaded_model()
        builder = MemoryBuilder(loaded.model, loaded.fingerprint, client, batch_size=BATCH_SIZE)
        builder.boost(name, few, 1, QUIET)
    built(ram_sidecar, name)
    assert described(ram_sidecar, name).settings.rounds == 0
    assert boost(ram_sidecar, name, 1).rounds == 1


def test_what_cannot_be_boosted(ram_sidecar: Sidecar, name: str) -> None:
    build(ram_sidecar.target, name, "paper")
    with pytest.raises(BadInput, match="holds no logit deltas"):
        boost(ram_sidecar, name, 1)
    build(ram_sidecar.target, f"{name}-one", "recommended", windows=windows_of(SENTENCES[:1]))
    with AdminClient(ram_sidecar.target) as client:
        loaded = loaded_model()
        builder = MemoryBuilder(loaded.model, loaded.fingerprint, client, batch_size=BATCH_SIZE)
        with pytest.raises(BadInput, match="expected 1 or more"):
            builder.boost(f"{name}-one", windows_of(SENTENCES[:1]), 0, QUIET)
        with pytest.raises(BadInput, match="two examples or more"):
            builder.boost(f"{name}-one", windows_of(SENTENCES[:1]), 1, QUIET)


def test_a_round_that_makes_it_worse_is_not_kept() -> None:
    assert verdict((5.0, 4.0), 0.1) == ""
    assert verdict((5.0, 4.0, 3.8), 0.1) == ""
    assert verdict((5.0, 4.0, 3.8, 3.75), 0.1) == "round 2 lowered it by less than 0.1"
    assert verdict((5.0, 4.0, 4.5), 0.1) == "round 1 raised the NLL by 0.5000"


def test_steps_that_are_too_long_end_in_the_round_before(ram_sidecar: Sidecar, name: str) -> None:
    built(ram_sidecar, name)
    state = in_ram(ram_sidecar, name, 0)
    booster = Booster(
        *(
            loaded_model().model,
            windows_of(),
            [1.0] * LAYERS,
            described(ram_sidecar, name).settings,
        ),
        rate=-200.0,  # up the gradient
        batch_size=BATCH_SIZE,
    )
    rounds = list[Boosted]()
    outcome = booster.run(Boosted(state, 0, ()), 3, QUIET, rounds.append)
    assert outcome.rounds == 0
    assert "raised the NLL" in outcome.why
    assert len(rounds) == 1
