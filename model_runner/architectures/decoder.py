"""The part of a model that runs its text layers, and the batch that it is running.

Routers see tokens flattened to `[B*S, d]` and never the padding mask; the decoder sees both.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder of `model`: without the language head, without any vision tower."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) else model


class BatchWatch:
    """Shape and padding of the forward pass that is running.

    Attributes:
        batch_shape: (B, S) of the tokens now in the decoder; None outside a forward pass.
        valid: `[B*S]` bool, False on padding; None when no 2-D attention mask was given. A mask
            that transformers has already expanded to 4-D (static caches) is not read.

    """

    def __init__(self) -> None:
        self.batch_shape: tuple[int, int] | None = None
        self.valid: Tensor | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Follows the decoder of `model` until the block is left."""
        decoder = decoder_of(model)
        before = decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        after = decoder.register_forward_hook(self._after, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self.batch_shape = self.valid = None

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _named_arguments(decoder, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        self.batch_shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
        self.valid = _valid_tokens(given.get("attention_mask"), self.batch_shape)

    def _after(self, *_call: Any) -> None:
        self.batch_shape = self.valid = None


def _named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    if not args:
        return kwargs
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def _valid_tokens(mask: Any, batch_shape: tuple[int, int] | None) -> Tensor | None:
    if batch_shape is None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    sequence_length = batch_shape[1]
    if mask.shape[0] != batch_shape[0] or mask.shape[1] < sequence_length:
        return None
    # With a KV cache the mask also covers the past: the current tokens are its last columns.
    return mask[:, mask.shape[1] - sequence_length :].to(torch.bool).reshape(-1)
