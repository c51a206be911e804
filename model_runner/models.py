"""Loads a frozen model and its tokenizer, and makes sure that its routers can be hooked."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from knnmoe.fingerprint import ModelFingerprint
from torch import nn

from model_runner.architectures.discovery import decoder_of
from model_runner.errors import BadInput, UnsupportedLibrary
from model_runner.fingerprint import model_fingerprint
from model_runner.router_hooks import verify_hooks

log = logging.getLogger(__name__)

CONFIG = "config.json"
# A gradient pass keeps every layer's activations, so a longer window costs memory before it helps.
DEFAULT_WINDOW = 512
TRANSFORMERS = ">=5.16.1,<5.24"
"""Versions that the tests pass with; the `runner` extra asks for the same."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    CPU), "float32", "bfloat16", "float16". Raises BadInput naming the model, UnsupportedModel, UnsupportedLibrary,
    HookBypassed.
    """
    _require_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = pick_device(device)
    load_as = _dtype(dtype, where)
    found = _found(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(found)
        model = AutoModelForCausalLM.from_pretrained(found, dtype=load_as).to(where)
    except Exception as error:  # parsers of several libraries, over files that may hold anything
        raise BadInput(f"model {name!r} cannot be loaded: {error}") from error
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise BadInput(
            f"model {name!r} cannot be loaded: its tokenizer's files are missing or empty"
        )
    _require_embeddings(name, tokenizer, model)
    model = model.eval().requires_grad_(False)
    verify_hooks(model)
    return LoadedModel(name, model, tokenizer, model_fingerprint(model))


def _require_transformers() -> None:
    """Raises UnsupportedLibrary when the installed version is not one of TRANSFORMERS."""
    from packaging.specifiers import SpecifierSet

    found = version("transformers")  # not by its import, which may fail before it says so
    if not SpecifierSet(TRANSFORMERS).contains(found, prereleases=True):
        raise UnsupportedLibrary(
            f"transformers {found} is not supported, expected {TRANSFORMERS}: "
            f"pip install 'transformers{TRANSFORMERS}'"
        )


def _require_embeddings(name: str, tokenizer: Any, model: nn.Module) -> None:
    """Raises BadInput when the tokenizer makes ids that the model has no embedding for."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows, (token, largest) = (
        len(embeddings.weight),
        max(tokenizer.get_vocab().items(), key=lambda item: item[1]),
    )
    if largest >= rows:
        raise BadInput(
            f"model {name!r} cannot be used: its tokenizer makes token ids up to {largest} ({token!r}), the model has "
            f"embeddings for {rows}; take the tokenizer that it was trained with, or save the model after "
            "model.resize_token_embeddings(len(tokenizer))"
        )


def _found(name: str) -> str:
    """What transformers is to load: the name, or its directory in the hub's cache when the hub is away.

    Raises BadInput at once for a model that is nowhere.

    The hub is asked once: transformers would ask for several files and try again for half a minute with each.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    if name and Path(name).is_dir():
        return name
    if Path(name).is_file():
        raise BadInput(f"model {name!r} cannot be loaded: it is a file, expected its directory")
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG))
    except HFValidationError as error:
        raise _not_there(name) from error
    except GatedRepoError as error:
        raise BadInput(
            f"model {name!r} cannot be loaded: the hub gives it to those who accepted its terms; accept them on its "
            "page there, then set HF_TOKEN"
        ) from error
    except EntryNotFoundError:
        return name  # what it lacks is said when it is loaded
    except RepositoryNotFoundError as error:
        raise _not_there(
            name, "nor one of that name at the hub (a private one needs HF_TOKEN)"
        ) from error
    except Exception as error:  # of whichever HTTP library
        cached = try_to_load_from_cache(name, CONFIG)
        if not isinstance(cached, str):
            why = f"nor is it in the hub's cache, and the hub cannot be reached ({error})"
            raise _not_there(name, why) from error
        log.info("model %r is loaded from the hub's cache: %s", name, error)
        return str(Path(cached).parent)
    return name


def _not_there(name: str, also: str = "") -> BadInput:
    """One line, with what is near: directories beside it that hold a model, and what the hub's cache has."""
    from huggingface_hub.constants import HF_HUB_CACHE

    beside = Path(name).parent
    there = [str(file.parent) for file in beside.glob(f"*/{CONFIG}")] if name else []
    marked = "models--"
    cached = [
        d.name.removeprefix(marked).replace("--", "/")
        for d in Path(HF_HUB_CACHE).glob(f"{marked}*")
    ]
    folded = {one.casefold(): one for one in (*cached, *there)}
    near = [folded[one] for one in get_close_matches(name.casefold(), folded, cutoff=0.7)]
    where = "there is no such directory" + (f" here, {also}" if also else "")
    hint = f"; near it: {', '.join(near)}" if near else ""
    return BadInput(f"model {name!r} cannot be loaded: {where}{hint}")


def longest_text(model: nn.Module) -> int | None:
    """Tokens that the model was made for; None when its config does not say."""
    config = getattr(decoder_of(model), "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def window_length(model: nn.Module, asked: int | None) -> int:
    """Tokens of a window: `asked`, or as many as the model was made for, at most 512. Raises BadInput above that."""
    longest = longest_text(model)
    if longest is None:
        return asked or DEFAULT_WINDOW
    if asked is not None and asked > longest:
        raise BadInput(f"window: got {asked} tokens, expected at most the model's {longest}")
    return asked or min(DEFAULT_WINDOW, longest)


def pick_device(device: str) -> torch.device:
    """The device of that name; "auto": the accelerator that torch finds, else the CPU. Raises BadInput."""
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {device!r} cannot be used: {error}") from error
    if found.type == "meta":
        raise BadInput("device 'meta' cannot be used: it holds no weights")
    return found


def _dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise BadInput(f"dtype: got {dtype!r}, expected auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
