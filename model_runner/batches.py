"""Windows as padded tensors, and the loss per token on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model_runner.texts import Window


@dataclass(frozen=True, slots=True)
class Batch:
    """B windows, padded on the right to S tokens.

    Attributes:
        input_ids: [B, S] int64.
        attention_mask: [B, S] int64, 0 on padding.
        predicts: [B, S] bool: the token after this one has a loss that counts.

    """

    windows: tuple[Window, ...]
    input_ids: Tensor
    attention_mask: Tensor
    predicts: Tensor


def make_batch(windows: Sequence[Window], device: torch.device) -> Batch:
    """Pads with token 0, which the attention mask hides."""
    longest = max(len(w.token_ids) for w in windows)
    input_ids = torch.zeros(len(windows), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    predicts = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, window in enumerate(windows):
        n = len(window.token_ids)
        input_ids[row, :n] = torch.tensor(window.token_ids)
        mask[row, :n] = 1
        predicts[row, window.first_target - 1 : n - 1] = True
    return Batch(tuple(windows), input_ids.to(device), mask.to(device), predicts.to(device))


def token_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood in nats [B, S] of each token's successor; 0 where `predicts` is False.

    logits: [B, S, V], any float dtype; the loss is taken in f32.
    """
    targets = batch.input_ids[:, 1:]
    flat = logits[:, :-1].float().flatten(0, 1)
    nll = F.cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)
    return F.pad(nll, (0, 1)).where(batch.predicts, 0.0)
