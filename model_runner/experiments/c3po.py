"""C3PO (arXiv 2504.07964): a token's pathway is re-mixed from those of similar, successful samples.

The released code (github.com/tianyi-lab/C3PO, olmoe_optimizer.py) does this: the 3 nearest samples by the cosine of
sentence embeddings, of those that the model had answered correctly; in the last 5 MoE layers, the last token's router
probabilities over all N experts become the similarity-weighted mean of the neighbours' last tokens' (the token's own
have no share), of which the model's top k run. `C3po` takes K, similarity, layers, mixing and top-k from there.

What had to be adapted, since loss over running text is measured in place of answers to questions:

- A sample is a text up to one of its tokens; the model was right if it rates the text's next token highest.
- Each scored token is the last token of a sample of its own: it alone is re-mixed, and reads what the plain model
  made of the tokens before it.
- The embedding is the mean of the decoder's hidden states up to the token, in place of a sentence encoder's.

Of the paper's text and not of the code: the share alpha of the token's own pathway and a Gaussian kernel
(`VARIANTS`). Gradient descent on neighbours' losses, the paper's best variant, was not released and is not here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model_runner.errors import UnsupportedModel
from model_runner.experiments.choosing import Candidate, Setting
from model_runner.experiments.local import squared_distances
from model_runner.experiments.reading import Reading, read, read_batch
from model_runner.experiments.study import Study
from model_runner.router_hooks import Logits, RouterCall, RouterHooks
from model_runner.scoring import Scores, collected
from model_runner.texts import Batch, Window, make_batch, token_nll

EMBEDDINGS = ("mean", "token")
_TINY = 1e-10
# Nats by which rounding may change the loss of a token.
_SAME_NLL = 0.05


@dataclass(frozen=True, slots=True)
class Remix:
    """How a pathway is re-mixed.

    Attributes:
        own_share: alpha, the weight of the token's own pathway; the released code's is 0.
        gaussian: weights exp(-|x - k|^2 / median) of neighbours in place of their cosines.
        embedding: one of EMBEDDINGS: the mean over the text so far, or the token's own hidden state.
        last_layers: how many layers are re-mixed, from the last one on; None: 5 of 16, as in the paper's model.

    """

    neighbours: int = 3
    own_share: float = 0.0
    gaussian: bool = False
    embedding: str = "mean"
    last_layers: int | None = 5

    def first_layer(self, layers: int) -> int:
        """The first one that is re-mixed; a model of fewer layers is re-mixed whole."""
        last = max(1, round(layers * 5 / 16)) if self.last_layers is None else self.last_layers
        return max(0, layers - last)


RELEASED = Remix()


class Pathways:
    """What is known of n samples.

    Args:
        embedding: one of EMBEDDINGS.
        keys: f32 [n, d], of length 1.
        ways: f32 [n, L, N], the routers' probabilities.

    """

    def __init__(self, embedding: str, keys: Tensor, ways: Tensor) -> None:
        self.keys, self.ways = keys, ways
        self._embedding, self._square_norms = embedding, keys.square().sum(1)

    @classmethod
    def of(cls, study: Study, embedding: str) -> Pathways:
        """Of the reference's tokens whose successor the model rates highest; UnsupportedModel where there are none."""
        keys, ways = list[Tensor](), list[Tensor]()
        for reading in read(study, study.texts.reference, "pathways"):
            keys.append(embedded(reading, embedding)[reading.right])
            ways.append(pathways_of(reading)[reading.right])
        if not any(map(len, keys)):
            raise UnsupportedModel(
                f"C3PO needs reference tokens that {study.loaded.name} rates highest, and there are none"
            )
        return cls(embedding, torch.cat(keys), torch.cat(ways))

    @property
    def nbytes(self) -> int:
        """Of embeddings and pathways."""
        return self.keys.nbytes + self.ways.nbytes

    def remixed(self, reading: Reading, how: Remix) -> Tensor:
        """Pathways f32 [B, S, L, N] of a batch's tokens."""
        queries = embedded(reading, self._embedding).flatten(0, 1)
        count = min(how.neighbours, len(self.keys))
        distances, rows = squared_distances(queries, self.keys, self._square_norms, count)
        weights = (1 - distances / 2).clamp_min(0)  # the cosine
        if how.gaussian:
            weights = torch.exp(-distances / distances[:, 0].median().clamp_min(_TINY))
        weights = weights / weights.sum(1, keepdim=True).clamp_min(_TINY)
        own = pathways_of(reading)
        mean = torch.einsum("tk,tkln->tln", weights, self.ways[rows]).view(own.shape)
        return how.own_share * own + (1 - how.own_share) * mean


def embedded(reading: Reading, embedding: str) -> Tensor:
    """f32 [B, S, d] of length 1."""
    states = reading.means() if embedding == "mean" else reading.hidden
    return F.normalize(states, dim=-1)


