"""Every baseline on tiny models: its arithmetic by hand, what it may know, and the model as it was afterwards."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from model_runner.architectures.discovery import find_router_sites
from model_runner.errors import BadInput, UnsupportedLibrary, UnsupportedModel
from model_runner.experiments import c3po, fine_tuning, in_context, knn_lm
from model_runner.experiments.arms import RECOMMENDED, Arm
from model_runner.experiments.baselines import METHODS, baselines
from model_runner.experiments.choosing import BEST, SAFE, Baseline, Candidate, Trial
from model_runner.experiments.main_table import main_rows
from model_runner.experiments.reading import read, read_batch
from model_runner.experiments.report import main_tables
from model_runner.experiments.results import Result
from model_runner.experiments.study import Study
from model_runner.scoring import Scores
from model_runner.texts import Window, make_batch
from tests.unit.model_runner.experiments.studies import tiny_study, windows_of


def state_of(model: nn.Module) -> list[object]:
    """All that may have changed: weights, modules, hooks, what is trained."""
    return [
        {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()},
        [(name, type(module)) for name, module in model.named_modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        model.training,
    ]


def short(arm: Arm) -> Arm:
    """With as little training and as few candidates as show the same."""
    if not isinstance(arm, Baseline):
        return arm
    method = arm.method
    if isinstance(method, fine_tuning.FineTuning):
        method = dataclasses.replace(method, rates=method.rates[-1:], epochs=1, batch_size=3)
    if isinstance(method, c3po.C3po):
        method = dataclasses.replace(method, variants=method.variants[:1])
    return dataclasses.replace(arm, method=method)


ARMS = {arm.name: arm for arm in baselines() if not arm.name.endswith("-safe")}


@pytest.fixture(scope="module")
def shared() -> Study:
    return tiny_study()


@pytest.mark.parametrize("name", sorted(ARMS.keys() - {"lora"}))
def test_the_model_is_as_before(name: str, shared: Study) -> None:
    model = shared.loaded.model
    before = state_of(model)
    with short(ARMS[name]).fit(shared) as fitted:
        scores = fitted.score(shared.texts.test)
        assert fitted.budget.s_per_token is not None
    assert scores.examples == shared.plain(shared.texts.test).examples
    assert np.isfinite(scores.nll_sums).all()
    assert state_of(model) == before


def test_the_model_is_as_before_an_interruption(shared: Study) -> None:
    model = shared.loaded.model
    before = state_of(model)
    for name in ("full-ft", "recommended"):
        arm = short(ARMS[name]) if name in ARMS else RECOMMENDED
        with pytest.raises(KeyboardInterrupt), arm.fit(shared):
            raise KeyboardInterrupt
        assert state_of(model) == before


def test_rows_have_names_of_their_own() -> None:
    names = [arm.name for arm in baselines()]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)
    assert {f"{method.name}-safe" for method in METHODS} < set(names)


def test_a_row_of_the_main_table(shared: Study) -> None:
    [row] = main_rows(shared, "knn-lm-safe")
    chosen = row["chosen"]
    settings = [trial["setting"] for trial in chosen["trials"]]
    assert len(settings) == len(knn_lm.KEYS) * len(knn_lm.WEIGHTS) * len(knn_lm.TEMPERATURES)
    assert chosen["setting"] is None or chosen["setting"] in settings
    result = Result("main", "tiny", "random", 0, "knn-lm-safe", "", {}, 0.0, [row])
    shown = "\n".join(main_tables([result]))
    assert "settings chosen on dev" in shown
    assert ("the model as it is" in shown) == (chosen["setting"] is None)


# Choosing


def shifted(study: Study, by: float, windows: Sequence[Window]) -> Scores:
    plain = study.plain(windows)
    sums = plain.nll_sums + by * plain.targets
    return dataclasses.replace(plain, nll_sums=sums)


@dataclasses.dataclass(frozen=True)
class Shifts:
    """A Method whose candidates change the loss by so much on dev text, and on general text."""

    changes: tuple[tuple[float, float], ...]
    name: str = "shifts"

    def candidates(self, study: Study) -> Iterator[Candidate]:
        for number, (gain, harm) in enumerate(self.changes):
            general = {id(w) for w in (study.texts.general_dev, study.texts.general_test)}

            def score(
                windows: Sequence[Window],
                changes: tuple[float, float] = (gain, harm),
                general: set[int] = general,
            ) -> Scores:
                return shifted(study, changes[id(windows) in general], windows)

            yield Candidate({"number": number}, score)


@pytest.mark.parametrize(
    ("changes", "best", "safe"),
    [
        (((-0.1, 0.0), (-0.3, 0.5), (-0.2, 0.005)), -0.3, -0.2),
        (((-0.1, 0.02), (0.2, 0.0)), -0.1, 0.0),
        (((0.3, 0.0), (0.1, 0.9)), 0.1, 0.0),
    ],
)
def test_the_largest_gain_within_the_bound(
    changes: tuple[tuple[float, float], ...], best: float, safe: float, shared: Study
) -> None:
    windows = shared.texts.test
    for rule, expected in ((BEST, best), (SAFE, safe)):
        with Baseline("shifts", Shifts(changes), rule).fit(shared) as fitted:
            scores = fitted.score(windows)
            change = (scores.nll_sums - shared.plain(windows).nll_sums) / scores.targets
            np.testing.assert_allclose(change, expected, atol=1e-9)


def test_the_bound_counts_a_standard_error() -> None:
    assert SAFE.allows(Trial({}, -0.1, 0.005, 0.005))
    assert not SAFE.allows(Trial({}, -0.1, 0.005, 0.0051))
    assert not SAFE.allows(Trial({}, -0.1, 0.0, math.nan))
    assert not SAFE.allows(Trial({}, 0.1, 0.0, 0.0))
    assert BEST.allows(Trial({}, 0.1, 9.0, 9.0))


# Fine-tuning


@pytest.mark.parametrize("name", ["router-ft", "last-router-ft"])
def test_only_these_routers_are_trained(name: str) -> None:
    study = tiny_study()
    model = study.loaded.model
    sites = find_router_sites(model)
    named = [site.name for site in (sites if name == "router-ft" else sites[-1:])]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = study.plain(study.texts.reference).nll
    method = dataclasses.replace(short(ARMS[name]).method, epochs=2, batch_size=2)
    for candidate in method.candidates(study):
        for key, tensor in model.state_dict().items():
            trained = any(key.startswith(f"{one}.") for one in named)
            assert trained != torch.equal(tensor, before[key]), key
        assert candidate.score(study.texts.reference).nll < plain
        assert candidate.trained_parameters == len(named) * 8 * 32


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_adapters_of_experts_and_attention(family: str) -> None:
    study = tiny_study(family)
    model = study.loaded.model
    before = state_of(model)
    method = dataclasses.replace(fine_tuning.LORA, rates=(0.02,), epochs=1, batch_size=2)
    plain = study.plain(study.texts.reference).nll
    with Baseline("lora", method).fit(study) as fitted:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert all("lora_" in name for name in names)
        assert any("experts" in name for name in names)
        assert any("q_proj" in name for name in names)
        assert not any(f"{site}." in name for name in names for site in ("gate", "router"))
        assert fitted.score(study.texts.reference).nll < plain
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert fitted.budget.trained_parameters == trained
    assert state_of(model) == before


def test_what_was_chosen_is_what_is_scored() -> None:
    study = tiny_study()
    opened = partial(fine_tuning.in_place, fine_tuning.all_weights)
    method = fine_tuning.FineTuning("full", opened, (3e-2,), epochs=3, batch_size=3)
    tried = {}
    for candidate in method.candidates(study):
        tried[str(candidate.setting)] = candidate.score(study.texts.dev).nll
    with Baseline("full", method).fit(study) as fitted:
        found = fitted.score(study.texts.dev).nll
    assert found == min(tried.values())


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnsupportedLibrary, match=r"pip install 'knn-moe\[eval\]'"):
        next(fine_tuning.LORA.candidates(tiny_study()))


# kNN-LM


def test_the_mixture_by_hand(shared: Study) -> None:
    neighbours, weight, temperature = 4, 0.3, 2.0
    store = knn_lm.Datastore(shared, "output", neighbours)
    window = shared.texts.dev[0]
    [found] = store.search([window])
    loss = knn_lm.mixed(found, weight, temperature)[0]
    assert torch.equal(loss[-1], torch.tensor(0.0))
    keys, successors = [], []
    for reference in shared.texts.reference:
        [reading] = read(shared, [reference], "reference")
        keys.append(reading.hidden[0, :-1])
        successors += reference.token_ids[1:]
    [reading] = read(shared, [window], "window")
    with torch.no_grad():
        logits = shared.loaded.model(torch.tensor([window.token_ids])).logits[0]
    for at, token in enumerate(window.token_ids[1:]):
        distances = (torch.cat(keys) - reading.hidden[0, at]).square().sum(1)
        nearest = distances.argsort()[:neighbours]
        share = torch.softmax(-distances[nearest] / temperature, 0)
        vote = sum(float(s) for s, n in zip(share, nearest, strict=True) if successors[n] == token)
        p = (1 - weight) * float(logits[at].softmax(-1)[token]) + weight * vote
        assert float(loss[at]) == pytest.approx(-math.log(p), abs=1e-4)


def test_the_last_routers_input_is_a_key(shared: Study) -> None:
    reading = read_batch(shared.loaded, make_batch(shared.texts.dev[:2], torch.device("cpu")))
    keys = knn_lm.keys_of(reading, "feed-forward input")
    assert keys.shape == reading.hidden.shape
    assert torch.equal(keys.flatten(0, 1), reading.calls[-1].router_input)


# Few-shot


@pytest.mark.parametrize("first_target", [1, 7])
def test_every_target_is_in_one_segment(first_target: int) -> None:
    [window] = windows_of("one", 1, length=15)
    window = dataclasses.replace(window, target_at=tuple(range(first_target, 12, 2)))
    found = in_context.segments(window, 3)
    served = [at for a, b in found for at in window.target_at if a <= at < b]
    assert served == list(window.target_at)
    assert found[0][0] == first_target


@pytest.mark.parametrize("kind", in_context.SEARCHES)
def test_a_query_knows_nothing_of_what_is_scored(kind: str, shared: Study) -> None:
    texts = in_context.pieces(shared.texts.reference, 6)
    search: in_context.Search = (
        in_context.Lexical(texts) if kind == "lexical" else in_context.Hidden(shared, texts, 3)
    )
    [one, *_] = shared.texts.test
    begin = in_context.segments(one, 3)[2][0]
    nearest = set()
    for other in shared.texts.dev:
        changed = dataclasses.replace(
            one, token_ids=one.token_ids[:begin] + other.token_ids[: len(one.token_ids) - begin]
        )
        search.learn([changed])
        nearest.add(search(changed, begin))
    assert len(nearest) == 1
    assert search(changed, begin) == nearest.pop()


def test_the_nearest_text_is_that_of_the_same_words(shared: Study) -> None:
    texts = shared.texts.reference
    for search in (in_context.Lexical(texts), in_context.Hidden(shared, texts, 3)):
        for number, text in enumerate(texts):
            search.learn([text])
            begin = in_context.segments(text, 3)[-1][0]
            assert search(text, begin) == number


def test_what_stands_before_a_window_fits() -> None:
    [window] = windows_of("one", 1, length=15)
    before = tuple(range(100, 106))
    whole = in_context.with_context(window, 4, 7, before, room=40)
    assert whole.token_ids == before + window.token_ids[:7]
    assert [whole.token_ids[at] for at in whole.target_at] == list(window.token_ids[4:7])
    cut = in_context.with_context(window, 9, 12, before, room=12)
    assert cut.token_ids == before + window.token_ids[6:12]
    assert [cut.token_ids[at] for at in cut.target_at] == list(window.token_ids[9:12])


def test_losses_go_back_to_their_windows(shared: Study) -> None:
    windows = shared.texts.test
    nothing = [Window(windows[0].ref, (), (), 0)]
    search = in_context.Lexical(shared.texts.reference[:1])
    found = in_context.score_after(shared, search, nothing, 100, windows)
    plain = shared.plain(windows)
    assert found.windows == plain.windows
    np.testing.assert_allclose(found.nll_sums, plain.nll_sums, rtol=1e-5)


def test_a_context_without_room() -> None:
    study = tiny_study()
    study.loaded.model.config.max_position_embeddings = study.sizes.length
    with pytest.raises(BadInput, match="expected at most 6"):
        next(in_context.FewShot().candidates(study))


# C3PO


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_own_pathways_change_nothing(family: str) -> None:
    study = tiny_study(family)
    for reading in read(study, study.texts.dev, "dev"):
        loss = c3po.remixed_nll(study, reading, c3po.pathways_of(reading))
        torch.testing.assert_close(loss, reading.nll, atol=1e-4, rtol=1e-4)


def test_a_pathway_is_its_own_tokens_only(shared: Study) -> None:
    [reading] = read(shared, shared.texts.dev[:1], "dev")
    pathways = c3po.pathways_of(reading)
    plain = c3po.remixed_nll(shared, reading, pathways)
    pathways[0, 4] = pathways[0, 4].roll(1, -1)
    changed = c3po.remixed_nll(shared, reading, pathways)
    same = torch.arange(plain.shape[1]) != 4
    torch.testing.assert_close(changed[:, same], plain[:, same])
    assert not torch.isclose(changed[0, 4], plain[0, 4])
    last_only = c3po.remixed_nll(shared, reading, pathways, first_layer=4)
    torch.testing.assert_close(last_only, plain)


def test_the_released_mixture_by_hand(shared: Study) -> None:
    draw = torch.Generator().manual_seed(0)
    keys = nn.functional.normalize(torch.randn(9, 32, generator=draw), dim=1)
    ways = torch.rand(9, 4, 8, generator=draw).softmax(-1)
    [reading] = read(shared, shared.texts.dev[:1], "dev")
    found = c3po.Pathways("mean", keys, ways).remixed(reading, c3po.RELEASED)
    for at in range(reading.nll.shape[1]):
        mean = reading.hidden[0, : at + 1].mean(0)
        nearest = (keys @ mean / mean.norm()).topk(3)
        weights = nearest.values.clamp_min(0)
        expected = torch.einsum("k,kln->ln", weights, ways[nearest.indices]) / weights.sum()
        torch.testing.assert_close(found[0, at], expected, atol=1e-5, rtol=1e-4)


def test_only_successes_are_neighbours(shared: Study) -> None:
    store = c3po.Pathways.of(shared, "token")
    ways = [
        c3po.pathways_of(reading)[reading.right]
        for reading in read(shared, shared.texts.reference, "reference")
    ]
    assert torch.equal(store.ways, torch.cat(ways))
    assert 0 < len(store.ways) < sum(w.targets for w in shared.texts.reference)


def test_layers_from_the_last_one() -> None:
    assert c3po.Remix().first_layer(16) == 11
    assert c3po.Remix().first_layer(4) == 0
    assert c3po.Remix(last_layers=None).first_layer(16) == 11
    assert c3po.Remix(last_layers=None).first_layer(4) == 3


def test_no_success_and_no_side_by_side() -> None:
    study = tiny_study("jamba")
    with pytest.raises(UnsupportedModel, match="side by side"):
        next(c3po.C3po().candidates(study))
    study = tiny_study()
    few = [dataclasses.replace(w, target_at=(1,)) for w in study.texts.reference[:2]]
    study = dataclasses.replace(study, texts=dataclasses.replace(study.texts, reference=few))
    with pytest.raises(UnsupportedModel, match="rates highest"):
        c3po.Pathways.of(study, "mean")
