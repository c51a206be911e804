"""Loads a frozen model and its tokenizer, and makes sure that its routers can be hooked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model_runner.errors import BadInput
from model_runner.fingerprint import ModelFingerprint, model_fingerprint
from model_runner.router_hooks import verify_hooks


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device, its tokenizer, its fingerprint."""

    name: str
    model: nn.Module
    tokenizer: Any
    fingerprint: ModelFingerprint

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return next(self.model.parameters()).device


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Loads a local path or hub name with transformers; hooks are verified by one dummy pass.

    device: "auto" (an accelerator when there is one), "cpu", "cuda", ... dtype: "auto" (the checkpoint's; f32 on a
    CPU), "float32", "bfloat16", "float16". Raises BadInput naming the model, UnsupportedModel, HookBypassed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = pick_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=_dtype(dtype, where))
    except (OSError, ValueError) as error:
        hint = "" if Path(name).exists() else " (not a local directory; is the hub reachable?)"
        raise BadInput(f"model {name!r} cannot be loaded{hint}: {error}") from error
    model = model.to(where).eval().requires_grad_(False)
    verify_hooks(model)
    return LoadedModel(name, model, tokenizer, model_fingerprint(model))


def pick_device(device: str) -> torch.device:
    """The device of that name; "auto": the accelerator that torch finds, else the CPU. Raises BadInput."""
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {device!r} cannot be used: {error}") from error


def _dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise BadInput(f"dtype: got {dtype!r}, expected auto, float32, bfloat16 or float16")
    return found
