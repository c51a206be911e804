"""The byte-level BPE tokenizer, and texts as token streams cut into windows."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from examples.small_moe.texts import read_jsonl

END_OF_TEXT = "<eos>"
END_OF_TEXT_ID = 0
WINDOW_TOKENS = 128

TokenStream = NDArray[np.uint16]


def trained_tokenizer(texts: list[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with `<eos>` as token 0, as end of text and as padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> TokenStream:
    """Join all texts, each followed by `<eos>`: uint16 [tokens]."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    ids = [token for encoding in encodings for token in (*encoding.ids, END_OF_TEXT_ID)]
    return np.array(ids, dtype=np.uint16)


def stream_of(path: Path, tokenizer: PreTrainedTokenizerFast) -> TokenStream:
    """Return the token stream of one JSONL split."""
    return token_stream([document.text for document in read_jsonl(path)], tokenizer)


def spaced_windows(stream: TokenStream, count: int, window: int = WINDOW_TOKENS) -> Tensor:
    """Take at most `count` whole windows spread over `stream`: int64 [windows, window]."""
    available = len(stream) // window
    chosen = np.linspace(0, available, min(count, available), endpoint=False).astype(np.int64)
    rows = stream[: available * window].reshape(available, window)[chosen]
    return torch.from_numpy(rows.astype(np.int64))


def random_windows(
    stream: TokenStream, count: int, seed: int, step: int, window: int = WINDOW_TOKENS
) -> Tensor:
    """Draw the batch of one step, a function of `seed` and `step`: int64 [count, window]."""
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(stream) - window + 1, count)
    rows = stream[starts[:, None] + np.arange(window)]
    return torch.from_numpy(rows.astype(np.int64))
