"""What a memory does to predictions: by sequence and class of token, calibration, what it repeats and leans to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from model_runner.evaluation.per_token import by_class, classes_of
from model_runner.experiments.arms import fitted_memory, preset_setting
from model_runner.experiments.registry import Experiment
from model_runner.experiments.results import Row, change
from model_runner.experiments.study import Study
from model_runner.experiments.sweeps import BOTH
from model_runner.router_hooks import Policy, RouterHooks
from model_runner.scoring import Scores
from model_runner.texts import Window, batched, make_batch

BUCKETS = ("low", "middle", "high")
_ECE_BINS = 15
# Tokens of a generated text, and of the prompt before it.
_GENERATED, _PROMPT = 64, 32
_REPEATED, _COPIED = 4, 8
_EVERYTHING = slice(None)


def restricted(scores: Scores, numbers: Iterable[int], span: slice = _EVERYTHING) -> Scores:
    """Of some windows, and of a span of each one's targets."""
    numbers = [int(n) for n in numbers]
    tokens = tuple(scores.token_nll[n][span] for n in numbers)
    return Scores(
        np.array([t.sum(dtype=np.float64) for t in tokens]),
        np.array([len(t) for t in tokens], dtype=np.float64),
        tuple(scores.examples[n] for n in numbers),
        tuple(scores.windows[n] for n in numbers),
        tokens,
    )


def perplexity_rows(study: Study, _part: str) -> Iterator[Row]:
    """Thirds of the test sequences by the plain model's loss.

    by `itself`: as in the paper, where chance alone lets high losses fall; by `first half`: measured on the second.
    """
    windows = study.texts.test
    plain, half = study.plain(windows), windows[0].targets // 2
    first, second = slice(None, half), slice(half, None)
    for method in BOTH:
        memory = fitted_memory(study, preset_setting(method))
        routed = study.score(windows, memory, method)
        for by, seen, measured in (
            ("itself", _EVERYTHING, _EVERYTHING),
            ("first half", first, second),
        ):
            every = range(len(plain.windows))
            order = np.argsort([float(plain.token_nll[n][seen].mean()) for n in every])
            for bucket, numbers in zip(BUCKETS, np.array_split(order, len(BUCKETS)), strict=True):
                before, after = (restricted(s, numbers, measured) for s in (plain, routed))
                names = {"method": method, "by": by, "bucket": bucket, "plain": before.nll}
                yield {**names, "domain": change(after, before, study.seed)}


def token_class_rows(study: Study, _part: str) -> Iterator[Row]:
    """White space, punctuation, digits, words."""
    for method in BOTH:
        memory = fitted_memory(study, preset_setting(method))
        for text, windows in (
            ("domain", study.texts.test),
            ("general", study.texts.general_test),
        ):
            plain, routed = study.plain(windows), study.score(windows, memory, method)
            classes = classes_of(plain.windows, study.loaded.tokenizer)
            losses = (np.concatenate(each.token_nll) for each in (plain, routed))
            for name, found in by_class(classes, *losses).items():
                yield {"method": method, "text": text, "class": name, **asdict(found)}


