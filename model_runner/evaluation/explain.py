"""What a memory did to each token of a text: loss, lambda, experts, and the stored cases that did it.

A token is explained by the lookups at the token before it, whose router inputs its prediction was made of. What the
memory did at earlier tokens has a part in it too, through attention: that is in the loss, and not in the lookups shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from knnmoe import tensors
from knnmoe.client import ExampleRef
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1.types_pb2 import Provenance
from numpy.typing import NDArray
from torch import Tensor, nn

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.progress import Progress
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import RouterCall
from model_runner.routing_policy import FellBack, RetrievalPolicy, Retrieved
from model_runner.scoring import F32, by_window, losses
from model_runner.text_files import Example
from model_runner.texts import Batch, Window, cut_windows
from model_runner.token_texts import TokenClass, TokenTexts

# Of JSON and of the page.
SCHEMA = 1
# Nearest neighbours that are shown of each token and layer, unless another number is asked for.
NEIGHBOURS = 5
PROMPT_SOURCE = "prompt"
NO_CASE = -1

I32 = NDArray[np.int32]
Experts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """A stored entry: a token of a text, and the words around it. `snippet` is empty where none was kept."""

    source: str
    example: str
    position: int
    token: int
    gain: float
    snippet: str
    token_start: int
    token_end: int

    @classmethod
    def of(cls, origin: Provenance) -> Case:
        """Of where an entry came from."""
        return cls(*(getattr(origin, name) for name in cls.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class LayerPart:
    """What one layer's lookups did for n tokens; of each the M nearest neighbours, nearest first.

    Attributes:
        lambdas: f32 [n], the weight of the memory; 0 where it abstained.
        came_in, went_out: n times the experts that ran with the memory and not without it, and the other way round.
        neighbours: i32 [n, M], numbers of Explanation.cases; NO_CASE in a slot without a neighbour.
        similarities: f32 [n, M].
        shares: f32 [n, M], of the similarities of all K neighbours that were read.

    """

    layer: int
    lambdas: F32
    came_in: tuple[Experts, ...]
    went_out: tuple[Experts, ...]
    neighbours: I32
    similarities: F32
    shares: F32


@dataclass(frozen=True, slots=True)
class WindowPart:
    """A window: its words, and which of the explanation's tokens are its targets."""

    window: Window
    texts: TokenTexts
    tokens: range


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """What a memory did to the n tokens of a text whose loss counts, in the order of the text.

    Attributes:
        plain, routed: f32 [n], nats of each token without the memory and with it.
        windows: with the words of all tokens, also those whose loss does not count.
        read: K, how many neighbours each lookup read.

    """

    memory: str
    plain: F32
    routed: F32
    windows: tuple[WindowPart, ...]
    layers: tuple[LayerPart, ...]
    cases: tuple[Case, ...]
    read: int

    def __repr__(self) -> str:
        return f"<Explanation: {self.headline}>"

    def __str__(self) -> str:
        from model_runner.evaluation.explain_views import as_text

        return as_text(self)

    @property
    def headline(self) -> str:
        """Its loss in a line."""
        plain, routed = self.nll
        return (
            f"{len(self.plain)} tokens: {plain:.4f} nats per token without memory {self.memory}, "
            f"{routed:.4f} with it ({routed - plain:+.4f})"
        )

    @property
    def changes(self) -> F32:
        """f32 [n], nats: what the memory changed; negative is better."""
        return self.routed - self.plain

    @property
    def most_changed(self) -> tuple[list[int], list[int]]:
        """Numbers of all tokens that were helped, and of those that were harmed, the most changed first."""
        order = np.argsort(self.changes, kind="stable").tolist()
        helped = [token for token in order if self.changes[token] < 0]
        harmed = [token for token in reversed(order) if self.changes[token] > 0]
        return helped, harmed

    @property
    def nll(self) -> tuple[float, float]:
        """Nats per token without the memory and with it."""
        return _mean(self.plain), _mean(self.routed)

    def place(self, token: int) -> tuple[WindowPart, int]:
        """A token's window, and its index there."""
        for part in self.windows:
            if token in part.tokens:
                return part, part.window.target_at[token - part.tokens.start]
        raise BadInput(f"token: got {token}, expected a number below {len(self.plain)}")

    def to_json(self) -> dict[str, Any]:
        """All of it, for `json.dumps`; docs/explain.md says what is what."""
        return {
            "schema": SCHEMA,
            "memory": self.memory,
            "tokens": len(self.plain),
            "neighbours_read": self.read,
            "nll": dict(zip(("plain", "memory"), self.nll, strict=True)),
            "change_sum": float(self.changes.sum(dtype=np.float64)),
            "cases": [
                {name: getattr(case, name) for name in Case.__dataclass_fields__}
                for case in self.cases
            ],
            "windows": [self._window(part) for part in self.windows],
        }

    def _window(self, part: WindowPart) -> dict[str, Any]:
        window = part.window
        explained = dict(zip(window.target_at, part.tokens, strict=True))
        return {
            "source": window.ref.source,
            "example": window.ref.example,
            "name": window.name,
            "tokens": [
                self._token(part, at) | (self._explained(explained[at]) if at in explained else {})
                for at in range(len(window.token_ids))
            ],
        }

    def _token(self, part: WindowPart, at: int) -> dict[str, Any]:
        text, spans = part.texts.token(at), part.texts.spans
        return {
            "position": part.window.offset + at,
            "token": part.window.token_ids[at],
            "text": text,
            "class": str(TokenClass.of(text)),
            "part_of_the_last": at > 0 and spans[at] == spans[at - 1] and bool(text),
        }

    def _explained(self, token: int) -> dict[str, Any]:
        return {
            "plain": _rounded(self.plain[token]),
            "memory": _rounded(self.routed[token]),
            "change": _rounded(self.changes[token]),
            "layers": [
                {
                    "layer": layer.layer,
                    "lambda": _rounded(layer.lambdas[token]),
                    "in": list(layer.came_in[token]),
                    "out": list(layer.went_out[token]),
                    "neighbours": [
                        {"case": int(case), "similarity": _rounded(near), "share": _rounded(share)}
                        for case, near, share in zip(
                            *(layer.neighbours[token], layer.similarities[token]),
                            layer.shares[token],
                            strict=True,
                        )
                        if case != NO_CASE
                    ],
                }
                for layer in self.layers
            ],
        }


