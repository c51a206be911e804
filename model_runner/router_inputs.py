"""Router inputs of texts under the plain model: what calibration measures distances from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model_runner.router_hooks import RouterCall, RouterHooks
from model_runner.texts import Window, batched, make_batch


def collect_router_inputs(
    model: nn.Module, windows: Sequence[Window], *, batch_size: int = 16, most: int = 2000
) -> dict[int, Tensor]:
    """Router inputs [n, d] by layer, n <= `most`, spread over the tokens whose loss counts."""
    device = next(model.parameters()).device
    found: dict[int, list[Tensor]] = {}
    for group in batched(windows, batch_size):
        batch = make_batch(group, device)
        keep = batch.predicts.flatten()

        def note(call: RouterCall, keep: Tensor = keep) -> None:
            found.setdefault(call.site.layer, []).append(call.router_input[keep].cpu())

        with torch.no_grad(), RouterHooks(model, note):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return {layer: _thinned(torch.cat(parts), most) for layer, parts in found.items()}


def _thinned(rows: Tensor, most: int) -> Tensor:
    stride = max(1, -(-len(rows) // most))
    return rows[::stride]
