"""Boosting of a memory in a sidecar: what it comes to, cut off and gone on with, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from knnmoe.client import AdminClient
from knnmoe.v1.routing_pb2 import MemoryDescription
from knnmoe.v1.types_pb2 import MemorySettings

from model_runner.errors import BadInput
from model_runner.memory_builder.boosted_memories import MemoryChanged
from model_runner.memory_builder.boosting import Boosted, Booster, Deltas, Outcome, verdict
from model_runner.memory_builder.builder import MemoryBuilder
from model_runner.memory_builder.entries import entry_ids
from model_runner.memory_builder.recipes import RECOMMENDED, step
from model_runner.memory_builder.traces import GradientSettings, traced_windows
from model_runner.progress import Progress
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import score
from model_runner.texts import Window, batched, make_batch
from tests.integration.runner_parts import (
    BATCH_SIZE,
    LAYERS,
    QUIET,
    SENTENCES,
    build,
    client_of,
    everything,
    loaded_model,
    windows_of,
)
from tests.sidecar import Sidecar

# Few, for each test goes over them several times; read in full, so that no choice among equals tells.
WINDOWS = windows_of(SENTENCES[:4])
READ = MemorySettings(gamma=[0.05], null_weight=0.5, neighbours=500)
ENTRIES = sum(window.targets for window in WINDOWS)


def boost(
    sidecar: Sidecar,
    name: str,
    rounds: int,
    progress: Progress = QUIET,
    windows: Sequence[Window] = WINDOWS,
    **more: Any,
) -> Outcome:
    loaded = loaded_model()
    with AdminClient(sidecar.target) as client:
        builder = MemoryBuilder(loaded.model, loaded.fingerprint, client, batch_size=BATCH_SIZE)
        return builder.boost(name, windows, rounds, progress, **more)


def built(sidecar: Sidecar, name: str, windows: Sequence[Window] = WINDOWS) -> None:
    build(sidecar.target, name, "recommended", settings=READ, windows=windows)


def described(sidecar: Sidecar, name: str) -> MemoryDescription:
    with AdminClient(sidecar.target) as client:
        return client.describe(name)


def left_out(sidecar: Sidecar, name: str) -> float:
    """NLL of the windows, leave-one-out, by lookups in the sidecar."""
    with client_of(sidecar.target, name) as client:
        scores = score(
            *(loaded_model().model, WINDOWS, RetrievalPolicy(client), QUIET),
            what="",
            batch_size=BATCH_SIZE,
            leave_one_out=True,
        )
    return scores.nll


@pytest.fixture(scope="module")
def whole(ram_sidecar: Sidecar) -> tuple[str, Outcome]:
    """A memory after two rounds that nothing disturbed, and what was said."""
    built(ram_sidecar, "whole")
    return "whole", boost(ram_sidecar, "whole", 2)


def in_ram(sidecar: Sidecar, name: str, rounds: int) -> list[Deltas]:
    """The same rounds over entries that never were in the sidecar, which only says how they are read."""
    loaded, groups = loaded_model(), list(batched(WINDOWS, BATCH_SIZE))
    traced = [
        traced_windows(loaded.model, make_batch(group, loaded.device), GradientSettings())
        for group in groups
    ]
    origins = [w.ref for each in traced for w in each.batch.windows for _ in w.target_at]
    with AdminClient(sidecar.target) as client:
        norms = MemoryBuilder(
            loaded.model, loaded.fingerprint, client, batch_size=BATCH_SIZE
        ).median_norms(WINDOWS)
    state = []
    for layer in range(LAYERS):
        traces = [(each.traces[layer], each.kept) for each in traced]
        keys = torch.cat([t.router_input.flatten(0, 1)[kept] for t, kept in traces])
        gradients = torch.cat([t.gradient.flatten(0, 1)[kept] for t, kept in traces])
        deltas = step(gradients, RECOMMENDED, norms[layer], torch.Generator())
        state.append(Deltas(keys, deltas, origins))
    booster = Booster(
        *(loaded.model, WINDOWS, norms, described(sidecar, name).settings),
        batch_size=BATCH_SIZE,
    )
    for _ in range(rounds):
        _, state = booster.round(state, QUIET, "")
    return state


def test_rounds_end_in_the_memory_that_they_made(ram_sidecar: Sidecar, name: str) -> None:
    """And what is said of them is the leave-one-out NLL."""
    built(ram_sidecar, name)
    finished, nll = list[str](), [left_out(ram_sidecar, name)]
    outcome = boost(ram_sidecar, name, 2, finish=finished.append)
    assert (outcome.rounds, finished) == (2, [f"{name}.round-2"])
    assert outcome.nll[1] == pytest.approx(nll[0], abs=1e-4)
    assert outcome.nll[3] == pytest.approx(left_out(ram_sidecar, name), abs=1e-4)
    now = described(ram_sidecar, name).settings
    assert (now.rounds, list(now.round_nll), list(now.gamma)) == (2, list(outcome.nll), [0.05])
    for of_sidecar, expected in zip(
        everything(ram_sidecar, name), in_ram(ram_sidecar, name, 2), strict=True
    ):
        rows = [
            of_sidecar[number]
            for group in batched(WINDOWS, BATCH_SIZE)
            for number in entry_ids(group).tolist()
        ]
        keys, deltas = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
        torch.testing.assert_close(keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(deltas, expected.deltas, atol=1e-3, rtol=1e-3)
    with AdminClient(ram_sidecar.target) as client:
        assert all(client.find(f"{name}.round-{number}") is None for number in range(4))


@pytest.mark.parametrize("at", ["boosting, after 1 rounds", "writing NAME.round-2"])
def test_a_run_that_was_cut_off_goes_on(
    ram_sidecar: Sidecar, name: str, at: str, whole: tuple[str, Outcome]
) -> None:
    """In the middle of a round's pass, or of its writing: it ends as if it had not been."""

    class CutOff(Progress):
        def track(self, items: Any, what: str, unit: str = "item") -> Any:
            if what != at.replace("NAME", name):
                yield from super().track(items, what, unit)
                return
            yield from items[:1]
            raise KeyboardInterrupt

    built(ram_sidecar, name)
    with pytest.raises(KeyboardInterrupt):
        boost(ram_sidecar, name, 2, CutOff(quiet=True))
    assert described(ram_sidecar, name).settings.rounds == 0
    said = Heard()
    assert boost(ram_sidecar, name, 2, said) == whole[1]
    assert "boosting, after 0 rounds" not in said.tracked
    assert everything(ram_sidecar, name) == everything(ram_sidecar, whole[0])


