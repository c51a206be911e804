"""Measure what MODEL_CARD.md states: NLL per split, and how much the splits repeat each other.

`python -m examples.small_moe.figures [--model DIR]` prints one JSON object per split.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.small_moe.token_streams import (
    TokenStream,
    spaced_windows,
    stream_of,
)
from examples.small_moe.train import mean_nll
from model_runner.small_moe import MODEL_DIR, data_file

NGRAM_TOKENS = 8


def repeated_ngrams(stream: TokenStream, reference: TokenStream) -> float:
    """Return the share of the 8-token sequences of `stream` that occur in `reference`."""
    return float(np.isin(_ngram_keys(stream), _ngram_keys(reference)).mean())


def split_figures(
    model: Any,
    tokenizer: Any,
    domain: Literal["general", "shifted"],
    split: Literal["reference", "dev", "test"],
) -> dict[str, object]:
    """Return NLL in nats per token and per byte over all whole windows of a split, and sizes."""
    path = data_file(domain, split)
    stream = stream_of(path, tokenizer)
    windows = spaced_windows(stream, len(stream))
    nll = mean_nll(model, windows)
    text = tokenizer.decode(stream)
    return {
        "split": path.stem,
        "tokens": len(stream),
        "windows": len(windows),
        "nll_per_token": round(nll, 4),
        "bytes_per_token": round(len(text.encode()) / len(stream), 3),
        "ngrams_in_reference": round(
            repeated_ngrams(stream, stream_of(data_file(domain, "reference"), tokenizer)), 4
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the figures of every shipped split."""
    parser = argparse.ArgumentParser(description="Measure the figures of the model card.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="checkpoint directory")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for the default")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for domain in ("general", "shifted"):
        for split in ("reference", "dev", "test"):
            figures = split_figures(model, tokenizer, domain, split)
            sys.stdout.write(json.dumps(figures) + "\n")
            sys.stdout.flush()


def _ngram_keys(stream: TokenStream) -> NDArray[np.uint64]:
    """Hash each run of 8 tokens to 64 bits: uint64 [tokens - 7]."""
    factors = np.random.default_rng(0).integers(1, 2**63, NGRAM_TOKENS, dtype=np.uint64) | 1
    rows = np.lib.stride_tricks.sliding_window_view(stream, NGRAM_TOKENS)
    return (rows * factors).sum(axis=1, dtype=np.uint64)


if __name__ == "__main__":
    main()
