"""Few-shot by retrieval: reference text that is nearest to what was read so far stands before it.

As in-context retrieval does (Ram et al., 2023): every quarter of a window the text so far is the query, and what is
found is prepended while the next quarter is scored, so that no query knows what it is scored on. Both fit into the
context that the model was made for, or into a window's length, where the text so far gives way: models that were
trained on windows of that length read little beyond it. The tokenizer's end of text, if it has one, stands between.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model_runner.errors import BadInput
from model_runner.experiments.choosing import Candidate, Setting
from model_runner.experiments.reading import Reading, read
from model_runner.experiments.study import Study
from model_runner.models import longest_text
from model_runner.scoring import F32, Scores
from model_runner.texts import Window, batched

# Of a window, each with a query of its own.
PARTS = 4
SEARCHES = ("lexical", "hidden")
# What a text and what stands before it fit into.
ROOMS = ("context", "window")
# Of BM25.
_K1, _B = 1.2, 0.75


class Search(Protocol):
    """What is nearest to the beginning of a window."""

    def learn(self, windows: Sequence[Window]) -> None:
        """Reads the windows that are asked about next."""

    def __call__(self, window: Window, end: int) -> int:
        """Number of the reference text that is nearest to the window's first `end` tokens."""


class Lexical:
    """BM25 over token ids."""

    def __init__(self, texts: Sequence[Window]) -> None:
        counts = [Counter(w.token_ids) for w in texts]
        known = Counter(token for each in counts for token in each)
        mean = sum(len(w.token_ids) for w in texts) / len(texts)
        self._scores: dict[int, list[tuple[int, float]]] = {}
        for number, each in enumerate(counts):
            length = _K1 * (1 - _B + _B * len(texts[number].token_ids) / mean)
            for token, count in each.items():
                rarity = math.log1p((len(texts) - known[token] + 0.5) / (known[token] + 0.5))
                weight = rarity * count * (_K1 + 1) / (count + length)
                self._scores.setdefault(token, []).append((number, weight))
        self._texts = len(texts)

    def learn(self, windows: Sequence[Window]) -> None:
        """Nothing: counts are taken when they are asked for."""

    def __call__(self, window: Window, end: int) -> int:
        """As of Search."""
        totals = np.zeros(self._texts)
        for token, times in Counter(window.token_ids[:end]).items():
            for number, weight in self._scores.get(token, ()):
                totals[number] += times * weight
        return int(totals.argmax())


class Hidden:
    """Cosine of mean hidden states, about the mean of the reference; queries as of `segments`."""

    def __init__(self, study: Study, texts: Sequence[Window], stride: int) -> None:
        self._stride = stride
        found = dict[int, Tensor]()
        for reading in read(study, texts, "mean hidden states"):
            found |= _means(reading, lambda w: (len(w.token_ids),))
        every = torch.cat([found[id(w)] for w in texts])
        self._centre = every.mean(0)
        self._texts = F.normalize(every - self._centre, dim=1)
        self._study, self._queries = study, dict[int, dict[int, Tensor]]()

    def learn(self, windows: Sequence[Window]) -> None:
        """Reads the windows that are asked about next."""
        self._queries = {}
        for reading in read(self._study, windows, "mean hidden states"):
            means = _means(reading, self._begins)
            for window in reading.batch.windows:
                of_window = zip(self._begins(window), means[id(window)], strict=True)
                self._queries[id(window)] = dict(of_window)

    def __call__(self, window: Window, end: int) -> int:
        """As of Search."""
        query = F.normalize(self._queries[id(window)][end] - self._centre, dim=0)
        return int((self._texts @ query).argmax())

    def _begins(self, window: Window) -> list[int]:
        return [begin for begin, _ in segments(window, self._stride)]


def _means(reading: Reading, ends: Callable[[Window], Sequence[int]]) -> dict[int, Tensor]:
    """By window, [n, d] mean hidden states of its first `ends` tokens."""
    means = reading.means()
    return {
        id(w): means[row, [end - 1 for end in ends(w)]]
        for row, w in enumerate(reading.batch.windows)
    }