class Heard(Progress):
    """Keeps what was tracked."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.tracked = list[str]()

    def track(self, items: Any, what: str, unit: str = "item") -> Any:
        self.tracked.append(what)
        return super().track(items, what, unit)


def test_it_stops_by_itself_stays_stopped_and_goes_on(
    ram_sidecar: Sidecar, name: str, whole: tuple[str, Outcome]
) -> None:
    built(ram_sidecar, name)
    before = everything(ram_sidecar, name)
    outcome = boost(ram_sidecar, name, 5, least_fall=math.inf)
    assert (outcome.rounds, len(outcome.nll)) == (0, 3)
    assert "round 1 lowered it by less than inf" in str(outcome)
    assert everything(ram_sidecar, name) == before
    falls = [one - other for one, other in zip(whole[1].nll[1:], whole[1].nll[2:], strict=False)]
    bound = sum(falls) / 2
    assert falls[0] > bound > falls[1], "the first round helps more"
    first = boost(ram_sidecar, name, 5, least_fall=bound)
    assert (first.rounds, len(first.nll)) == (1, 4)
    said = Heard()
    again = boost(ram_sidecar, name, 5, said, least_fall=bound)
    assert (again.rounds, again.nll, said.tracked) == (1, first.nll, [])
    assert boost(ram_sidecar, name, 2) == whole[1]
    assert everything(ram_sidecar, name) == everything(ram_sidecar, whole[0])


def test_entries_of_other_text_take_part_and_stay(ram_sidecar: Sidecar, name: str) -> None:
    built(ram_sidecar, name)
    before = everything(ram_sidecar, name)
    few = [window for window in WINDOWS if window.ref.example in "12"]
    assert boost(ram_sidecar, name, 1, windows=few).rounds == 1
    after = everything(ram_sidecar, name)
    changed = [sum(one[e] != two[e] for e in one) for one, two in zip(before, after, strict=True)]
    assert changed == [sum(window.targets for window in few)] * LAYERS


def test_what_is_written_meanwhile_is_not_lost(ram_sidecar: Sidecar, name: str) -> None:
    """Rounds count from the text that came last."""
    built(ram_sidecar, name, WINDOWS[3:])
    with pytest.raises(MemoryChanged, match="run this again"):
        boost(
            *(ram_sidecar, name, 1),
            windows=WINDOWS[3:],
            finish=lambda _: built(ram_sidecar, name, WINDOWS[1:]),
        )
    assert boost(ram_sidecar, name, 1, windows=WINDOWS[1:]).rounds == 1
    built(ram_sidecar, name)
    assert described(ram_sidecar, name).settings.rounds == 0
    assert boost(ram_sidecar, name, 1).rounds == 1
    assert [len(layer) for layer in everything(ram_sidecar, name)] == [ENTRIES] * LAYERS


def test_what_cannot_be_boosted(ram_sidecar: Sidecar, name: str) -> None:
    built(ram_sidecar, f"{name}.round-1", WINDOWS[:2])
    one = windows_of(SENTENCES[:1])
    build(ram_sidecar.target, f"{name}-paper", "paper", windows=one)
    with pytest.raises(BadInput, match="holds no logit deltas"):
        boost(ram_sidecar, f"{name}-paper", 1)
    built(ram_sidecar, name, one)
    with pytest.raises(BadInput, match="is no round of boosting, and has the name of one"):
        boost(ram_sidecar, name, 1)
    assert described(ram_sidecar, f"{name}.round-1").layers[0].entries > 0
    built(ram_sidecar, f"{name}-one", one)
    with pytest.raises(BadInput, match="expected 1 or more"):
        boost(ram_sidecar, f"{name}-one", 0, windows=one)
    with pytest.raises(BadInput, match="two examples or more"):
        boost(ram_sidecar, f"{name}-one", 1, windows=one)


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
            WINDOWS,
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
