"""A routing memory and a kNN-LM in one pass: the neighbours of the last layer also vote for the next token.

The kNN-LM's datastore (Khandelwal et al., 2020) has the inputs of the last feed-forward block as keys. These are the
router inputs that the memory's last layer looks up anyway, so that votes cost no second search.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from model_runner.architectures import Assignment
from model_runner.experiments.boosted import BOOSTED, SETTING, boosted, memory_of
from model_runner.experiments.local import LocalMemory, Traces
from model_runner.experiments.registry import Experiment
from model_runner.experiments.results import Row, change
from model_runner.experiments.study import Study
from model_runner.experiments.sweeps import worth
from model_runner.router_hooks import Logits, RouterCall
from model_runner.scoring import Scores, by_window, losses
from model_runner.texts import Batch, Window

# Of the votes in the mixture; sharpness: power of the similarities that votes are weighed by.
WEIGHTS = (0.05, 0.1, 0.2, 0.4)
SHARPNESS = (1.0, 4.0)
_TINY = 1e-12


class VotingMemory(LocalMemory):
    """A memory whose last layer keeps what it found.

    Args:
        memory: its entries and how they are read.
        successors: int64 [n], the token after each entry's own.
        routes: False: the model's own routing stands; only votes are taken.

    """

    def __init__(self, memory: LocalMemory, successors: Tensor, *, routes: bool) -> None:
        super().__init__(memory.keys, memory.values, memory.gammas, memory.setting)
        self._successors, self._routes = successors, routes
        self.found: tuple[Tensor, Tensor] | None = None

    @override
    def __call__(self, call: RouterCall) -> Assignment | Logits | None:
        reply = super().__call__(call)
        return reply if self._routes else None

    @override
    def neighbours(
        self, layer: int, queries: Tensor, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        found = super().neighbours(layer, queries, excluded)
        if layer == len(self.keys) - 1:
            self.found = found
        return found

    def share(self, batch: Batch, sharpness: float) -> tuple[Tensor, Tensor]:
        """Of the pass that has just been: the votes' share [B, S] for the true successor, and lambda [B, S]."""
        assert self.found is not None  # noqa: S101
        similarity, nearest = self.found
        right = self._successors[nearest] == batch.input_ids.roll(-1, 1).flatten()[:, None]
        votes = similarity.pow(sharpness)
        total = similarity.sum(1)
        shares = (votes * right).sum(1) / votes.sum(1).clamp_min(_TINY)
        lambdas = total / (total + self.setting.null_weight)
        return shares.view(batch.predicts.shape), lambdas.view(batch.predicts.shape)


@dataclass(frozen=True, slots=True)
class Mixture:
    """How much the votes count: a constant, or in proportion to lambda, which is small where nothing is near."""

    weight: float
    sharpness: float
    by_lambda: bool

    def nll(self, nll: Tensor, batch: Batch, memory: VotingMemory) -> Tensor:
        """Nats [B, S] of the mixture with the model's own, of which nll [B, S] is given."""
        shares, lambdas = memory.share(batch, self.sharpness)
        weight = self.weight * lambdas if self.by_lambda else torch.full_like(lambdas, self.weight)
        mixed = (1 - weight) * torch.exp(-nll) + weight * shares
        return (-mixed.clamp_min(_TINY).log()).where(batch.predicts, 0.0)


def mixed_scores(
    study: Study, windows: Sequence[Window], memory: VotingMemory, mixtures: Sequence[Mixture]
) -> list[Scores]:
    """Of each mixture, by one pass."""
    parts: list[list[tuple[Batch, Tensor]]] = [[] for _ in mixtures]
    size = study.sizes.batch_size
    passed = losses(
        *(study.loaded.model, windows, memory, study.progress), what="votes", batch_size=size
    )
    for batch, nll in passed:
        for part, mixture in zip(parts, mixtures, strict=True):
            part.append((batch, mixture.nll(nll, batch, memory)))
    return [_scores(part) for part in parts]


def _scores(scored: Sequence[tuple[Batch, Tensor]]) -> Scores:
    order = [window for batch, _ in scored for window in batch.windows]
    tokens = [
        rows
        for batch, nll in scored
        for rows in by_window(nll[batch.predicts].cpu().numpy(), batch.windows)
    ]
    return Scores(
        np.array([rows.sum(dtype=np.float64) for rows in tokens]),
        np.array([w.targets for w in order], dtype=np.float64),
        tuple(w.ref for w in order),
        tuple(order),
        tuple(tokens),
    )


def successors_of(traces: Traces) -> Tensor:
    """int64 [n] in the order of the traces' rows."""
    return torch.tensor([w.token_ids[at] for w in traces.windows for at in w.target_at])


def together_rows(study: Study, _part: str) -> Iterator[Row]:
    """The boosted memory, votes and both; how much votes count is chosen on dev, then reported on test."""
    found = boosted(study, BOOSTED.rounds)
    memory = memory_of(found.kept, found.gammas, SETTING)
    successors = successors_of(study.traces())
    grid = [Mixture(*each) for each in itertools.product(WEIGHTS, SHARPNESS, (False, True))]
    nothing = Mixture(0.0, 1.0, by_lambda=False)
    for name, routes, tried in (
        ("memory", True, [nothing]),
        ("votes", False, grid),
        ("both", True, grid),
    ):
        voting = VotingMemory(memory, successors, routes=routes)
        dev = _rows(study, voting, tried, "dev")
        best = max(range(len(tried)), key=lambda n: worth(dev[n]))
        for mixture, row in zip(tried, dev, strict=True):
            yield {"method": name, **_names(mixture), **row}
        [test] = _rows(study, voting, [tried[best]], "test")
        yield {"method": name, **_names(tried[best]), **test, "chosen": True}


def _rows(study: Study, voting: VotingMemory, mixtures: Sequence[Mixture], split: str) -> list[Row]:
    rows: list[Row] = [{"split": split} for _ in mixtures]
    texts = {"domain": split, "general": f"general_{split}"}
    for column, windows in ((name, getattr(study.texts, of)) for name, of in texts.items()):
        for row, scores in zip(rows, mixed_scores(study, windows, voting, mixtures), strict=True):
            row[column] = change(scores, study.plain(windows), study.seed)
    return rows


def _names(mixture: Mixture) -> Row:
    by = "lambda" if mixture.by_lambda else "constant"
    return {"weight": mixture.weight, "sharpness": mixture.sharpness, "weighed_by": by}


EXPERIMENTS = (
    Experiment(
        "together",
        "Do a routing memory and a kNN-LM add up, when the memory's own neighbours vote for the next token?",
        together_rows,
    ),
)
