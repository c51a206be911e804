"""Fine-tuning on the same reference: routers only, the last router, all weights, or LoRA's adapters.

AdamW without weight decay, gradients cut at norm 1, the learning rate rising over 10 steps and falling to 5 %; after
each epoch the weights are a candidate. No loss for balancing experts. Weights are trained in the model's dtype: half
precision loses small steps. The model's own weights come back bit for bit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model_runner.architectures.discovery import find_router_sites
from model_runner.errors import UnsupportedLibrary
from model_runner.experiments.arms import Scorer
from model_runner.experiments.choosing import Candidate
from model_runner.experiments.study import Study
from model_runner.texts import Window, make_batch, token_nll

WARM_UP_STEPS = 10
LEAST_RATE = 0.05
LARGEST_NORM = 1.0

# Within it, these parameters of a model are trained; afterwards the model is as before. `seed` draws new ones.
Opened = Callable[[nn.Module, int], AbstractContextManager[list[nn.Parameter]]]
Which = Callable[[nn.Module], list[nn.Parameter]]


def routers(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of all routers."""
    return [p for site in find_router_sites(model) for p in site.router.parameters()]


def last_router(model: nn.Module) -> list[nn.Parameter]:
    """Those of the last MoE layer's."""
    return list(find_router_sites(model)[-1].router.parameters())


def all_weights(model: nn.Module) -> list[nn.Parameter]:
    """All parameters."""
    return list(model.parameters())


@contextmanager
def in_place(which: Which, model: nn.Module, _seed: int) -> Iterator[list[nn.Parameter]]:
    """Some of the model's own weights, which come back as they were."""
    chosen = [p for p in which(model) if p.is_floating_point()]
    before = [p.detach().clone() for p in chosen]
    wanted = [p.requires_grad for p in chosen]
    try:
        yield chosen
    finally:
        with torch.no_grad():
            for parameter, value, wants in zip(chosen, before, wanted, strict=True):
                parameter.copy_(value)
                parameter.grad = None
                parameter.requires_grad_(wants)


@contextmanager
def adapters(rank: int, model: nn.Module, seed: int) -> Iterator[list[nn.Parameter]]:
    """LoRA beside every linear layer and the experts' weights; routers and the language head have none.

    Raises UnsupportedLibrary when peft is not installed.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise UnsupportedLibrary("LoRA needs peft: pip install 'knn-moe[eval]'") from error
    linear, weights = _adapted(model)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=linear, target_parameters=weights
    )
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        adapted: Any = LoraModel(model, config, "knn_moe")
    try:
        yield [p for p in model.parameters() if p.requires_grad]
    finally:
        adapted.unload()
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)


def _adapted(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the linear layers, and of the experts' weights that belong to none."""
    sites = find_router_sites(model)
    left_out = {m for site in sites for m in site.router.modules()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in left_out and module is not head
    ]
    of_experts = {m for site in sites if site.experts is not None for m in site.experts.modules()}
    weights = [
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if module in of_experts and not isinstance(module, nn.Linear)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]
    return linear, weights


@dataclass(frozen=True, slots=True)
class FineTuning:
    """A Method: the learning rate and the number of epochs are chosen on dev.

    Attributes:
        rates: learning rates.

    """

    name: str
    opened: Opened
    rates: tuple[float, ...]
    epochs: int = 3
    batch_size: int = 16

    def candidates(self, study: Study) -> Iterator[Candidate]:
        """As of Method."""
        model = study.loaded.model
        for rate in self.rates:
            with self.opened(model, study.seed) as trained:
                elapsed_s = 0.0
                run = Run(study, trained, rate, self.epochs, self.batch_size)
                for epoch in range(1, self.epochs + 1):
                    started = time.perf_counter()
                    run.epoch(f"{self.name} {rate:g}")
                    elapsed_s += time.perf_counter() - started
                    yield self._candidate(study, trained, rate, epoch, elapsed_s)

    def _candidate(
        self, study: Study, trained: Sequence[nn.Parameter], rate: float, epoch: int, fit_s: float
    ) -> Candidate:
        score: Scorer = partial(study.score, policy=None, what=self.name)

        def kept() -> Callable[[], AbstractContextManager[Scorer]]:
            return partial(self._again, study, [p.detach().clone() for p in trained])

        # Beside the model: a copy of what is trained, its gradient, and the two moments of Adam.
        held = 4 * sum(p.nbytes for p in trained)
        numbers = sum(p.numel() for p in trained)
        return Candidate({"rate": rate, "epochs": epoch}, score, kept, numbers, held, fit_s)

    @contextmanager
    def _again(self, study: Study, values: Sequence[Tensor]) -> Iterator[Scorer]:
        with self.opened(study.loaded.model, study.seed) as trained:
            with torch.no_grad():
                for parameter, value in zip(trained, values, strict=True):
                    parameter.copy_(value)
            yield partial(study.score, policy=None, what=self.name)


class Run:
    """One training run."""

    def __init__(
        self,
        study: Study,
        trained: Sequence[nn.Parameter],
        rate: float,
        epochs: int,
        batch_size: int,
    ) -> None:
        self._study, self._trained, self._batch_size = study, trained, batch_size
        self._order = random.Random(f"{study.seed}/fine-tuning")
        self._optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        steps = epochs * -(-len(study.texts.reference) // batch_size)

        def share(step: int) -> float:
            return min(1.0, (step + 1) / WARM_UP_STEPS) * max(LEAST_RATE, 1 - step / steps)

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, share)

    def epoch(self, what: str) -> None:
        """Once over the reference, in a new order."""
        windows = list(self._study.texts.reference)
        self._order.shuffle(windows)
        size = self._batch_size
        groups = [windows[start : start + size] for start in range(0, len(windows), size)]
        for parameter in self._trained:
            parameter.requires_grad_(True)
        for group in self._study.progress.track(groups, what, "steps"):
            self._step(group)
        for parameter in self._trained:  # scores keep no graph of their own
            parameter.grad = None

    def _step(self, windows: Sequence[Window]) -> None:
        loaded = self._study.loaded
        batch = make_batch(windows, loaded.device)
        with torch.enable_grad():
            logits = loaded.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
            loss = token_nll(logits, batch).sum() / batch.predicts.sum()
            torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._trained, LARGEST_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)


ROUTERS = FineTuning("router-ft", partial(in_place, routers), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2))
LAST_ROUTER = FineTuning("last-router-ft", partial(in_place, last_router), (1e-3, 3e-3, 1e-2, 3e-2))
LORA = FineTuning("lora", partial(adapters, 8), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2))
FULL = FineTuning("full-ft", partial(in_place, all_weights), (3e-5, 1e-4, 3e-4, 1e-3, 3e-3))