def segments(window: Window, stride: int) -> list[tuple[int, int]]:
    """[begin, end) of the tokens that one query serves: `stride` each from the first target on."""
    starts = range(window.first_target, len(window.token_ids), stride)
    found = [(a, min(a + stride, len(window.token_ids))) for a in starts]
    return [(a, b) for a, b in found if any(a <= at < b for at in window.target_at)]


def with_context(window: Window, begin: int, end: int, before: Sequence[int], room: int) -> Window:
    """The window up to `end` after the tokens `before`, its first ones cut to fit into `room` tokens.

    The loss counts from `begin` on.
    """
    cut = max(0, min(begin - 1, len(before) + end - room))
    targets = tuple(len(before) + at - cut for at in window.target_at if begin <= at < end)
    ids = (*before, *window.token_ids[cut:end])
    return Window(window.ref, ids, targets, window.offset, window.identity, window.name)


def room_of(study: Study, name: str) -> tuple[int, int]:
    """Tokens of a text with what stands before it, and of these what stands before it at most: no more than a window.

    Raises BadInput when the model's context is no longer than a window.
    """
    window = study.sizes.length
    if name == "window":
        return window, window // 2
    longest = longest_text(study.loaded.model)
    if longest is not None and longest <= window:
        raise BadInput(
            f"window length: got {window} tokens, which is all of the model's context; expected at most {longest // 2}"
        )
    before = window if longest is None else min(window, longest - window)
    return window + before, before


def pieces(windows: Sequence[Window], size: int) -> list[Window]:
    """Reference texts of up to `size` tokens; none is shorter than half of it, but whole windows."""
    found = []
    for w in windows:
        for start in range(0, len(w.token_ids), size):
            ids = w.token_ids[start : start + size]
            if start == 0 or 2 * len(ids) >= size:
                found.append(Window(w.ref, ids, tuple(range(1, len(ids))), w.offset + start))
    return [piece for piece in found if piece.target_at]


@dataclass(frozen=True, slots=True)
class FewShot:
    """A Method: the search and the room are chosen on dev."""

    name: str = "few-shot"

    def candidates(self, study: Study) -> Iterator[Candidate]:
        """As of Method."""
        for room, kind in itertools.product(ROOMS, SEARCHES):
            tokens, most = room_of(study, room)
            started = time.perf_counter()
            texts = pieces(study.texts.reference, most - 1)
            search: Search = Lexical(texts)
            if kind == "hidden":
                search = Hidden(study, texts, study.sizes.length // PARTS)
            built_s = time.perf_counter() - started
            score = partial(score_after, study, search, texts, tokens)
            setting: Setting = {"search": kind, "room": room}
            size = sum(len(w.token_ids) * 8 for w in texts)
            yield Candidate(setting, score, peak_bytes=size, fit_s=built_s)


def score_after(
    study: Study,
    search: Search,
    texts: Sequence[Window],
    room: int,
    windows: Sequence[Window],
) -> Scores:
    """Of windows, longest first, each part of them after the text that is nearest to what comes before it.

    room: tokens of both at most.
    """
    search.learn(windows)
    end_of_text = getattr(study.loaded.tokenizer, "eos_token_id", None)
    between = () if end_of_text is None else (end_of_text,)

    def parts_of(window: Window) -> Iterator[Window]:
        for begin, end in segments(window, study.sizes.length // PARTS):
            before = (*texts[search(window, begin)].token_ids, *between)
            yield with_context(window, begin, end, before, room)

    parts = {id(window): list(parts_of(window)) for window in windows}
    scores = study.score([p for each in parts.values() for p in each], None, "few-shot")
    losses = {id(w): nll for w, nll in zip(scores.windows, scores.token_nll, strict=True)}
    return _joined(windows, {key: [losses[id(p)] for p in each] for key, each in parts.items()})


def _joined(windows: Sequence[Window], losses: Mapping[int, Sequence[F32]]) -> Scores:
    """Scores of windows, longest first, from the losses of their parts in order."""
    order = [w for group in batched(windows, len(windows)) for w in group]
    tokens = tuple(np.concatenate(losses[id(w)]) for w in order)
    return Scores(
        np.array([nll.sum(dtype=np.float64) for nll in tokens]),
        np.array([w.targets for w in order], dtype=np.float64),
        tuple(w.ref for w in order),
        tuple(order),
        tokens,
    )
