"""A memory in one call: what opens, hooks, counts and teaches, put together around one model.

    with RoutingMemory(model, "law", target="127.0.0.1:50051") as memory:
        model.generate(...)
    print(memory.report)

Everything here is composed of `open_retriever`, `RetrievalPolicy`, `RouterHooks`, `OnlineLearner` and `explain`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from knnmoe.client import AdminClient, Credentials, require_same_model
from knnmoe.fingerprint import ModelFingerprint
from torch import nn

from model_runner.errors import BadInput, HooksInUse
from model_runner.evaluation.explain import NEIGHBOURS, Explanation, explain
from model_runner.fingerprint import model_fingerprint
from model_runner.memory_builder.entries import known_text, windows_as_known
from model_runner.memory_builder.learner import ExampleReport, OnlineLearner
from model_runner.models import LoadedModel, window_length
from model_runner.retrieval import OpenMemory, Retrieval, Where, open_retriever
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import RouterHooks, verify_hooks
from model_runner.routing_policy import LayerUse, Lookups, RetrievalPolicy
from model_runner.text_files import examples_of
from model_runner.texts import Window, cut_windows, distinct, read_windows

log = logging.getLogger(__name__)

DEFAULT_TARGET = "127.0.0.1:50051"
# Of explanations, whose lookups must not fall back: a busy sidecar gets its time.
EXPLAIN_TIMEOUT_S = 60.0
# The source of what is learnt from Python, unless it is given another.
PYTHON_SOURCE = "python"

Row = str | Mapping[str, Any]
Text = Row | Path | Iterable[Row]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What a memory did at one MoE layer.

    Attributes:
        tokens: that it answered for.
        abstained: of these, the ones that kept the model's own routing, since nothing was near.
        not_finite: tokens that a replica left out, since their router input or logits were not finite.
        lambda_mean: the mean weight of the memory over `tokens`, 0 to 1; 0 when there were none.

    """

    tokens: int = 0
    abstained: int = 0
    not_finite: int = 0
    lambda_mean: float = 0.0


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What a memory did since it was opened, over all threads.

    Attributes:
        layers: one per MoE layer of the model.
        lookups: a forward pass makes one at each layer.
        fallbacks: of these, by reason, the ones without an answer, where the model's own router stood.

    """

    layers: tuple[LayerReport, ...]
    lookups: int = 0
    fallbacks: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that the memory answered for: those of the layer that has the most."""
        return max((layer.tokens for layer in self.layers), default=0)

    @property
    def lambda_by_layer(self) -> tuple[float, ...]:
        """Mean lambda of each layer."""
        return tuple(layer.lambda_mean for layer in self.layers)

    @property
    def lambda_mean(self) -> float:
        """Mean lambda over tokens and layers."""
        total = sum(layer.tokens for layer in self.layers)
        weight = sum(layer.tokens * layer.lambda_mean for layer in self.layers)
        return weight / total if total else 0.0

    def __str__(self) -> str:
        layers = ", ".join(f"layer {n} {mean:.2f}" for n, mean in enumerate(self.lambda_by_layer))
        left_out = max((layer.not_finite for layer in self.layers), default=0)
        said = f"{self.tokens} tokens, lambda {self.lambda_mean:.2f} on average ({layers}), "
        said += f"{left_out} tokens that are not finite, " if left_out else ""
        return f"{said}fallbacks: {Lookups(self.lookups, self.fallbacks) if self.fallbacks else 'none'}"


