"""What the plain model knows of texts, batch by batch: losses, hidden states, what its routers saw and decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_runner.architectures.discovery import decoder_of
from model_runner.experiments.study import Study
from model_runner.models import LoadedModel
from model_runner.router_hooks import RouterCall, RouterHooks
from model_runner.texts import Batch, Window, batched, make_batch, token_nll


@dataclass(frozen=True, slots=True)
class Reading:
    """One batch, read by the plain model.

    Attributes:
        nll: f32 [B, S] as of token_nll.
        right: bool [B, S]: the most likely successor is the one that the text has, and its loss counts.
        hidden: f32 [B, S, d] of the decoder's output.
        calls: of the routers, by layer.

    """

    batch: Batch
    nll: Tensor
    right: Tensor
    hidden: Tensor
    calls: tuple[RouterCall, ...]

    def means(self) -> Tensor:
        """f32 [B, S, d]: the mean of a sequence's hidden states up to each token; it knows nothing of what follows."""
        counts = torch.arange(1, self.hidden.shape[1] + 1, device=self.hidden.device)
        return self.hidden.cumsum(1) / counts[None, :, None]


def read(study: Study, windows: Sequence[Window], what: str) -> Iterator[Reading]:
    """Readings of windows, longest first."""
    groups = list(batched(windows, study.sizes.batch_size))
    for group in study.progress.track(groups, what, "batches"):
        yield read_batch(study.loaded, make_batch(group, study.loaded.device))


def read_batch(loaded: LoadedModel, batch: Batch) -> Reading:
    """One batch."""
    calls, states = list[RouterCall](), list[Tensor]()

    def keep(_decoder: Any, _args: Any, output: Any) -> None:
        states.append(output[0])

    handle = decoder_of(loaded.model).register_forward_hook(keep)
    try:
        with torch.no_grad(), RouterHooks(loaded.model, calls.append) as hooks:
            logits = loaded.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
            hooks.assert_complete()
    finally:
        handle.remove()
    likely = logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]
    right = torch.nn.functional.pad(likely, (0, 1)) & batch.predicts
    return Reading(batch, token_nll(logits, batch), right, states[0].float(), tuple(calls))
