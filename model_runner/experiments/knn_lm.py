"""kNN-LM (Khandelwal et al., 2020) on the same reference: neighbours of a context vote for the next token.

Exact search; K = 16. The weight of the neighbours' vote, its temperature and which state is the key are chosen on dev.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model_runner.experiments.choosing import Candidate, Setting
from model_runner.experiments.local import squared_distances
from model_runner.experiments.reading import Reading, read
from model_runner.experiments.study import Study
from model_runner.scoring import Scores, collected
from model_runner.texts import Batch, Window

# The input of the last feed-forward block, as in the paper; or what the language head sees.
KEYS = ("feed-forward input", "output")
WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
# Of the median squared distance to the nearest key.
TEMPERATURES = (4.0, 1.0)
_TINY = 1e-12


def keys_of(reading: Reading, key: str) -> Tensor:
    """f32 [B, S, d]."""
    if key == KEYS[1]:
        return reading.hidden
    return reading.calls[-1].router_input.float().view(reading.hidden.shape)


@dataclass(frozen=True, slots=True)
class Found:
    """A batch's neighbours.

    Attributes:
        nll: f32 [B, S] of the plain model.
        distances: f32 [B, S, K], squared.
        votes: bool [B, S, K]: the neighbour's successor is the one that the text has.

    """

    batch: Batch
    nll: Tensor
    distances: Tensor
    votes: Tensor


class Datastore:
    """Contexts of a reference and their successors.

    Attributes:
        key: one of KEYS.

    """

    def __init__(self, study: Study, key: str, neighbours: int) -> None:
        self.key, self._study, self._neighbours = key, study, neighbours
        keys, successors = list[Tensor](), list[Tensor]()
        for reading in read(study, study.texts.reference, "datastore"):
            predicts = reading.batch.predicts
            keys.append(keys_of(reading, key)[predicts])
            successors.append(reading.batch.input_ids.roll(-1, 1)[predicts])
        self._keys, self._successors = torch.cat(keys), torch.cat(successors)
        self._square_norms = self._keys.square().sum(1)

    @property
    def nbytes(self) -> int:
        """Of keys and successors."""
        return self._keys.nbytes + self._successors.nbytes

    def search(self, windows: Sequence[Window]) -> Iterator[Found]:
        """Neighbours of every token of windows, longest first."""
        for reading in read(self._study, windows, "kNN-LM"):
            shape = reading.nll.shape
            distances, rows = squared_distances(
                keys_of(reading, self.key).flatten(0, 1),
                self._keys,
                self._square_norms,
                min(self._neighbours, len(self._keys)),
            )
            successors = reading.batch.input_ids.roll(-1, 1).flatten()[:, None]
            votes = self._successors[rows] == successors
            yield Found(
                reading.batch, reading.nll, distances.view(*shape, -1), votes.view(*shape, -1)
            )


def mixed(found: Found, weight: float, temperature: float) -> Tensor:
    """NLL f32 [B, S] of (1 - weight) p_model + weight p_neighbours, 0 where it does not count.

    temperature: of the softmax over negative squared distances.
    """
    votes = torch.softmax(-found.distances / temperature, -1) * found.votes
    mixture = (1 - weight) * torch.exp(-found.nll) + weight * votes.sum(-1)
    return (-mixture.log()).where(found.batch.predicts, 0.0)


@dataclass(frozen=True, slots=True)
class KnnLm:
    """A Method."""

    neighbours: int = 16
    name: str = "knn-lm"

    def candidates(self, study: Study) -> Iterator[Candidate]:
        """As of Method."""
        for key in KEYS:
            started = time.perf_counter()
            store = Datastore(study, key, self.neighbours)
            built_s = time.perf_counter() - started
            texts = study.texts
            # Their neighbours are those of every weight and temperature.
            known = {id(w): list(store.search(w)) for w in (texts.dev, texts.general_dev)}
            nearest = [f.distances[..., 0][f.batch.predicts] for f in known[id(texts.dev)]]
            median = float(torch.cat(nearest).median())
            for weight, share in itertools.product(WEIGHTS, TEMPERATURES):
                score = partial(_score, store, known, weight, max(share * median, _TINY))
                setting: Setting = {"key": key, "weight": weight, "temperature": share}
                yield Candidate(setting, score, peak_bytes=store.nbytes, fit_s=built_s)


def _score(
    store: Datastore,
    known: Mapping[int, list[Found]],
    weight: float,
    temperature: float,
    windows: Sequence[Window],
) -> Scores:
    found = known.get(id(windows)) or store.search(windows)
    return collected((f.batch, mixed(f, weight, temperature)) for f in found)
