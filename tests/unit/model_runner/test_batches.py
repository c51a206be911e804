"""Padded batches, and the loss per token on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from knnmoe.client import ExampleRef
from torch import Tensor

from model_runner.texts import Batch, Window, make_batch, token_nll
from tests.rounding import assert_same_sums

VOCABULARY = 11
CPU = torch.device("cpu")


def window(*token_ids: int, first_target: int = 1) -> Window:
    targets = tuple(range(first_target, len(token_ids)))
    return Window(ExampleRef("s", "1"), token_ids, targets, 0)


WINDOWS = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=9).flatmap(
        lambda ids: st.integers(1, len(ids) - 1).map(lambda first: window(*ids, first_target=first))
    ),
    min_size=1,
    max_size=4,
)


def random_logits(batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*batch.input_ids.shape, VOCABULARY, generator=generator).to(dtype)


def loss_by_loop(logits: Tensor, windows: tuple[Window, ...]) -> Tensor:
    nll = torch.zeros(logits.shape[:2])
    for row, one in enumerate(windows):
        for target in range(one.first_target, len(one.token_ids)):
            scores = logits[row, target - 1].double()
            nll[row, target - 1] = -(scores.log_softmax(-1)[one.token_ids[target]])
    return nll


def test_what_a_batch_holds() -> None:
    batch = make_batch([window(5, 6, 7, 8, first_target=2), window(9, 10)], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.predicts.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]


@given(WINDOWS)
def test_loss_is_that_of_a_loop_over_tokens(windows: list[Window]) -> None:
    batch = make_batch(windows, CPU)
    logits = random_logits(batch)
    nll = token_nll(logits, batch)
    assert_same_sums(nll, loss_by_loop(logits, batch.windows), length=VOCABULARY)
    assert int(batch.predicts.sum()) == sum(w.targets for w in windows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loss_of_other_dtypes_is_taken_in_f32(dtype: torch.dtype) -> None:
    batch = make_batch([window(1, 2, 3), window(4, 5)], CPU)
    logits = random_logits(batch, dtype)
    nll = token_nll(logits, batch)
    assert nll.dtype == torch.float32
    assert_same_sums(nll, loss_by_loop(logits.float(), batch.windows), length=VOCABULARY)


@pytest.mark.parametrize("noise", [torch.nan, torch.inf, 1e30])
def test_what_a_model_says_at_padding_never_counts(noise: float) -> None:
    batch = make_batch([window(1, 2, 3, 4, 5), window(6, 7), window(8, 9, first_target=1)], CPU)
    logits = random_logits(batch)
    expected = token_nll(logits, batch)
    logits[~batch.predicts] = noise
    assert torch.equal(token_nll(logits, batch), expected)


def test_a_window_scores_the_same_in_any_batch() -> None:
    short, long = window(1, 2, 3), window(4, 5, 6, 7, 8)
    together = make_batch([short, long], CPU)
    logits = random_logits(together)
    alone = token_nll(logits[:1, :3], make_batch([short], CPU))
    assert torch.equal(token_nll(logits, together)[:1, :3], alone)
