"""Measure what MODEL_CARD.md states: NLL per split, and how much the splits repeat each other.

`python -m examples.small_moe.figures [--model DIR] [--texts DIR]` prints one JSON object per split: of the shipped
model and texts, or of others, such as those of `domains`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from examples.small_moe.token_streams import (
    TokenStream,
    spaced_windows,
    stream_of,
)
from examples.small_moe.train import mean_nll
from model_runner.small_moe import DATA_DIR, MODEL_DIR

NGRAM_TOKENS = 8
SPLITS = ("reference", "dev", "test")


def repeated_ngrams(stream: TokenStream, reference: TokenStream) -> float:
    """Return the share of the 8-token sequences of `stream` that occur in `reference`."""
    return float(np.isin(_ngram_keys(stream), _ngram_keys(reference)).mean())


def split_figures(
    model: Any, tokenizer: PreTrainedTokenizerBase, path: Path, most_windows: int | None = None
) -> dict[str, object]:
    """Return NLL in nats per token and per byte over whole windows of a split, and sizes.

    `path` ends in `_reference.jsonl`, `_dev.jsonl` or `_test.jsonl`; the reference split lies beside it, or the
    figure of repetition is left out. `most_windows`: spread over the split, in place of all.
    """
    stream = stream_of(path, tokenizer)
    windows = spaced_windows(stream, most_windows or len(stream))
    nll = mean_nll(model, windows)
    bytes_per_token = len(tokenizer.decode(stream).encode()) / len(stream)
    figures: dict[str, object] = {
        "split": path.stem,
        "tokens": len(stream),
        "windows": len(windows),
        "nll_per_token": round(nll, 4),
        "nll_per_byte": round(nll / bytes_per_token, 4),
        "bytes_per_token": round(bytes_per_token, 3),
    }
    reference = path.with_name(f"{path.stem.rpartition('_')[0]}_reference.jsonl")
    if reference.exists():
        repeated = repeated_ngrams(stream, stream_of(reference, tokenizer))
        figures["ngrams_in_reference"] = round(repeated, 4)
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Print the figures of every split that is asked for."""
    parser = argparse.ArgumentParser(description="Measure the figures of the model card.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="checkpoint directory")
    parser.add_argument("--texts", type=Path, default=DATA_DIR, help="directory with the splits")
    parser.add_argument("--splits", nargs="+", default=SPLITS, choices=SPLITS, help="which")
    parser.add_argument("--windows", type=int, help="at most so many of each, in place of all")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for the default")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for split in options.splits:
        for path in sorted(options.texts.glob(f"*_{split}.jsonl")):
            figures = split_figures(model, tokenizer, path, options.windows)
            sys.stdout.write(json.dumps(figures) + "\n")
            sys.stdout.flush()


def _ngram_keys(stream: TokenStream) -> NDArray[np.uint64]:
    """Hash each run of 8 tokens to 64 bits: uint64 [tokens - 7]."""
    factors = np.random.default_rng(0).integers(1, 2**63, NGRAM_TOKENS, dtype=np.uint64) | 1
    rows = np.lib.stride_tricks.sliding_window_view(stream, NGRAM_TOKENS)
    return (rows * factors).sum(axis=1, dtype=np.uint64)


if __name__ == "__main__":
    main()