def logits_of(
    study: Study, windows: Sequence[Window], policy: Policy | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per batch, of the tokens that count: logits [n, V] in f32, and the targets [n]."""
    model = study.loaded.model
    for group in batched(windows, study.sizes.batch_size):
        batch = make_batch(group, study.loaded.device)
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with torch.no_grad(), RouterHooks(model, policy or (lambda _call: None)):
            logits = model(**given, use_cache=False).logits
        targets = batch.input_ids.roll(-1, dims=1)[batch.predicts]
        yield logits[batch.predicts].float(), targets


def predictions(study: Study, windows: Sequence[Window], policy: Policy | None) -> Row:
    """Calibration and leaning of the next-token distribution, over all tokens that count.

    ece: expected calibration error of the likeliest token in 15 bins. bias: total variation between the mean
    distribution and the frequencies of the text's tokens.
    """
    confidences, right, entropies, total = [], [], [], 0
    mean, counts = torch.zeros(()), torch.zeros((), dtype=torch.long)
    for logits, targets in logits_of(study, windows, policy):
        p = logits.softmax(-1)
        best = p.max(-1)
        confidences.append(best.values)
        right.append(best.indices == targets)
        entropies.append(-(p * p.clamp_min(1e-30).log()).sum(-1))
        mean = mean + p.double().sum(0)
        counts = counts + torch.bincount(targets, minlength=p.shape[1])
        total += len(targets)
    confidence, correct = torch.cat(confidences).cpu(), torch.cat(right).float().cpu()
    return {
        "tokens": total,
        "ece": expected_calibration_error(confidence, correct),
        "accuracy": float(correct.mean()),
        "confidence": float(confidence.mean()),
        "entropy": float(torch.cat(entropies).mean()),
        "bias": float((mean / total - counts / total).abs().sum() / 2),
    }


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = _ECE_BINS) -> float:
    """Of n confidences in [0, 1] and 0 or 1 each: the mean distance of their means, by bins of equal width."""
    number = (confidence * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins).scatter_add(0, number, confidence - correct)
    return float(gaps.abs().sum() / len(confidence))


def generated(study: Study, windows: Sequence[Window], policy: Policy | None) -> list[list[int]]:
    """A sampled continuation of each window's beginning, at temperature 1, drawn by the study's seed."""
    model, found = study.loaded.model, list[list[int]]()
    for group in batched(windows, study.sizes.batch_size):
        prompts = torch.tensor([w.token_ids[:_PROMPT] for w in group], device=study.loaded.device)
        with torch.random.fork_rng(), RouterHooks(model, policy or (lambda _call: None)):
            torch.manual_seed(study.seed)
            texts = model.generate(  # type: ignore[operator]
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                min_new_tokens=_GENERATED,
                max_new_tokens=_GENERATED,
                pad_token_id=0,
            )
        found += texts[:, _PROMPT:].tolist()
    return found


def n_grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """In order."""
    return [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]


def repetition(texts: Sequence[Sequence[int]], known: set[tuple[int, ...]]) -> Row:
    """repeated: 4-grams that the same text had before; copied: 8-grams that the reference has."""
    grams = [n_grams(text, _REPEATED) for text in texts]
    repeated = sum(len(each) - len(set(each)) for each in grams)
    longer = [gram for text in texts for gram in n_grams(text, _COPIED)]
    return {
        "repeated": repeated / sum(len(each) for each in grams),
        "copied": sum(gram in known for gram in longer) / len(longer),
    }


def calibration_rows(study: Study, _part: str) -> Iterator[Row]:
    """The plain model and the memories: calibration on both texts; repetition and copying of what is generated."""
    policies: dict[str, Policy | None] = {"plain": None}
    policies |= {name: fitted_memory(study, preset_setting(name)) for name in BOTH}
    reference = {gram for w in study.texts.reference for gram in n_grams(w.token_ids, _COPIED)}
    windows = study.texts.test[: study.sizes.prompts]
    for name, policy in policies.items():
        for text, scored in (
            ("domain", study.texts.test),
            ("general", study.texts.general_test),
        ):
            yield {"method": name, "text": text, **predictions(study, scored, policy)}
        written = repetition(generated(study, windows, policy), reference)
        yield {"method": name, "text": "generated", **written}
    truth = [w.token_ids[_PROMPT : _PROMPT + _GENERATED] for w in windows]
    yield {"method": "the text itself", "text": "generated", **repetition(truth, reference)}


EXPERIMENTS = (
    Experiment(
        "perplexity",
        "Do sequences with a high loss gain more? (The paper: those gain most, easy ones nothing.)",
        perplexity_rows,
    ),
    Experiment(
        "token-classes", "Which tokens gain: layout, punctuation or words?", token_class_rows
    ),
    Experiment(
        "calibration",
        "Are predictions as well calibrated with a memory, and does it repeat, copy or lean to some tokens?",
        calibration_rows,
    ),
)