def prompt_windows(text: str, tokenizer: Any, length: int) -> list[Window]:
    """The windows of a text that stands in no file. Raises BadInput when it has fewer than 2 tokens."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return cut_windows([Example(ExampleRef(PROMPT_SOURCE, f"#{digest}"), text)], tokenizer, length)


def explain(
    model: nn.Module,
    tokenizer: Any,
    client: RouterClient,
    windows: Sequence[Window],
    progress: Progress | None = None,
    *,
    batch_size: int = 8,
    leave_one_out: bool = False,
    neighbours: int = NEIGHBOURS,
) -> Explanation:
    """Scores windows without and with a memory as `nll.score` does, in the same batches, and notes each lookup.

    client: must raise when the sidecar fails. neighbours: M, how many of each lookup's are kept: K at most. The model
    must not be routing with a memory already. Raises BadInput, HooksInUse, UnsupportedModel, ServiceError.
    """
    if client.on_error is not OnError.RAISE:
        raise BadInput("explain needs a client that raises when the sidecar fails")
    if neighbours < 0:
        raise BadInput(f"neighbours: got {neighbours}, expected 0 or more")
    progress = progress or Progress(quiet=True)
    notes = _Notes(client, min(neighbours, client.describe().settings.neighbours))
    policy = RetrievalPolicy(notes, routed=notes.routed)
    settings: dict[str, Any] = {"progress": progress, "batch_size": batch_size}
    with_memory = losses(
        *(model, windows, policy),
        what=f"with memory {client.memory}",
        leave_one_out=leave_one_out,
        **settings,
    )
    plain, routed = list[F32](), list[F32]()
    for batch, nll in losses(model, windows, None, what="plain model", **settings):
        plain += by_window(_of_targets(nll, batch), batch.windows)
    for batch, nll in with_memory:
        routed += by_window(_of_targets(nll, batch), batch.windows)
        notes.take(batch)
    return _joined(tokenizer, windows, plain, routed, notes)


def _joined(
    tokenizer: Any,
    windows: Sequence[Window],
    plain: Sequence[F32],
    routed: Sequence[F32],
    notes: _Notes,
) -> Explanation:
    """What was noted batch by batch, in the order of the text."""
    # As batched() sorts them: longest first, otherwise as they come.
    batch_order = sorted(range(len(windows)), key=lambda n: -len(windows[n].token_ids))
    order = np.argsort(batch_order).tolist()
    parts, start = list[WindowPart](), 0
    for window in windows:
        texts = TokenTexts.of(window.token_ids, tokenizer)
        parts.append(WindowPart(window, texts, range(start, start + window.targets)))
        start += window.targets
    return Explanation(
        notes.client.memory,
        np.concatenate([plain[n] for n in order]),
        np.concatenate([routed[n] for n in order]),
        tuple(parts),
        tuple(_layer(number, notes.layers[number], order) for number in sorted(notes.layers)),
        tuple(notes.cases),
        notes.read,
    )


def _layer(number: int, noted: Sequence[_Looked], order: Sequence[int]) -> LayerPart:
    some = [noted[n] for n in order]
    return LayerPart(
        number,
        np.concatenate([each.lambdas for each in some]),
        tuple(experts for each in some for experts in each.came_in),
        tuple(experts for each in some for experts in each.went_out),
        np.concatenate([each.neighbours for each in some]),
        np.concatenate([each.similarities for each in some]),
        np.concatenate([each.shares for each in some]),
    )


@dataclass(frozen=True, slots=True)
class _Looked:
    """As LayerPart, of the targets of one window."""

    lambdas: F32
    came_in: Sequence[Experts]
    went_out: Sequence[Experts]
    neighbours: I32
    similarities: F32
    shares: F32


@dataclass(slots=True)
class _Notes:
    """A Retriever that notes what the sidecar says, and what becomes of the routing."""

    client: RouterClient
    keep: int
    layers: dict[int, list[_Looked]] = field(
        default_factory=dict
    )  # windows in the order of batches
    cases: list[Case] = field(default_factory=list)
    read: int = 0
    _number_of: dict[Case, int] = field(default_factory=dict)
    _answers: dict[int, list[pb.RouteResponse]] = field(default_factory=dict)
    _routings: dict[int, tuple[Assignment, Assignment, int]] = field(default_factory=dict)

    def lookup(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        *,
        valid: Tensor | None = None,
        exclude: Sequence[ExampleRef] = (),
    ) -> Retrieved | FellBack:
        """As the client's."""
        self._answers[layer] = answers = list[pb.RouteResponse]()
        return self.client.lookup(
            *(layer, router_input, router_logits, own),
            valid=valid,
            exclude=exclude,
            note=answers.append,
        )

    def routed(self, call: RouterCall, now: Assignment) -> None:
        """Hears what the experts follow."""
        own = Assignment(call.weights, call.experts)
        self._routings[call.site.layer] = (own, now, call.router_logits.shape[1])

    def take(self, batch: Batch) -> None:
        """Keeps what was noted in the pass of a batch, of its targets."""
        valid, targets = batch.attention_mask.bool().flatten().cpu(), batch.predicts.flatten()
        at = (valid.cumsum(0) - 1)[targets.cpu()].numpy()  # their rows among the tokens looked up
        for layer, (own, now, experts) in self._routings.items():
            before, after = (_runs(each, targets, experts) for each in (own, now))
            looked = self._looked_up(self._answers[layer], at)
            columns: list[Any] = [
                *(looked.lambdas, _sets(after & ~before), _sets(before & ~after)),
                *(looked.neighbours, looked.similarities, looked.shares),
            ]
            ends = np.cumsum([0, *(window.targets for window in batch.windows)]).tolist()
            self.layers.setdefault(layer, []).extend(
                _Looked(*(column[start:end] for column in columns)) for start, end in pairwise(ends)
            )
        self._answers, self._routings = {}, {}

    def _looked_up(self, answers: Sequence[pb.RouteResponse], at: NDArray[np.int64]) -> _Looked:
        """Of the tokens in rows `at` of a layer's answers; nothing where the lookup was not made."""
        if not answers:  # a router input or logit is not finite
            nothing = np.zeros((len(at), self.keep), np.float32)
            cases = np.full(nothing.shape, NO_CASE, np.int32)
            return _Looked(np.zeros(len(at), np.float32), (), (), cases, nothing, nothing)
        lambdas, ids, similarities = (
            np.concatenate([tensors.to_array(each) for each in column])[at]
            for column in zip(
                *((a.lambdas, a.neighbours.ids, a.neighbours.similarities) for a in answers),
                strict=True,
            )
        )
        origins: dict[int, Provenance] = {}
        for answer in answers:
            origins.update(answer.neighbours.provenance)
        self.read = max(self.read, ids.shape[1])
        total = similarities.sum(axis=1, keepdims=True)
        shares = np.divide(similarities, total, out=np.zeros_like(similarities), where=total > 0)
        nearest = slice(0, self.keep)
        cases = self._numbers(ids[:, nearest], origins)
        missing = ((0, 0), (0, self.keep - cases.shape[1]))
        return _Looked(
            lambdas,
            (),
            (),
            np.pad(cases, missing, constant_values=NO_CASE),
            np.pad(similarities[:, nearest], missing),
            np.pad(shares[:, nearest], missing),
        )

    def _numbers(self, ids: NDArray[np.uint64], origins: Mapping[int, Provenance]) -> I32:
        """Numbers of the cases of entries; NO_CASE for an entry that is gone, and for a slot without one."""
        of_id = {int(number): NO_CASE for number in np.unique(ids)}
        for number in of_id:
            if (origin := origins.get(number)) is not None:
                case = Case.of(origin)
                known = self._number_of.setdefault(case, len(self.cases))
                if known == len(self.cases):
                    self.cases.append(case)
                of_id[number] = known
        return np.vectorize(of_id.__getitem__, otypes=[np.int32])(ids)


def _of_targets(nll: Tensor, batch: Batch) -> F32:
    found: F32 = nll[batch.predicts].cpu().numpy()
    return found


def _runs(routing: Assignment, rows: Tensor, experts: int) -> NDArray[np.bool_]:
    """Which of N experts run for some rows: bool [n, N]."""
    weights = torch.zeros(int(rows.sum()), experts, device=routing.weights.device)
    weights.scatter_add_(1, routing.experts[rows].long(), routing.weights[rows].float())
    found: NDArray[np.bool_] = (weights > 0).cpu().numpy()
    return found


def _sets(experts: NDArray[np.bool_]) -> list[Experts]:
    """The experts of each row."""
    return [tuple(np.flatnonzero(row).tolist()) for row in experts]


def _mean(values: F32) -> float:
    return float(values.mean(dtype=np.float64))


def _rounded(number: np.float32) -> float:
    """Six digits: a file is half as large, and says no less."""
    return float(f"{number:.6g}")
