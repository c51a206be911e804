"""Scores of windows, of the plain model and with policies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from knnmoe.client import ExampleRef

from model_runner.architectures import Assignment
from model_runner.errors import BadInput, UnsupportedModel
from model_runner.progress import Progress
from model_runner.router_hooks import RouterCall, verify_hooks
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import Scores, score
from tests.families import shared_model, tiny_model
from tests.unit.model_runner.random_windows import windows_of

QUIET = Progress(quiet=True)


def test_perplexity_is_of_the_mean_over_tokens() -> None:
    refs = (ExampleRef("s", "0"), ExampleRef("s", "1"))
    scores = Scores(np.array([4.0, 2.0]), np.array([1.0, 3.0]), refs)
    assert scores.nll == 1.5
    assert scores.perplexity == pytest.approx(math.exp(1.5))


def test_scores_are_those_of_windows_one_by_one() -> None:
    model, windows = shared_model("olmoe"), windows_of(3, 9, 5, 2)
    together = score(model, windows, None, QUIET, what="", batch_size=3)
    found = dict(zip(together.examples, together.nll_sums, strict=True))
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window.token_ids])).logits[0].double()
        picked = logits.log_softmax(-1)[range(len(window.token_ids) - 1), window.token_ids[1:]]
        assert found[window.ref] == pytest.approx(-picked.sum().item(), rel=1e-5)
    assert together.targets.tolist() == [8, 4, 2, 1]


def test_a_policy_that_says_nothing_scores_as_the_plain_model() -> None:
    model, windows = shared_model("olmoe"), windows_of(6, 4)
    plain = score(model, windows, None, QUIET, what="")
    silent = score(model, windows, lambda call: None, QUIET, what="")
    assert (silent.nll_sums == plain.nll_sums).all()


def test_a_policy_that_speaks_scores_differently() -> None:
    def one_expert(call: RouterCall) -> Assignment:
        return Assignment(call.weights[:, :1], call.experts[:, :1])

    model, windows = shared_model("olmoe"), windows_of(6, 4)
    plain = score(model, windows, None, QUIET, what="")
    assert (score(model, windows, one_expert, QUIET, what="").nll_sums != plain.nll_sums).any()


class NoMemory:
    """A client that never answers, and keeps what it was asked to leave out."""

    def __init__(self) -> None:
        self.excluded: list[list[str]] = []

    def lookup(self, *_: object, valid: object, exclude: list[ExampleRef]) -> None:
        self.excluded.append([ref.example for ref in exclude])


def test_leave_one_out_names_each_windows_example_and_ends_with_the_scores() -> None:
    client = NoMemory()
    policy = RetrievalPolicy(client)
    windows = windows_of(3, 4, 2)
    score(shared_model("olmoe"), windows, policy, QUIET, what="", batch_size=2, leave_one_out=True)
    layers = 4
    assert client.excluded == [["1", "0"]] * layers + [["2"]] * layers
    score(shared_model("olmoe"), windows, policy, QUIET, what="")
    assert client.excluded[-1] == []


def test_a_model_that_gives_nan_for_some_text() -> None:
    """Not for the few tokens with which it was loaded: its output weights are another matrix than its embeddings."""
    windows, model = windows_of(3, 4, 2), tiny_model("olmoe")
    token = windows[1].token_ids[2]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    verify_hooks(model)
    culprit = r"the model gives NaN for one of s 1, s 0, first in model\.embed_tokens; NaN is in its weights model\."
    for policy in (None, lambda call: None):
        with pytest.raises(UnsupportedModel, match=culprit):
            score(model, windows, policy, QUIET, what="", batch_size=2)


@pytest.mark.parametrize("policy", [None, lambda call: None])
def test_leave_one_out_needs_a_memory(policy: object) -> None:
    with pytest.raises(BadInput, match="needs a RetrievalPolicy"):
        score(shared_model("olmoe"), windows_of(3), policy, QUIET, what="", leave_one_out=True)