def pathways_of(reading: Reading) -> Tensor:
    """Router probabilities f32 [B, S, L, N]."""
    shape = reading.nll.shape
    return torch.stack(
        [c.router_logits.float().softmax(-1).view(*shape, -1) for c in reading.calls], 2
    )


def remixed_nll(study: Study, reading: Reading, pathways: Tensor, first_layer: int = 0) -> Tensor:
    """Loss f32 [B, S] of each token's successor, each with its own pathway [B, S, L, N] and no other token's.

    The batch is read twice side by side: plain, and re-mixed, where each token sees itself and the plain ones before.
    """
    batch = reading.batch
    rows, length = batch.input_ids.shape

    def policy(call: RouterCall) -> Logits | None:
        layer = call.site.layer
        if layer < first_layer:
            return None
        logits = call.router_logits.view(rows, 2 * length, -1).clone()
        # Probabilities know no constant, which routers that do not take a softmax see: the token keeps its own.
        own = logits[:, length:].float().logsumexp(-1, keepdim=True)
        mixed = pathways[:, :, layer].clamp_min(_TINY).log() + own
        logits[:, length:] = mixed.to(logits.dtype)
        return Logits(logits.flatten(0, 1))

    twice = torch.cat([batch.input_ids, batch.input_ids], 1)
    positions = torch.arange(length, device=twice.device).repeat(2)[None].expand(rows, -1)
    model = study.loaded.model
    mask = side_by_side(batch, next(model.parameters()).dtype)
    with torch.no_grad(), RouterHooks(model, policy) as hooks:
        logits = model(
            input_ids=twice, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        hooks.assert_complete()
    return token_nll(logits[:, length:], batch)


def side_by_side(batch: Batch, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, 2S, 2S]: the first S tokens are causal; each other sees those before it, and itself."""
    length = batch.input_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=batch.input_ids.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=causal.device)
    seen = torch.cat(
        [
            torch.cat([causal, torch.zeros_like(causal)], 1),
            torch.cat([causal & ~itself, itself], 1),
        ]
    )
    mask = torch.zeros(seen.shape, dtype=dtype, device=causal.device)
    mask = mask.masked_fill(~seen, torch.finfo(dtype).min)
    return mask[None, None].expand(len(batch.input_ids), 1, -1, -1)


def c3po_scores(study: Study, store: Pathways, how: Remix, windows: Sequence[Window]) -> Scores:
    """Of windows, longest first."""

    def each() -> Iterator[tuple[Batch, Tensor]]:
        for reading in read(study, windows, "C3PO"):
            first = how.first_layer(len(reading.calls))
            yield reading.batch, remixed_nll(study, reading, store.remixed(reading, how), first)

    return collected(each())


def require_side_by_side(study: Study) -> None:
    """Raises UnsupportedModel unless each token with its own pathway is read as the plain model reads it.

    Recurrent layers and windows of attention see tokens as they are laid out, whatever the mask says.
    """
    few = make_batch(study.texts.reference[:2], study.loaded.device)
    reading = read_batch(study.loaded, few)
    error = float((remixed_nll(study, reading, pathways_of(reading)) - reading.nll).abs().max())
    if error > _SAME_NLL:
        raise UnsupportedModel(
            f"C3PO re-mixes one token at a time, and {type(study.loaded.model).__name__} reads tokens side by side "
            f"otherwise than one after the other: losses differ by up to {error:.2g} nats with unchanged routing"
        )


@dataclass(frozen=True, slots=True)
class C3po:
    """A Method: as released, one candidate; or the paper's variants of kernel regression, chosen on dev."""

    name: str = "c3po"
    variants: tuple[Remix, ...] = (RELEASED,)

    def candidates(self, study: Study) -> Iterator[Candidate]:
        """As of Method. Raises UnsupportedModel, also when the model got nothing of the reference right."""
        require_side_by_side(study)
        stores = dict[str, tuple[Pathways, float]]()
        for how in self.variants:
            if how.embedding not in stores:
                started = time.perf_counter()
                store = Pathways.of(study, how.embedding)
                stores[how.embedding] = store, time.perf_counter() - started
            store, built_s = stores[how.embedding]
            score = partial(c3po_scores, study, store, how)
            setting: Setting = {
                "K": how.neighbours,
                "own share": how.own_share,
                "kernel": "gaussian" if how.gaussian else "cosine",
                "embedding": how.embedding,
                "layers": "last 5" if how.last_layers == 5 else "last 5 of 16",
            }
            yield Candidate(setting, score, peak_bytes=store.nbytes, fit_s=built_s)


VARIANTS = tuple(
    Remix(neighbours, own_share, gaussian=True, embedding=embedding, last_layers=last)
    for embedding, last, neighbours, own_share in itertools.product(
        EMBEDDINGS, (5, None), (3, 16), (0.5, 0.8)
    )
)