class RoutingMemory:
    """Context manager: within it `model` routes with a memory, whoever calls it and from however many threads.

    Enter it before threads begin, and leave it when they have ended. Afterwards the model is as it was, bit for bit;
    `report` stays. It may be entered again, and then counts anew.

    Args:
        model: a Mixture-of-Experts causal LM of transformers in eval mode, also within peft's or torch.compile's
            wrapper; or what load_model() gives. Its weights are only read.
        memory: a memory's name, built for the routers of this model.
        target: address of the sidecar, HOST:PORT or unix:PATH.
        tokenizer: for text that is learnt or explained; a LoadedModel brings its own.
        retrieval: "auto" (a replica beside the model where it fits), "replica", "remote", or a Retrieval.
        on_error: "fall_back": a lookup that fails leaves the model's own router standing, and is counted. "raise": it
            is an error. Either way a sidecar that is away is an error when the context is entered.
        timeout_s: longest wait for one token's lookup in the sidecar.
        credentials: certificates and token (knnmoe.client.Credentials); those of the environment when not given.

    Raises when it is entered: HooksInUse (this model is routing with a memory already), UnsupportedModel,
    HookBypassed, BadInput (training mode); of knnmoe.client ModelMismatch, MemoryNotFound, ServiceUnavailable.

    """

    def __init__(
        self,
        model: nn.Module | LoadedModel,
        memory: str,
        *,
        target: str = DEFAULT_TARGET,
        tokenizer: Any = None,
        retrieval: Retrieval | Where | str = Where.AUTO,
        on_error: OnError | str = OnError.FALL_BACK,
        timeout_s: float = 0.05,
        credentials: Credentials | None = None,
    ) -> None:
        # What load_model() gives was verified then.
        self._verified = isinstance(model, LoadedModel)
        if isinstance(model, LoadedModel):
            model, tokenizer = model.model, tokenizer or model.tokenizer
        if not isinstance(model, nn.Module):
            raise BadInput(
                f"model: got {model!r}, expected a model of transformers, or load_model(NAME)"
            )
        for what, name in (("memory", memory), ("target", target)):
            if not isinstance(name, str) or not name:
                expected = "the name of a memory" if what == "memory" else "HOST:PORT or unix:PATH"
                raise BadInput(f"{what}: got {name!r}, expected {expected}")
        if not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
            raise BadInput(f"timeout_s: got {timeout_s!r}, expected seconds above 0")
        self.model, self.tokenizer = model, tokenizer
        self.memory, self.target, self.timeout_s = memory, target, timeout_s
        self.retrieval = retrieval if isinstance(retrieval, Retrieval) else Retrieval(retrieval)
        self.on_error, self.credentials = OnError(on_error), credentials
        self._layers = 0
        self._policy: RetrievalPolicy | None = None
        self._open: _Open | None = None
        self._stack = ExitStack()

    def __enter__(self) -> RoutingMemory:
        if self._open is not None:
            raise HooksInUse(
                f"this RoutingMemory of {self.memory!r} is already entered; leave it first, or make another"
            )
        with ExitStack() as stack:
            admin = stack.enter_context(AdminClient(self.target, credentials=self.credentials))
            fingerprint = model_fingerprint(self.model)
            # Falling back is for text under way: whoever begins is told that nobody answers, or another model's.
            require_same_model(admin.describe(self.memory), fingerprint.message(), self.target)
            if not self._verified:
                verify_hooks(_eager(self.model))
            where = (self.target, self.memory, fingerprint, _device_of(self.model), self.retrieval)
            opening = open_retriever(
                *where,
                timeout_s=self.timeout_s,
                on_error=self.on_error,
                credentials=self.credentials,
            )
            opened = stack.enter_context(opening)
            policy = RetrievalPolicy(opened.retriever)
            hooks = stack.enter_context(RouterHooks(self.model, policy))
            self._layers, self._policy = fingerprint.num_layers, policy
            self._open = _Open(admin, fingerprint, opened, hooks)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = None
        self._stack.close()

    @property
    def where(self) -> Where:
        """Where lookups are answered: REPLICA or REMOTE. Raises BadInput when it is not entered."""
        return self._entered("where").opened.where

    @property
    def report(self) -> MemoryReport:
        """What the memory did since the context was entered, or within it when it was left."""
        use = {} if self._policy is None else self._policy.use_now()
        fallbacks = sum((each.fell_back for each in use.values()), Counter[str]())
        return MemoryReport(
            tuple(_layer_report(use.get(layer, LayerUse())) for layer in range(self._layers)),
            sum(each.lookups for each in use.values()),
            dict(fallbacks),
        )

    def explain(
        self,
        text: Text,
        *,
        neighbours: int = NEIGHBOURS,
        leave_one_out: bool = False,
        source: str = PYTHON_SOURCE,
    ) -> Explanation:
        """What the memory does to each token of a text, as `model-runner explain` shows it; asks the sidecar.

        Forward passes of other threads wait meanwhile, and `report` does not count it.

        text, source: as of learn(). neighbours: stored cases that are kept of each token and layer. leave_one_out: the
        example's own entries, of the same source, are not read. Raises BadInput, ServiceError.
        """
        opened = self._entered("explain")
        windows = self._windows(text, source)
        if isinstance(text, Path):
            windows = known_text(opened.admin, self.memory, windows).windows
        asked = (self.target, self.memory, opened.fingerprint)
        with (
            RouterClient(
                *asked,
                timeout_s=EXPLAIN_TIMEOUT_S,
                on_error=OnError.RAISE,
                credentials=self.credentials,
            ) as client,
            opened.hooks.paused(),
        ):
            client.describe()
            return explain(
                *(_eager(self.model), self.tokenizer, client, windows),
                neighbours=neighbours,
                leave_one_out=leave_one_out,
            )

    def learn(
        self, text: Text, *, source: str = PYTHON_SOURCE, snippets: bool = True
    ) -> list[ExampleReport]:
        """Adds text to the memory, as `model-runner learn` does; the next lookup finds it.

        Texts, or rows of `text`, of `prompt` and `answer`, or of `messages`, maybe with an `id`; a Path is a file of
        them. What is there already is not written again. Forward passes of other threads wait meanwhile.

        source: under which it is kept, and can be deleted; a file's own name is that of a file. snippets: the words
        around each token are kept with its entry, for explanations.

        Returns a report per example. Raises BadInput; ServiceUnavailable and others of the learner: learning the same
        again then writes the same entries.
        """
        opened = self._entered("learn")
        windows = self._windows(text, source)
        if isinstance(text, Path) or any(window.name == window.ref.example for window in windows):
            windows = windows_as_known(opened.admin, self.memory, windows)
        examples = [list(group) for _, group in groupby(windows, key=lambda window: window.ref)]
        with (
            opened.hooks.paused(),
            OnlineLearner(
                *(_eager(self.model), opened.fingerprint, opened.admin, self.memory),
                reference=windows,
                catch_up=opened.opened.catch_up,
                tokenizer=self.tokenizer if snippets else None,
            ) as learner,
        ):
            return [learner.learn_example(example) for example in examples]

    def _windows(self, text: Text, source: str) -> list[Window]:
        if self.tokenizer is None:
            raise BadInput(
                "tokenizer: got None, and text cannot be read without one; give RoutingMemory(..., "
                "tokenizer=AutoTokenizer.from_pretrained(NAME)), or what load_model(NAME) gives as the model"
            )
        length = window_length(self.model, None)
        if isinstance(text, Path):
            windows = read_windows(text, self.tokenizer, length)
        else:
            windows = cut_windows(examples_of(_rows(text), source), self.tokenizer, length)
        embeddings: Any = _eager(self.model).get_input_embeddings()  # type: ignore[operator]
        known = len(embeddings.weight)
        largest = max(token for window in windows for token in window.token_ids)
        if largest >= known:
            raise BadInput(
                f"tokenizer: made token {largest}, expected one of the model's {known}; is it another model's?"
            )
        return distinct(windows)

    def _entered(self, what: str) -> _Open:
        if self._open is None:
            raise BadInput(
                f"{what}: the memory is not open; use it within `with RoutingMemory(...) as memory:`"
            )
        return self._open


@dataclass(frozen=True, slots=True)
class _Open:
    """What is there while the context is entered."""

    admin: AdminClient
    fingerprint: ModelFingerprint
    opened: OpenMemory
    hooks: RouterHooks


def _rows(text: str | Mapping[str, Any] | Iterable[Row]) -> list[Mapping[str, Any]]:
    if not isinstance(text, Iterable):
        raise BadInput(f"text: got {text!r}, expected a text, a row, a list of these, or a Path")
    rows = [text] if isinstance(text, str | Mapping) else text
    return [{"text": row} if isinstance(row, str) else row for row in rows]


def _layer_report(use: LayerUse) -> LayerReport:
    return LayerReport(
        use.tokens, use.abstained, use.not_finite - use.fell_back["not_finite"], use.lambda_mean
    )


def _eager(model: nn.Module) -> nn.Module:
    """The model that torch.compile wraps: what taps it must not become part of the compiled code."""
    wrapped = getattr(model, "_orig_mod", model)
    return wrapped if isinstance(wrapped, nn.Module) else model


def _device_of(model: nn.Module) -> torch.device:
    """Of the first weights that are loaded; accelerate keeps those that it offloads on the meta device."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))
