"""Explanations of what a memory did, against a real service: sums, experts, and the stored cases with their words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from knnmoe import tensors

from model_runner.architectures import Assignment
from model_runner.errors import BadInput, HooksInUse
from model_runner.evaluation.explain import NO_CASE, Explanation, explain, prompt_windows
from model_runner.memory_builder.entries import entry_ids
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import RouterCall, RouterHooks
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import score
from model_runner.texts import Window
from model_runner.token_texts import TokenTexts
from tests.families import CORE_FAMILIES, prompt, shared_model
from tests.integration.runner_parts import (
    BATCH_SIZE,
    LAYERS,
    LENGTH,
    PRESET_NAMES,
    QUIET,
    build,
    client_of,
    loaded_model,
    scored,
    stored,
    windows_of,
)
from tests.sidecar import Sidecar

PRESET = pytest.mark.parametrize("preset", PRESET_NAMES)


@pytest.fixture
def client(edge_sidecar: Sidecar, name: str) -> Iterator[RouterClient]:
    """Of a memory that is not there yet."""
    with client_of(edge_sidecar.target, name) as opened:
        yield opened


def explained(
    client: RouterClient, windows: Sequence[Window] | None = None, **options: Any
) -> Explanation:
    loaded = loaded_model()
    return explain(
        *(loaded.model, loaded.tokenizer, client, windows or windows_of(), QUIET),
        batch_size=BATCH_SIZE,
        **options,
    )


@PRESET
def test_it_is_what_evaluate_measures(
    edge_sidecar: Sidecar, client: RouterClient, name: str, preset: str
) -> None:
    build(edge_sidecar.target, name, preset, snippets=True)
    found = explained(client, leave_one_out=True)
    changes = scored(RetrievalPolicy(client), leave_one_out=True) - scored(None)
    assert len(found.changes) == sum(window.targets for window in windows_of())
    assert found.changes.sum(dtype=np.float64) == pytest.approx(changes.sum(), abs=1e-4)
    order = sorted(windows_of(), key=lambda window: -len(window.token_ids))
    by_window = {
        part.window: found.changes[part.tokens.start : part.tokens.stop] for part in found.windows
    }
    sums = [by_window[window].sum(dtype=np.float64) for window in order]
    np.testing.assert_allclose(sums, changes, atol=1e-4)


@PRESET
def test_it_says_which_lookups_and_experts_there_were(
    edge_sidecar: Sidecar, client: RouterClient, name: str, preset: str
) -> None:
    """Compared with what the routers of an unhooked and a routed pass over one window say."""
    build(edge_sidecar.target, name, preset)
    loaded, window = loaded_model(), windows_of()[0]
    found = explained(client, windows=[window])
    seen = dict[int, tuple[RouterCall, Assignment]]()

    def note(call: RouterCall, now: Assignment) -> None:
        seen[call.site.layer] = (call, now)

    with torch.no_grad(), RouterHooks(loaded.model, RetrievalPolicy(client, routed=note)):
        loaded.model(input_ids=torch.tensor([window.token_ids]))
    assert [part.layer for part in found.layers] == list(range(LAYERS))
    for part in found.layers:
        call, now = seen[part.layer]
        response = client.route(
            *(part.layer, call.router_input, call.router_logits),
            Assignment(call.weights, call.experts),
            with_neighbours=True,
        )
        lambdas = tensors.to_array(response.lambdas)
        assert found.read == tensors.to_array(response.neighbours.ids).shape[1]
        for token, at in enumerate(window.target_at):
            before = at - 1
            own = set(call.experts[before][call.weights[before] > 0].tolist())
            ran = set(now.experts[before][now.weights[before] > 0].tolist())
            assert part.came_in[token] == tuple(sorted(ran - own))
            assert part.went_out[token] == tuple(sorted(own - ran))
            assert part.lambdas[token] == pytest.approx(lambdas[before], abs=1e-5)
            nearest = response.neighbours.provenance[
                tensors.to_array(response.neighbours.ids)[before, 0]
            ]
            case = found.cases[part.neighbours[token, 0]]
            assert (case.example, case.position) == (nearest.example, nearest.position)
    assert any(any(part.came_in) for part in found.layers)


def test_an_entry_keeps_the_words_around_its_token(edge_sidecar: Sidecar, name: str) -> None:
    build(edge_sidecar.target, name, snippets=True)
    tokenizer = loaded_model().tokenizer
    for layer in range(LAYERS):
        kept = stored(edge_sidecar, name, layer)
        for window in windows_of():
            texts = TokenTexts.of(window.token_ids, tokenizer)
            for number, target in zip(entry_ids([window]).tolist(), window.target_at, strict=True):
                origin = kept[number][2]
                assert origin.snippet == texts.snippet(target - 1).text
                marked = origin.snippet[origin.token_start : origin.token_end]
                assert marked == tokenizer.decode([origin.token])


def test_its_cases_have_their_words(edge_sidecar: Sidecar, client: RouterClient, name: str) -> None:
    firsts = [window for window in windows_of() if window.offset == 0]  # no two tokens have a key
    build(edge_sidecar.target, name, windows=firsts, snippets=True)
    found = explained(client, windows=firsts)
    for token in range(len(found.plain)):
        case = found.cases[found.layers[0].neighbours[token, 0]]
        part, at = found.place(token)
        # Of the very text that was built from, the nearest is the entry itself.
        assert (case.example, case.position) == (part.window.ref.example, at - 1)
        assert case.snippet[case.token_start : case.token_end] == part.texts.token(at - 1)
    left_out = explained(client, windows=firsts, leave_one_out=True)
    for layer in left_out.layers:
        for token, number in enumerate(layer.neighbours[:, 0]):
            own = left_out.place(token)[0].window.ref.example
            assert number == NO_CASE or left_out.cases[number].example != own


def test_a_memory_without_snippets(edge_sidecar: Sidecar, client: RouterClient, name: str) -> None:
    build(edge_sidecar.target, name)
    found = explained(client)
    assert found.cases
    assert {case.snippet for case in found.cases} == {""}
    assert all(case.example for case in found.cases)


def test_a_memory_that_has_nothing_to_say(
    edge_sidecar: Sidecar, client: RouterClient, name: str
) -> None:
    only = windows_of()[:1]
    build(edge_sidecar.target, name, windows=only)
    found = explained(client, windows=only, leave_one_out=True)
    assert not found.cases
    assert not found.changes.any()
    assert all((part.neighbours == NO_CASE).all() for part in found.layers)


def test_json_has_all_of_it(edge_sidecar: Sidecar, client: RouterClient, name: str) -> None:
    build(edge_sidecar.target, name, "recommended", snippets=True)
    found = explained(client, neighbours=3)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    tokens = [token for window in document["windows"] for token in window["tokens"]]
    explained_ones = [token for token in tokens if "change" in token]
    assert len(explained_ones) == document["tokens"] == len(found.plain)
    total = sum(token["change"] for token in explained_ones)
    assert total == pytest.approx(document["change_sum"], abs=1e-3)
    assert document["neighbours_read"] == 32
    for token in explained_ones:
        assert [layer["layer"] for layer in token["layers"]] == list(range(LAYERS))
        for layer in token["layers"]:
            assert 0 < len(layer["neighbours"]) <= 3
            for near in layer["neighbours"]:
                assert document["cases"][near["case"]]["snippet"]
    text = "".join(token["text"] for token in document["windows"][0]["tokens"])
    assert text == loaded_model().tokenizer.decode(windows_of()[0].token_ids)


def test_no_more_neighbours_are_kept_than_are_read(
    edge_sidecar: Sidecar, client: RouterClient, name: str
) -> None:
    build(edge_sidecar.target, name)
    found = explained(client, neighbours=10**9)
    assert all(part.neighbours.shape[1] == found.read for part in found.layers)


def test_what_is_refused(edge_sidecar: Sidecar, client: RouterClient, name: str) -> None:
    build(edge_sidecar.target, name)
    with (
        client_of(edge_sidecar.target, name, OnError.FALL_BACK) as falling_back,
        pytest.raises(BadInput, match="raises when the sidecar fails"),
    ):
        explained(falling_back)
    with pytest.raises(BadInput, match="neighbours: got -1, expected 0 or more"):
        explained(client, neighbours=-1)
    with (
        RouterHooks(loaded_model().model, RetrievalPolicy(client)),
        pytest.raises(HooksInUse),
    ):
        explained(client)


def test_a_prompt_has_windows_of_its_own() -> None:
    tokenizer = loaded_model().tokenizer
    [first, *rest] = prompt_windows("Blessed are the meek" * 3, tokenizer, LENGTH)
    assert (first.ref.source, first.targets, len(rest)) == ("prompt", LENGTH - 1, 2)
    with pytest.raises(BadInput, match="none with 2 tokens"):
        prompt_windows("x", tokenizer, LENGTH)


def test_the_loss_of_each_token_adds_up() -> None:
    loaded = loaded_model()
    scores = score(loaded.model, windows_of(), None, QUIET, what="", batch_size=BATCH_SIZE)
    assert [len(tokens) for tokens in scores.token_nll] == scores.targets.tolist()
    assert [window.ref for window in scores.windows] == list(scores.examples)
    sums = [tokens.sum(dtype=np.float64) for tokens in scores.token_nll]
    np.testing.assert_allclose(sums, scores.nll_sums, rtol=1e-12)


@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_a_policy_hears_what_the_experts_follow(family: str) -> None:
    model = shared_model(family, torch.float32)
    heard = list[tuple[RouterCall, Assignment]]()

    class Policy:
        def __init__(self, reverse: bool) -> None:
            self.reverse = reverse

        def __call__(self, call: RouterCall) -> Assignment | None:
            return Assignment(call.weights.flip(1), call.experts) if self.reverse else None

        def routed(self, call: RouterCall, now: Assignment) -> None:
            heard.append((call, now))

    for reverse in (False, True):
        heard.clear()
        with torch.no_grad(), RouterHooks(model, Policy(reverse)):
            model(input_ids=prompt())
        assert heard
        for call, now in heard:
            torch.testing.assert_close(now.experts, call.experts)
            expected = call.weights.flip(1) if reverse else call.weights
            torch.testing.assert_close(now.weights, expected)
