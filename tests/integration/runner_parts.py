"""A tiny model, a reference text and memories of it, for tests of the model runner against real services."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from knnmoe import tensors
from knnmoe.client import AdminClient, ExampleRef
from knnmoe.v1.types_pb2 import MemorySettings, Provenance
from numpy.typing import NDArray
from torch import Tensor

from model_runner.architectures import Assignment
from model_runner.fingerprint import model_fingerprint
from model_runner.memory_builder.builder import BuildReport, MemoryBuilder, Target
from model_runner.memory_builder.recipes import PRESETS
from model_runner.models import LoadedModel
from model_runner.progress import Progress
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import Logits, Policy, RouterCall, RouterHooks
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import score
from model_runner.text_files import Example
from model_runner.texts import Window, cut_windows
from tests.sidecar import DENSE_VALUES, Sidecar, exported
from tests.tiny_checkpoint import byte_model, byte_tokenizer

QUIET = Progress(quiet=True)
PRESET_NAMES = ("paper", "paper-v2", "recommended")
# One for each type of reply, where the kind of values does not matter.
REPLY_NAMES = ("paper", "recommended")
LAYERS, LENGTH, BATCH_SIZE = 4, 24, 4
FILE_NAME = "reference.jsonl"
# No two begin alike: no two tokens of their first windows have the same history, hence the same key.
SENTENCES = (
    "As the hart panteth after the water brooks, so panteth my soul after thee.",
    "Blessed are the meek: for they shall inherit the earth, and delight in peace.",
    "Cast thy bread upon the waters: for thou shalt find it after many days.",
    "Deliver me from mine enemies, and defend me from them that rise up.",
    "Enter ye in at the strait gate: for wide is the gate of destruction.",
    "For now we see through a glass, darkly; but then face to face.",
    "Go to the ant, thou sluggard; consider her ways, and be wise.",
    "He that troubleth his own house shall inherit the wind.",
)
PROMPT = "Blessed are the"


@functools.cache
def loaded_model(dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A random OLMoE that reads bytes; leave it as you found it."""
    model = byte_model(dtype=dtype).requires_grad_(False)
    return LoadedModel("tiny", model, byte_tokenizer(), model_fingerprint(model))


def write_text(path: Path, sentences: Sequence[str] = SENTENCES) -> Path:
    """A JSONL file with an example per sentence."""
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences))
    return path


def windows_of(sentences: Sequence[str] = SENTENCES) -> list[Window]:
    """The windows of the same sentences in a file named FILE_NAME, as version 0.1 named them: by number, no digest."""
    examples = [
        Example(ExampleRef(FILE_NAME, str(number)), sentence)
        for number, sentence in enumerate(sentences, 1)
    ]
    return cut_windows(examples, byte_tokenizer(), LENGTH)


def build(
    target: str,
    name: str,
    preset: str = "paper",
    *,
    windows: Sequence[Window] | None = None,
    progress: Progress = QUIET,
    settings: MemorySettings | None = None,
    snippets: bool = False,
    **recipe: Any,
) -> BuildReport:
    """Makes or finds the memory and fills it; `recipe` are changes to the preset's."""
    loaded, chosen = loaded_model(), PRESETS[preset]
    with AdminClient(target) as client:
        client.find_or_create(name, loaded.fingerprint.message(), chosen.settings(LAYERS))
        if settings is not None:
            client.update_settings(name, settings)
        builder = MemoryBuilder(
            *(loaded.model, loaded.fingerprint, client),
            batch_size=BATCH_SIZE,
            tokenizer=loaded.tokenizer if snippets else None,
        )
        targets = [Target(name, replace(chosen.recipe, **recipe))]
        return builder.build(windows_of() if windows is None else windows, targets, progress)


def client_of(target: str, name: str, on_error: OnError = OnError.RAISE) -> RouterClient:
    """A client whose lookups wait for a busy machine."""
    return RouterClient(target, name, loaded_model().fingerprint, on_error=on_error, timeout_s=30.0)


def stored(
    sidecar: Sidecar, name: str, layer: int
) -> dict[int, tuple[list[float], list[float], Provenance]]:
    """Key, value (experts before weights) and provenance of each entry, by id."""
    found = {}
    for entries in exported(sidecar, name, layer):
        keys = tensors.to_array(entries.keys).tolist()
        field = entries.WhichOneof("values")
        if field in DENSE_VALUES.values():
            values = tensors.to_array(getattr(entries, field)).tolist()
        else:
            experts = tensors.to_array(entries.assignments.experts).tolist()
            weights = tensors.to_array(entries.assignments.weights).tolist()
            values = [e + w for e, w in zip(experts, weights, strict=True)]
        ids = tensors.to_array(entries.ids).tolist()
        found |= dict(zip(ids, zip(keys, values, entries.provenance, strict=True), strict=True))
    return found


def everything(sidecar: Sidecar, name: str) -> list[dict[int, tuple[list[float], list[float]]]]:
    """Keys and values of every layer, by id."""
    return [
        {entry: (key, value) for entry, (key, value, _) in stored(sidecar, name, layer).items()}
        for layer in range(LAYERS)
    ]


def scored(policy: RetrievalPolicy | None, leave_one_out: bool = False) -> NDArray[np.float64]:
    """NLL sums of every window, with the plain model (None) or a memory."""
    return score(
        loaded_model().model,
        windows_of(),
        policy,
        QUIET,
        what="",
        batch_size=BATCH_SIZE,
        leave_one_out=leave_one_out,
    ).nll_sums


@torch.no_grad()
def prefill(model: Any, policy: Policy | None = None) -> Tensor:
    """Logits of a padded batch."""
    ids = byte_tokenizer()([PROMPT, SENTENCES[2]], padding=True, return_tensors="pt")
    if policy is None:
        return model(**ids).logits
    with RouterHooks(model, policy) as hooks:
        logits = model(**ids).logits
        hooks.assert_complete()
    return logits


@torch.no_grad()
def generate(model: Any, policy: Policy | None = None, tokens: int = 6) -> tuple[Tensor, Tensor]:
    """Greedy token ids, and the logits of each step."""
    ids = byte_tokenizer()(PROMPT, return_tensors="pt")
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    if policy is None:
        output = model.generate(**ids, **settings)
    else:
        with RouterHooks(model, policy):
            output = model.generate(**ids, **settings)
    return output.sequences, torch.stack(output.logits)


class Recorder:
    """A policy that keeps the replies of another, and acts before a call."""

    def __init__(self, policy: Policy, acts: dict[int, Callable[[], object]] | None = None) -> None:
        self.replies: list[Assignment | Logits | None] = []
        self._policy, self._acts = policy, acts or {}

    def __call__(self, call: RouterCall) -> Assignment | Logits | None:
        """What the other policy says."""
        act = self._acts.get(len(self.replies))
        if act is not None:
            act()
        self.replies.append(self._policy(call))
        return self.replies[-1]
